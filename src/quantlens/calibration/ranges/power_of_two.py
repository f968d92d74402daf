"""Power-of-two factors for channels of different range (FQ-ViT, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlens.calibration.observers import Observation
from quantlens.formats import PowerOfTwo, affine_parameters

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
        errors = torch.stack([_error(values, 2.0**k, bounds) for k in range(largest + 1)])
        least, exponents = errors.min(0)
        choices.append((float(least.double().sum()) * float(base) ** 2, base, zero, exponents))
    _, base, zero, exponents = min(choices, key=lambda choice: choice[0])
    return PowerOfTwo(base, exponents, torch.tensor(zero, device=base.device), bits, signed=False, axis=axis)


def _error(values: Tensor, factor: float, bounds: tuple[float, float]) -> Tensor:
    """[G] mean squared error of rows [G, m] in units of the base scale."""
    return (values * (1.0 / factor)).round_().clamp_(*bounds).mul_(factor).sub_(values).square_().mean(1)
