"""AdaLog: logarithmic quantization with a base that adapts (Wu et al., ECCV 2024, section 3.2): levels δ·2^(−c·q/37).

q is an integer, so that the exponent of a code c has one of 37 fractions. A table holds 2^(−j/37), j = 0 … 36, as
fixed-point numbers, and a level is a table entry shifted right:

    x̂ = δ·T[(c·q) mod 37]·2^(−⌊c·q/37⌋),     c = 0 … 2ᵇ − 2;     the last code, 2ᵇ − 1, is zero.

q = 37 is base 2 and q = 18 close to √2; a smaller q is finer, and reaches less deep. With a shift t the format holds
values from −t: x + t is coded, and t subtracted (GELU outputs, t = 0.17). After the product with a weight Ŵ, t is one
number per output channel, −t·Σ Ŵ, which a runtime adds to the bias once (the paper's bias reparametrisation).

Here the table has 8 fractional bits at any width of codes; the authors' has multiples of 1/(2ᵇ⁺¹ − 2), which at 2 and 3
bits are too coarse for the codes to be told apart. Their format has 2ᵇ magnitudes and zero, which b bits cannot hold;
for this and for the boundary to zero see :mod:`quantlens.formats.log`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlens.formats.base import parameter
from quantlens.formats.log import Log

RESOLUTION = 37
"""r: the base is 2^(q/r)."""

FRACTION = 8
"""Fractional bits of the table."""


class AdaLog(Log):
    """Log format per tensor with base 2^(q/37).

    delta: float32 [] > 0, the value (before the shift) of code 0. numerator: q ≥ 1. shift: float32 [], subtracted from
    every level.
    """

    kind, settings = "adalog", ("numerator",)

    def __init__(self, delta: Tensor, bits: int, *, numerator: int, shift: Tensor | float = 0.0):
        if numerator < 1:
            raise ValueError("the numerator q of the base 2^(q/37) must be at least 1")
        super().__init__(delta, bits, steps=RESOLUTION / numerator, levels=adaptive_levels(numerator, bits))
        self.numerator = numerator
        self._hold(shift=parameter("shift", shift, positive=False).to(self.delta.device))
        self._top -= float(self.shift)
        self._shifted = bool(self.shift != 0)

    @property
    def base(self) -> float:
        return 2.0 ** (self.numerator / RESOLUTION)

    def _index(self, x: Tensor) -> Tensor:
        return super()._index(x + self.shift if self._shifted else x)

    def decode(self, codes: Tensor) -> Tensor:
        values = super().decode(codes)
        return values.sub_(self.shift) if self._shifted else values


def adaptive_levels(numerator: int, bits: int) -> Tensor:
    """float64 [2ᵇ] what the codes multiply δ by: T[(c·q) mod 37]·2^(−⌊c·q/37⌋); the last is 0."""
    table = torch.exp2(-torch.arange(RESOLUTION, dtype=torch.float64) / RESOLUTION)
    table = (table * 2**FRACTION).round() / 2**FRACTION
    exponent = torch.arange(2**bits) * numerator
    levels = table[exponent % RESOLUTION] * torch.exp2(-(exponent // RESOLUTION).double())
    levels[-1] = 0.0
    return levels
