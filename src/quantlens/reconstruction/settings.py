"""What block reconstruction is told, and what it tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.formats import Quantizer
from quantlens.reconstruction.losses import LOSSES, Loss

ROUNDING, SCALES, WEIGHTS, VECTORS = "rounding", "scales", "weights", "vectors"


@dataclass(frozen=True)
class Settings:
    """How units are reconstructed. Raises UnknownNameError or QuantlensError for what there is not, or does not fit."""

    optimise: tuple[str, ...] = (ROUNDING, SCALES)
    """Any of "rounding" (AdaRound), "scales" (LSQ), "weights" (float, straight through; not with "rounding"), "vectors"
    (biases, scale and shift of LayerNorms). Weights not quantized and formats that cannot learn stay as they are."""
    loss: str | Loss = "mse"
    """A name of :data:`LOSSES` or a function; it is divided by its value at the start (for the regulariser)."""
    inputs: str = "mixed"
    """What the unit reads: "quantized" (the quantized prefix's output), "float", or "mixed" (element by element)."""
    input_drop: float = 0.5
    """With "mixed": probability of the float one."""
    drop: float = 0.0
    """Probability that an activation's element is left in float (QDrop uses 0.5)."""
    iterations: int = 200
    """Steps per unit, split evenly over the rounds."""
    rounds: int = 1
    """After each the unit is measured on all images; the next starts from the best with half the learning rate."""
    batch_size: int = 16
    """Images per step."""
    lr_rounding: float = 0.02
    """Learning rates are Adam's; they fall to zero along a cosine, but for soft rounding."""
    lr_scales: float = 1e-3
    """In multiples of their start."""
    lr_weights: float = 0.02
    """In units of their scale, or of their standard deviation without a quantizer."""
    lr_vectors: float = 0.003
    """In units of their root mean square."""
    straight_through: bool = False
    """See :class:`.rounding.AdaRound`; without it, its regulariser's mean over the weights is added to the loss."""
    float_weights: bool = False
    """With "weights": those that are not quantized are trained, too."""
    guarded: bool = True
    """A unit whose loss on all images did not fall keeps its start."""

    def __post_init__(self) -> None:
        loss = [self.loss] if isinstance(self.loss, str) else []
        for what, names, known in (
            ("part to optimise", self.optimise, (ROUNDING, SCALES, WEIGHTS, VECTORS)),
            ("reconstruction loss", loss, tuple(LOSSES)),
            ("inputs of reconstruction", [self.inputs], ("quantized", "float", "mixed")),
        ):
            for name in names:
                if name not in known:
                    raise UnknownNameError(what, name, known)
        if ROUNDING in self.optimise and WEIGHTS in self.optimise:
            raise QuantlensError("either the rounding or the weights themselves can be optimised, not both")
        if self.float_weights and WEIGHTS not in self.optimise:
            raise QuantlensError('float_weights says which weights are trained; name "weights" in optimise too')
        if self.iterations < 0 or self.rounds < 1 or self.batch_size < 1:
            raise QuantlensError("reconstruction needs iterations >= 0, rounds >= 1 and a batch size >= 1")
        if not (0 <= self.input_drop <= 1 and 0 <= self.drop < 1):
            raise QuantlensError("drop probabilities lie in 0 … 1 (drop below 1)")


@dataclass(frozen=True)
class UnitReport:
    """What happened to one unit.

    before, after: loss on all calibration images after the quantized prefix. rounds: the loss after each round.
    accepted: whether anything was changed. trained: number of learned tensors.
    """

    unit: str
    before: float
    after: float
    rounds: list[float]
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
        return [asdict(unit) for unit in self.units]


@dataclass
class Result:
    """What reconstruction made of one unit: float weights by name, quantizers by edge key."""

    report: UnitReport
    tensors: dict[str, Tensor]
    quantizers: dict[str, Quantizer]
