"""Losses of block reconstruction: (ŷ, y, context) -> scalar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What a loss may want to know besides the two outputs.

    unit: name. is_logits: whether the output is the model's. images: numbers of the calibration images in the batch.
    weights: per-element weights that broadcast to the output, or None. scale: mean of ‖y_t‖² over all calibration
    images and tokens, float.
    """

    unit: str
    is_logits: bool
    images: Tensor
    weights: Tensor | None
    scale: float


Loss = Callable[[Tensor, Tensor, Context], Tensor]
"""(ŷ, y, context) -> scalar, a mean over the images; y is the float model's output."""


def mse(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """Mean squared difference, each element times its weight where weights are given."""
    difference = (got - expected).square()
    return (difference if context.weights is None else difference * context.weights).mean()


EPSILON = 0.01
"""ε of the token norm as a share of the mean of ‖y_t‖²."""


def token_norm(got: Tensor, expected: Tensor, context: Context) -> Tensor:
    """Mean over images and tokens of ‖y_t − ŷ_t‖² / (‖y_t‖² + ε), t over all but the last dimension.

    Every token counts by its relative error, so that a few tokens of extreme norm do not make up the whole loss. ε =
    :data:`EPSILON` of the mean squared norm keeps tokens that are next to zero from doing so instead.
    """
    difference = (got - expected).square()
    if context.weights is not None:
        difference = difference * context.weights
    norm = expected.square().sum(-1) + max(EPSILON * context.scale, torch.finfo(torch.float32).tiny)
    return (difference.sum(-1) / norm).mean()


LOSSES: dict[str, Loss] = {"mse": mse, "token-norm": token_norm}
