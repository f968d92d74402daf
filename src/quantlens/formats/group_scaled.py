"""Formats whose scales are found when values are quantized: rows of probabilities (below), and groups of channels,
every token's, some (64) at a time, by their own root mean square. For a group x

    e = clamp(round(8·log₂(c·rms(x))), −128, 127),   s = 2^(e/8)
    k = clamp(round(x/s − ½), −2ᵇ⁻¹, 2ᵇ⁻¹ − 1),      x̂ = (k + ½)·s

c, the step as a share of the root mean square, is the only parameter, one per tensor. e is an integer of 8 bits (64
codes of 3 bits and e: 3.125 bits per value). Levels lie on both sides of zero and miss it (mid-rise): all 2ᵇ serve
values that are as often negative as positive. After the OCP Microscaling formats (2023), whose scales are powers of two
and whose groups have 32 values.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer, needs_grad, parameter

PARTS = 8
"""Scales per octave."""

LEAST, MOST = -128, 127
"""Bounds of e."""


class Grouped(Quantizer):
    """A format whose scales belong to groups of channels and are found when values are quantized.

    group_size: channels per group; their number is a multiple of it. axis: the channels' dimension, −1; −2 as in the
    keys [..., C, N] of an attention; −3 as in the maps [B, C, H, W] of a convolution.
    """

    settings: ClassVar[tuple[str, ...]] = ("group_size",)
    dynamic = True

    def __init__(self, scale: Tensor | float, bits: int, group_size: int, *, signed: bool, axis: int):
        super().__init__(bits, signed=signed, granularity="group", axis=axis)
        scale = parameter("scale", scale)
        if axis not in (-1, -2, -3) or group_size < 1:
            raise ValueError(f"group size {group_size}, axis {axis}: at least 1, and one of the last three dimensions")
        self.group_size = group_size
        # a table, because torch.exp2 differs in its last bit between positions in a tensor
        powers = torch.exp2(torch.arange(LEAST, MOST + 1, dtype=torch.float64) / PARTS)
        self._hold(scale=scale)
        self._hold(derived=True, powers=powers.float().to(scale.device))

    def groups(self, x: Tensor) -> Tensor:
        """x [..., C] as [..., G, group_size], channels last; a view where it can be."""
        return x.movedim(self.axis, -1).unflatten(-1, (-1, self.group_size))

    def whole(self, groups: Tensor) -> Tensor:
        """The inverse of :meth:`groups`."""
        return groups.flatten(-2).movedim(-1, self.axis)

    def scales(self, exponents: Tensor) -> Tensor:
        """s = 2^(e/8)."""
        return self.powers[(exponents - LEAST).long()]

    def _joined(self, *parts: Tensor) -> Tensor:
        """Codes of groups, and the integers of groups after them, as integers [..., C + …] along :attr:`axis`."""
        joined = torch.cat([part.flatten(-2) for part in parts], -1)
        return joined.movedim(-1, self.axis).to(self.code_dtype)

    def _apart(self, codes: Tensor, integers: int) -> list[Tensor]:
        """The inverse of :meth:`_joined`: the codes in groups and so many integers of each group, as float32."""
        turned = codes.movedim(self.axis, -1).float()
        count = turned.shape[-1] // (self.group_size + integers)
        levels, *others = turned.split([count * self.group_size, *[count] * integers], -1)
        return [levels.unflatten(-1, (-1, self.group_size)), *(other.unsqueeze(-1) for other in others)]


def exponents_of(size: Tensor) -> Tensor:
    """e of scales near to ``size``, float32 integers; of 0 the least."""
    return size.log2().mul_(PARTS).round_().clamp_(LEAST, MOST).nan_to_num_(0.0)


class GroupScaled(Grouped):
    """Mid-rise uniform format with a scale per group of channels, found at run time.

    scale: float32 [], the step in units of a group's root mean square, positive. group_size, axis: see
    :class:`Grouped`.

    ``encode`` gives, for C channels, codes of C + C/group_size: those of all channels, then the integers e of their
    groups. Only the first C lie in [:attr:`qmin`, :attr:`qmax`].
    """

    kind = "block-scaled"

    def __init__(self, scale: Tensor | float, bits: int, group_size: int, *, axis: int = -1):
        super().__init__(scale, bits, group_size, signed=True, axis=axis)

    def exponents(self, groups: Tensor) -> Tensor:
        """e of every group [..., G, group_size], float32 integers [..., G, 1]."""
        return exponents_of(groups.square().mean(-1, keepdim=True).sqrt_().mul_(self.scale))

    def _levels(self, groups: Tensor, scales: Tensor) -> Tensor:
        return (groups * scales.reciprocal()).sub_(0.5).round_().clamp_(self.qmin, self.qmax)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.groups(x)
        with torch.no_grad():
            scales = self.scales(self.exponents(groups))
            levels = self._levels(groups, scales)
            value = levels.add_(0.5).mul_(scales)
        if needs_grad(x):
            ends = (self.qmin + 0.5) * scales, (self.qmax + 0.5) * scales
            through = torch.minimum(torch.maximum(groups, ends[0]), ends[1])
            value = value + (through - through.detach())
        return self.whole(value)

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            groups = self.groups(x)
            exponents = self.exponents(groups)
            return self._joined(self._levels(groups, self.scales(exponents)), exponents)

    def decode(self, codes: Tensor) -> Tensor:
        levels, exponents = self._apart(codes, 1)
        return self.whole((levels + 0.5).mul_(self.scales(exponents)))

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return super().restore({"group_size": config.get("block"), **config}, tensors)  # the name in older files


# -- rows of probabilities -----------------------------------------------------------------------------------------
# Rows of probabilities (softmax outputs) as squares of integers, every row by its own peak and its own sum:
#
#     k = round((2ᵇ − 1)·√(p / max p)),   p̂ = k² / Σ k²     (max and Σ along the row)
#
# There is nothing to calibrate: the peak of a row always gets the largest code, whether the row looks at one token or
# at all of them, where one scale for a tensor fits either. Squares lie close together near zero, and rounding the
# root keeps what is above a quarter of the smallest one, so that the many small probabilities are not lost together;
# dividing by the sum of what is left keeps their whole. Codes alone decide the values: integers k² (of 4 bits at most
# 225) go into the product with v, whose rows are then divided by Σ k².


class SqrtSoftmax(Quantizer):
    """Format of values ≥ 0 whose rows (last dimension) sum to one. It has no parameters."""

    kind, dynamic = "squared-rows", True

    def __init__(self, bits: int):
        super().__init__(bits, signed=False, granularity="token", axis=-2)

    def _index(self, x: Tensor) -> Tensor:
        """Codes as float32; a row of zeros gets zeros."""
        roots = x.clamp_min(0.0).sqrt_()
        peak = roots.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        return roots.mul_(self.qmax / peak).round_().nan_to_num_(0.0)

    def _value(self, x: Tensor) -> Tensor:
        return self.decode(self._index(x))

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._index(x).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        k = codes.float()
        squares = k * k
        return squares.div_(squares.sum(-1, keepdim=True).clamp_min_(1.0))
