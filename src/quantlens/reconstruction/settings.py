"""What block reconstruction is told, its losses (ŷ, y, context) -> scalar among it, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.formats import Quantizer
from quantlens.metrics.divergence import kl_of_logits


# -- losses -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Context:
    """What a loss may want to know besides the two outputs.

    unit: name. is_logits: whether the output is the model's. images: numbers of the calibration images in the batch.
    scale: mean of ‖y_t‖² over all calibration images and tokens, float.
    """

    unit: str
    is_logits: bool
    images: Tensor
    scale: float


Loss = Callable[[Tensor, Tensor, Context], Tensor]
"""(ŷ, y, context) -> scalar, a mean over the images; y is the float model's output."""


def mse(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """Mean squared difference."""
    return (got - expected).square().mean()


EPSILON = 0.01
"""ε of the token norm as a share of the mean of ‖y_t‖²."""


def token_norm(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """Mean over images and tokens of ‖y_t − ŷ_t‖² / (‖y_t‖² + ε), t over all but the last dimension.

    Every token counts by its relative error, so that a few tokens of extreme norm do not make up the whole loss. ε =
    :data:`EPSILON` of the mean squared norm keeps tokens that are next to zero from doing so instead.
    """
    norm = expected.square().sum(-1) + max(EPSILON * context.scale, torch.finfo(torch.float32).tiny)
    return ((got - expected).square().sum(-1) / norm).mean()


def divergence(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """KL(softmax(y) ‖ softmax(ŷ)) of logits [B, K], mean over the images."""
    return kl_of_logits(expected, got, "mean")


@dataclass(frozen=True)
class Metric:
    """A quadratic form on a unit's error that stands for a Hessian or Fisher matrix, diagonal plus low rank.

    diagonal: w, ≥ 0, broadcasts to the output [B, …]. factors: U, [k, n] with n the elements of one row of the output,
    or None. The form is Σ_j w_j Δ_j² + ‖U·|Δ|‖², the matrix diag(w) + Uᵀ·U applied to the magnitudes of the error.
    """

    diagonal: Tensor
    factors: Tensor | None = None

    def __call__(self, difference: Tensor) -> Tensor:
        """Mean of the form over the rows of an error [B, …]."""
        rows = len(difference)
        value = (difference.square() * self.diagonal.to(difference.device)).sum() / rows
        if self.factors is not None:
            low_rank = difference.abs().reshape(rows, -1) @ self.factors.to(difference.device).T
            value = value + low_rank.square().sum() / rows
        return value


@dataclass(frozen=True)
class MetricLoss:
    """A loss with a :class:`Metric` for every unit; the divergence at the logits, squared error for a unit that has
    none.

    metrics: by name of the unit. They may be on any device.
    """

    metrics: Mapping[str, Metric] = field(repr=False)

    def __call__(self, got: Tensor, expected: Tensor, context: Context) -> Tensor:
        if context.is_logits:
            return divergence(got, expected, context)
        metric = self.metrics.get(context.unit)
        return mse(got, expected, context) if metric is None else metric(got - expected)

    def state(self) -> dict[str, Tensor]:
        """Everything that the loss depends on, for a checkpoint's fingerprint."""
        found = {f"{name}.diagonal": m.diagonal for name, m in self.metrics.items()}
        return found | {f"{name}.factors": m.factors for name, m in self.metrics.items() if m.factors is not None}


LOSSES: dict[str, Loss] = {"mse": mse, "token-norm": token_norm}


# -- settings and reports ---------------------------------------------------------------------------------------------
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
