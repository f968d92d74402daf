"""Range rules: statistics -> [low, high] or parameters of a format. Pure functions of an :class:`Observation`.

Every rule takes G rows and gives G results; nothing here knows of models or sites.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from quantlens.calibration.passes import Observation
from quantlens.formats import (
    GroupAffine,
    GroupScaled,
    Log,
    PowerOfTwo,
    Quantizer,
    Uniform,
    affine_parameters,
    bounded_,
    symmetric_parameters,
)

Q = TypeVar("Q", bound=Quantizer)

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
    return _least_error(seen, lows, highs, bits)


def clipping(seen: Observation, bits: int, *, steps: int = 90, shrink: float = 0.01) -> tuple[Tensor, Tensor]:
    """The range, clipped at ±t, with the least mean squared error. [G], [G].

    Candidates t = (1 − shrink·i)·max|x|, i = 0 … steps − 1. The end nearer to zero stays as it is until t reaches it: a
    GELU's outputs, −0.17 to some large number, so keep their negative values, which :func:`mse` shrinks away.
    """
    top = torch.maximum(seen.low.abs(), seen.high.abs())
    ends = top * (1.0 - shrink * torch.arange(steps, device=top.device))[:, None]
    return _least_error(seen, torch.maximum(seen.low, -ends), torch.minimum(seen.high, ends), bits)


def quantile_mse(seen: Observation, bits: int, quantiles: Sequence[float] = REPQ_QUANTILES) -> tuple[Tensor, Tensor]:
    """The quantile range with the least mean squared error (RepQ-ViT's scale search). [G], [G].

    For each p: [quantile(1 − p), quantile(p)]. Rows with a single value keep it.
    """
    lows = torch.stack([seen.quantile(1.0 - p) for p in quantiles])
    highs = torch.stack([seen.quantile(p) for p in quantiles])
    return _least_error(seen, lows, highs, bits)


def _least_error(seen: Observation, lows: Tensor, highs: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """lows, highs [candidates, G] -> the best low and high of each row."""
    best = _errors(seen, *affine_parameters(lows, highs, bits), bits).argmin(dim=0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def _errors(seen: Observation, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """:func:`squared_errors` of all that was seen.

    A sample holds few of a row's extreme values, most often too few, and so prefers ranges that clip them. Here it
    tells the error of values clamped to the inner ends of the tails; what the tails add to that is exact.
    """
    if seen.values.shape[1] == seen.count:
        return squared_errors(seen.values, scale, zero, bits)
    ends = [tail[:, -1:] for tail in (seen.lower, seen.upper)]
    total = squared_errors(seen.values.clamp(*ends), scale, zero, bits)
    for tail, end in zip((seen.lower, seen.upper), ends, strict=True):
        added = squared_errors(tail, scale, zero, bits) - squared_errors(end, scale, zero, bits)
        total += added * (tail.shape[1] / seen.count)
    return total


def squared_errors(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """[candidates, G] float64: mean squared error of quantizing rows [G, m] with unsigned codes of ``bits`` bits, for
    every candidate scale and zero point [candidates, G]."""
    many = len(scale) > 8 and values.shape[1] > 64 * 2**bits  # a look-up takes as long as some 40 quantized values
    return (_by_sorting if many else _by_quantizing)(values, scale, zero, bits)


PIECE = 1 << 18
"""Values that are quantized together, so that they stay in cache; look-ups that are made together."""


def _by_quantizing(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """:func:`squared_errors`, by quantizing the values with every candidate."""
    inverse, low = (1.0 / scale)[..., None], -zero[..., None].float()
    high = low + (2**bits - 1)
    total = torch.zeros(scale.shape, dtype=torch.float64, device=values.device)
    step = max(1, PIECE // values.shape[1])
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        for part in values[rows].split(PIECE, dim=1):
            exact, error = torch.empty_like(part), torch.empty_like(part)
            for i in range(len(scale)):  # in units of the scale
                torch.mul(part, inverse[i, rows], out=exact)
                bounded_(torch.round(exact, out=error), low[i, rows], high[i, rows]).sub_(exact)
                total[i, rows] += error.square_().sum(dim=1)
    return total * scale.double().square() / values.shape[1]


def _by_sorting(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """:func:`squared_errors`, from sums over the sorted values, in float64.

    With S and c sum and count of a row's values below the midpoint b of two neighbouring levels, s the scale and t the
    largest level, Σ(x̂ − x)² is Σx² − 2t·Σx + mt² + 2s·Σ(S − c·b), the last sum over all midpoints.
    """
    codes = torch.arange(2**bits - 1, device=values.device, dtype=torch.float64) + 0.5
    step = max(1, PIECE // (len(scale) * len(codes)))
    found = []
    for part, s, z in zip(values.split(step), scale.double().T.split(step), zero.double().T.split(step), strict=True):
        ordered = _sorted(part)
        wide = ordered.double()
        mean = wide.mean(1, keepdim=True)  # sums of values far from zero would lose their digits
        wide -= mean
        middles = ((codes - z[..., None]) * s[..., None]).flatten(1)
        count = torch.searchsorted(ordered, middles.to(ordered.dtype))
        sums = torch.nn.functional.pad(wide.cumsum(1), (1, 0))
        inner = (sums.gather(1, count) - count * (middles - mean)).view(*s.shape, -1).sum(-1)
        top = (len(codes) - z) * s - mean
        total = wide.square_().sum(1, keepdim=True) - 2 * top * sums[:, -1:] + ordered.shape[1] * top.square()
        found.append((total + 2 * s * inner) / ordered.shape[1])
    return torch.cat(found).T


def _sorted(rows: Tensor) -> Tensor:
    """Rows in ascending order. On a CPU, numpy sorts float32 in a tenth of the time that torch takes."""
    if rows.device.type != "cpu":
        return rows.sort(dim=1).values
    return torch.from_numpy(np.sort(rows.detach().numpy(), axis=1))


# -- rule -> quantizer --------------------------------------------------------------------------------------------
def affine(low: Tensor, high: Tensor, bits: int, *, granularity: str = "tensor", axis: int | None = None) -> Uniform:
    """Asymmetric uniform quantizer over [low, high]: [1] for a tensor, [G] along ``axis``."""
    scale, zero = (p.reshape(() if axis is None else p.shape) for p in affine_parameters(low, high, bits))
    return Uniform(scale, zero, bits, signed=False, granularity=granularity, axis=axis)


def symmetric(low: Tensor, high: Tensor, bits: int, *, granularity: str = "tensor", axis: int | None = None) -> Uniform:
    """Symmetric uniform quantizer over ±max(|low|, |high|)."""
    scale = symmetric_parameters(torch.maximum(low.abs(), high.abs()), bits)
    scale = scale.reshape(() if axis is None else scale.shape)
    return Uniform(scale, None, bits, signed=True, granularity=granularity, axis=axis)


def closest(candidates: Iterable[Q], values: Tensor) -> Q:
    """The quantizer with the least squared error, the first of equal ones."""
    parts = values.split(1 << 20)
    return min(candidates, key=lambda q: sum(float((q(part) - part).square_().sum()) for part in parts))


def block_scaled(values: Tensor, bits: int, block: int, *, axis: int = -1) -> GroupScaled:
    """Blocks of ``block`` channels (dimension ``axis`` of ``values``) whose step has the least squared error.

    Candidates clip at 1, 1.125, … 6 root mean squares of a block; for Gaussian values the best are 1.98, 2.37, 2.68 and
    3.31 at 2, 3, 4 and 6 bits.
    """
    steps = torch.linspace(1.0, 6.0, 41) / 2 ** (bits - 1)
    return closest((GroupScaled(step, bits, block, axis=axis).to(values.device) for step in steps), values)


def group_affine(values: Tensor, bits: int, size: int, *, axis: int = -1) -> GroupAffine:
    """Groups of ``size`` channels (dimension ``axis`` of ``values``) by their own range, each with the best of three
    scales, whose step has the least squared error: candidates are 0.8, 0.85, … 1.3 of the range's share."""
    steps = torch.linspace(0.8, 1.3, 11) / (2**bits - 1)
    return closest((GroupAffine(step, bits, size, axis=axis, tries=3).to(values.device) for step in steps), values)


def log_by_quantile(
    seen: Observation, bits: int, *, steps: int = 2, quantiles: Sequence[float] = REPQ_QUANTILES
) -> Log:
    """Log format whose δ is the quantile with the least squared error (RepQ-ViT's search for softmax outputs).

    Values are ≥ 0. A row that is all zero gives δ = 1.
    """
    deltas = torch.stack([seen.quantile(p)[0] for p in quantiles])
    deltas = torch.where(deltas > 0, deltas, torch.ones_like(deltas))
    return closest((Log(delta, bits, steps=steps) for delta in deltas), seen.values[0])


# -- power-of-two factors ------------------------------------------------------------------------------------------
# Power-of-two factors for channels of different range (FQ-ViT, section 3.2).


LARGEST = 3
"""K: exponents are 0 … K."""
ZERO_POINTS = 8
"""Zero points tried besides that of the whole range: i/8 of the codes, i = 1 … 7."""


EPSILON = 0.01
"""ε of :func:`token_weights` as a share of the mean variance."""


def token_weights(seen: Observation) -> Tensor:
    """[m] weights 1/(v_t + ε) of the tokens in a sample of a residual stream, of mean 1; v_t the variance over the
    token's channels, ε = :data:`EPSILON` of its mean.

    A LayerNorm divides a token's error by its deviation, so that this weighs errors as what reads them does. A few
    tokens of extreme norm otherwise decide alone which shift their channel gets, at the cost of every other token.

    seen: one row per channel, whose columns are tokens (the sample of an :class:`Observer` is; it picks columns).
    """
    variance = seen.values.var(0, unbiased=False)
    weights = 1.0 / (variance + EPSILON * variance.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return weights / weights.mean()


def power_of_two_factors(
    seen: Observation, bits: int, *, largest: int = LARGEST, zero_points: int = ZERO_POINTS, axis: int = -1
) -> PowerOfTwo:
    """The format whose channels' exponents have the least squared error each (eq. 8 and 9 of the paper).

    seen: one row per channel. For a zero point, the scale of exponent ``largest`` is the smallest that covers the whole
    range [low, high], zero taken in, over all channels; that of exponent 0 is 2^(−largest) of it. Of the zero point of
    the whole range and ``zero_points`` − 1 others, the one with the least squared error over all channels is taken: the
    whole range is often that of one channel, to one side, and its zero point leaves the other side of all other
    channels a few codes.
    """
    low, high = seen.low.min().double().clamp_max(0.0), seen.high.max().double().clamp_min(0.0)
    top = 2**bits - 1
    whole = int(affine_parameters(low, high, bits)[1])
    choices: list[tuple[float, Tensor, int, Tensor]] = []
    for zero in dict.fromkeys([whole, *(round(top * i / zero_points) for i in range(1, zero_points))]):
        if zero_points > 1 and ((zero == 0 and low < 0) or (zero == top and high > 0)):
            continue  # no code for that side
        scale = torch.maximum(high / max(top - zero, 1), -low / max(zero, 1))
        base = (torch.where(scale > 0, scale, torch.ones_like(scale)) * 2.0**-largest).float()
        base = base.clamp_min(torch.finfo(torch.float32).tiny * 4)
        values, bounds = seen.values * (1.0 / base), (float(-zero), float(top - zero))
        levels = [(values * 2.0**-k).round_().clamp_(*bounds).mul_(2.0**k) for k in range(largest + 1)]
        errors = torch.stack([rounded.sub_(values).square_().mean(1) for rounded in levels])
        least, exponents = errors.min(0)
        choices.append((float(least.double().sum()) * float(base) ** 2, base, zero, exponents))
    _, base, zero, exponents = min(choices, key=lambda choice: choice[0])
    return PowerOfTwo(base, exponents, torch.tensor(zero, device=base.device), bits, signed=False, axis=axis)
