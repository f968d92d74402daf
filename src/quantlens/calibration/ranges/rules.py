"""Range rules: statistics -> [low, high] or parameters of a format. Pure functions of an :class:`Observation`.

Every rule takes G rows and gives G results; nothing here knows of models or sites.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlens.calibration.observers import Observation
from quantlens.formats import BlockScaled, Log, Uniform, affine_parameters, symmetric_parameters
from quantlens.formats.base import bounded_

REPQ_QUANTILES = (0.999, 0.9999, 0.99999)
"""Candidates of the RepQ-ViT authors' code."""


def minmax(seen: Observation) -> tuple[Tensor, Tensor]:
    """The whole range. [G], [G]."""
    return seen.low, seen.high


def percentile(seen: Observation, p: float = 0.9999) -> tuple[Tensor, Tensor]:
    """[quantile(1 − p), quantile(p)], 0.5 < p ≤ 1."""
    return seen.quantile(1.0 - p), seen.quantile(p)


def mse(seen: Observation, bits: int, *, steps: int = 90, shrink: float = 0.01) -> tuple[Tensor, Tensor]:
    """The range, shrunk towards zero from both ends together, with the least mean squared error.

    Candidates (1 − shrink·i)·[min, max], i = 0 … steps − 1 (OMSE; Choukroun et al. 2019). [G], [G].
    """
    factors = 1.0 - shrink * torch.arange(steps, device=seen.low.device)
    lows, highs = seen.low * factors[:, None], seen.high * factors[:, None]
    return _least_error(seen.values, lows, highs, bits)


def clipping(seen: Observation, bits: int, *, steps: int = 90, shrink: float = 0.01) -> tuple[Tensor, Tensor]:
    """The range, clipped at ±t, with the least mean squared error. [G], [G].

    Candidates t = (1 − shrink·i)·max|x|, i = 0 … steps − 1. The end nearer to zero stays as it is until t reaches it: a
    GELU's outputs, −0.17 to some large number, so keep their negative values, which :func:`mse` shrinks away.
    """
    top = torch.maximum(seen.low.abs(), seen.high.abs())
    ends = top * (1.0 - shrink * torch.arange(steps, device=top.device))[:, None]
    return _least_error(seen.values, torch.maximum(seen.low, -ends), torch.minimum(seen.high, ends), bits)


def quantile_mse(seen: Observation, bits: int, quantiles: Sequence[float] = REPQ_QUANTILES) -> tuple[Tensor, Tensor]:
    """The quantile range with the least mean squared error (RepQ-ViT's scale search). [G], [G].

    For each p: [quantile(1 − p), quantile(p)]. Rows with a single value keep it.
    """
    lows = torch.stack([seen.quantile(1.0 - p) for p in quantiles])
    highs = torch.stack([seen.quantile(p) for p in quantiles])
    return _least_error(seen.values, lows, highs, bits)


def _least_error(values: Tensor, lows: Tensor, highs: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """values [G, m]; lows, highs [candidates, G] -> the best low and high of each row."""
    scale, zero = affine_parameters(lows, highs, bits)
    errors = torch.stack([_squared_error(values, s, z, bits) for s, z in zip(scale, zero, strict=True)])
    best = errors.argmin(dim=0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def _squared_error(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """[G] mean squared error of quantizing rows [G, m] with unsigned codes; one buffer, rows in pieces that stay in
    cache."""
    scale, low = scale[:, None], -zero[:, None].float()
    high = low + (2**bits - 1)
    total = torch.zeros(values.shape[0], dtype=torch.float64, device=values.device)
    piece = max(1, (1 << 18) // values.shape[0])
    for part in values.split(piece, dim=1):
        error = (part / scale).round_()
        error = bounded_(error, low, high).mul_(scale).sub_(part)
        total += error.square_().sum(dim=1)
    return total / values.shape[1]


# -- rule -> quantizer --------------------------------------------------------------------------------------------
def affine(low: Tensor, high: Tensor, bits: int, *, granularity: str = "tensor", axis: int | None = None) -> Uniform:
    """Asymmetric uniform quantizer over [low, high]: [1] for a tensor, [G] along ``axis``."""
    if axis is None:
        low, high = low.reshape(()), high.reshape(())
    scale, zero = affine_parameters(low, high, bits)
    return Uniform(scale, zero, bits, signed=False, granularity=granularity, axis=axis)


def symmetric(low: Tensor, high: Tensor, bits: int, *, granularity: str = "tensor", axis: int | None = None) -> Uniform:
    """Symmetric uniform quantizer over ±max(|low|, |high|)."""
    magnitude = torch.maximum(low.abs(), high.abs())
    if axis is None:
        magnitude = magnitude.reshape(())
    return Uniform(symmetric_parameters(magnitude, bits), None, bits, signed=True, granularity=granularity, axis=axis)


def block_scaled(values: Tensor, bits: int, block: int, *, axis: int = -1) -> BlockScaled:
    """Blocks of ``block`` channels (dimension ``axis`` of ``values``) whose step has the least squared error.

    Candidates clip at 1, 1.125, … 6 root mean squares of a block; for Gaussian values the best are 1.98, 2.37, 2.68 and
    3.31 at 2, 3, 4 and 6 bits.
    """
    steps = torch.linspace(1.0, 6.0, 41) / 2 ** (bits - 1)
    candidates = [BlockScaled(step, bits, block, axis=axis).to(values.device) for step in steps]
    errors = [float((q(values) - values).square_().sum()) for q in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def log_by_quantile(
    seen: Observation, bits: int, *, steps: int = 2, quantiles: Sequence[float] = REPQ_QUANTILES
) -> Log:
    """Log format whose δ is the quantile with the least squared error (RepQ-ViT's search for softmax outputs).

    Values are ≥ 0. A row that is all zero gives δ = 1.
    """
    values = seen.values[0]
    deltas = torch.stack([seen.quantile(p)[0] for p in quantiles])
    deltas = torch.where(deltas > 0, deltas, torch.ones_like(deltas))
    candidates = [Log(delta, bits, steps=steps) for delta in deltas]
    errors = [sum(float((q(part) - part).square_().sum()) for part in values.split(1 << 20)) for q in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]
