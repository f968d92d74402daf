"""Losses of block reconstruction: (ŷ, y, context) -> scalar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlens.metrics.divergence import kl_of_logits


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
