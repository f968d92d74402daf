"""What block reconstruction is told, and what it tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.formats import Quantizer
from quantlens.reconstruction.losses import LOSSES, Loss

ROUNDING, SCALES, WEIGHTS, VECTORS = "rounding", "scales", "weights", "vectors"


@dataclass(frozen=True)
class Settings:
    """How units are reconstructed.

    optimise: any of "rounding" (AdaRound), "scales" (LSQ), "weights" (the float weights, straight through; not together
        with "rounding"), "vectors" (biases, scale and shift of LayerNorms). Weights that are not quantized and formats
        that cannot learn stay as they are.
    loss: a name of :data:`LOSSES` or a function (:data:`Loss`). It is divided by its value at the start, so that
        the regulariser means the same everywhere.
    inputs: what the unit reads in training: "quantized" (the quantized prefix's output), "float", or "mixed" (element
        by element, the float one with probability ``input_drop``).
    drop: probability that an activation's element is left in float in training (QDrop uses 0.5).
    iterations: steps per unit, split evenly over ``rounds``. After each round the unit is frozen and measured on all
        images; the next round starts from the best result so far with half the learning rate.
    batch_size: images per step. lr_*: learning rates of Adam; scales are learned as multiples of their start, weights
        in units of their scale (of their standard deviation without a quantizer), vectors of their root mean square.
        They fall to zero along a cosine, but for soft rounding.
    straight_through: see :class:`.rounding.AdaRound`; without it, the mean of the regulariser over a unit's weights is
        added to the loss.
    float_weights: with "weights", weights that are not quantized are trained too.
    guarded: a unit whose loss on all images did not fall keeps its start.
    """

    optimise: tuple[str, ...] = (ROUNDING, SCALES)
    loss: str | Loss = "mse"
    inputs: str = "mixed"
    input_drop: float = 0.5
    drop: float = 0.0
    iterations: int = 200
    rounds: int = 1
    batch_size: int = 16
    lr_rounding: float = 0.02
    lr_scales: float = 1e-3
    lr_weights: float = 0.02
    lr_vectors: float = 0.003
    straight_through: bool = False
    float_weights: bool = False
    guarded: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.optimise if name not in (ROUNDING, SCALES, WEIGHTS, VECTORS)]
        if unknown:
            raise UnknownNameError("part to optimise", unknown[0], (ROUNDING, SCALES, WEIGHTS, VECTORS))
        if ROUNDING in self.optimise and WEIGHTS in self.optimise:
            raise QuantlensError("either the rounding or the weights themselves can be optimised, not both")
        if self.float_weights and WEIGHTS not in self.optimise:
            raise QuantlensError('float_weights says which weights are trained; name "weights" in optimise too')
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise UnknownNameError("reconstruction loss", self.loss, LOSSES)
        if self.inputs not in ("quantized", "float", "mixed"):
            raise UnknownNameError("inputs of reconstruction", self.inputs, ("quantized", "float", "mixed"))
        if self.iterations < 0 or self.rounds < 1 or self.batch_size < 1:
            raise QuantlensError("reconstruction needs iterations >= 0, rounds >= 1 and a batch size >= 1")
        if not (0 <= self.input_drop <= 1 and 0 <= self.drop < 1):
            raise QuantlensError("drop probabilities lie in 0 … 1 (drop below 1)")

    def function(self) -> Loss:
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss


@dataclass(frozen=True)
class UnitReport:
    """What happened to one unit.

    before, after: loss on all calibration images after the quantized prefix. rounds: the loss after each round.
    accepted: whether anything was changed. trained: number of learned tensors.
    """

    unit: str
    before: float
    after: float
    rounds: tuple[float, ...]
    accepted: bool
    trained: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """All units in order. ``resumed``: how many were read from a checkpoint."""

    units: tuple[UnitReport, ...]
    resumed: int = 0

    def info(self) -> list[dict[str, Any]]:
        """As JSON-able data."""
        return [{**asdict(u), "rounds": list(u.rounds)} for u in self.units]


@dataclass
class Result:
    """What reconstruction made of one unit: float weights by name, quantizers by edge key."""

    report: UnitReport
    tensors: dict[str, Tensor] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        return bool(self.tensors or self.quantizers)
