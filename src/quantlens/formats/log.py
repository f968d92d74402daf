"""Logarithmic quantization of values in [0, δ] (softmax outputs): levels δ·base^(−k), base 2 or √2.

    k = round(−log_base(x/δ)),   x̂ = δ·base^(−k),   k = 0 … 2ᵇ − 2;   the last code, 2ᵇ − 1, is exact zero.

A value below the smallest level goes to that level or to zero, whichever is nearer: zero is for x < half the smallest
level.

The RepQ-ViT authors' code has 2ᵇ magnitudes *and* zero, that is 2ᵇ + 1 levels, which b bits cannot hold, and sends to
zero whatever is nearer to the next level that it lacks (x < δ·2^(−7.75) for 4 bits and √2).
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer, parameter


class Table(Quantizer):
    """A format per tensor whose codes are positions in a table of values, the buffer ``levels`` [2ᵇ]."""

    @abstractmethod
    def _index(self, x: Tensor) -> Tensor:
        """Codes as float32."""

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._index(x).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.index_select(self.levels, 0, codes.to(torch.int32).reshape(-1)).view(codes.shape)

    def _value(self, x: Tensor) -> Tensor:
        return self.decode(self._index(x).to(torch.int32))


class Log(Table):
    """Log format per tensor. delta: float32 [] > 0, the value of code 0. steps: codes per octave, 1 (base 2) or 2 (√2).

    levels: what the codes multiply δ by, float64 [2ᵇ], where they are no such powers (the last one becomes 0).
    """

    kind, settings, narrowest = "log", ("steps",), 2

    def __init__(self, delta: Tensor, bits: int, *, steps: float = 1, levels: Tensor | None = None):
        super().__init__(bits, signed=False)
        if levels is None and steps not in (1, 2):
            raise ValueError("steps (codes per octave) must be 1 (log2) or 2 (log√2)")
        if levels is None:
            levels = torch.exp2(-torch.arange(2**bits, dtype=torch.float64) / steps)
        delta = parameter("delta", delta)
        table = delta * levels.float().to(delta.device)
        table[-1] = 0.0
        self._hold(delta=delta)
        self._hold(derived=True, levels=table)
        self.steps = steps
        self.offset = steps * math.log2(float(delta))
        self._top = float(delta)

    @property
    def base(self) -> float:
        return 2.0 ** (1.0 / self.steps)

    def _index(self, x: Tensor) -> Tensor:
        """Codes as float32. x ≤ 0 gives the zero code, x ≥ δ gives 0."""
        last = float(self.qmax - 1)
        k = torch.log2(x).mul_(-float(self.steps)).add_(self.offset).nan_to_num_(nan=math.inf, posinf=math.inf)
        is_zero = k > last + self.steps
        return k.round_().clamp_(0.0, last).add_(is_zero)

    def _inside(self, x: Tensor) -> Tensor:
        return (x <= self._top) & (self.encode(x) != self.qmax)


# -- AdaLog --------------------------------------------------------------------------------------------------------
# AdaLog: logarithmic quantization with a base that adapts (Wu et al., ECCV 2024, section 3.2): levels δ·2^(−c·q/37).
#
# q is an integer, so that the exponent of a code c has one of 37 fractions. A table holds 2^(−j/37), j = 0 … 36, as
# fixed-point numbers, and a level is a table entry shifted right:
#
#     x̂ = δ·T[(c·q) mod 37]·2^(−⌊c·q/37⌋),     c = 0 … 2ᵇ − 2;     the last code, 2ᵇ − 1, is zero.
#
# q = 37 is base 2 and q = 18 close to √2; a smaller q is finer, and reaches less deep. With a shift t the format holds
# values from −t: x + t is coded, and t subtracted (GELU outputs, t = 0.17). After the product with a weight Ŵ, t is one
# number per output channel, −t·Σ Ŵ, which a runtime adds to the bias once (the paper's bias reparametrisation).
#
# Here the table has 8 fractional bits at any width of codes; the authors' has multiples of 1/(2ᵇ⁺¹ − 2), which at 2
# and 3 bits are too coarse for the codes to be told apart. Their format has 2ᵇ magnitudes and zero, which b bits
# cannot hold; for this and for the boundary to zero see above.


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


# -- shifted log ---------------------------------------------------------------------------------------------------
# Shift-uniform-log2 quantization of softmax outputs (I&S-ViT, Zhong et al., 2023, section 3.2).
#
# A shift η before the logarithm makes small values take part, and a uniform quantizer of the logarithm uses the codes
# where the values are:
#
#     code = clamp(round((log2(x + η) − m)/Δ), 0, 2ᵇ − 1),   Δ = (M − m)/(2ᵇ − 1)
#     x̂    = 2^e(code) − η,                                   e(code) = round(code·Δ + m)
#
# [m, M] is the range of log2(x + η). The exponents e are integers, so that a product with x̂ is a shift, and η comes
# back as one constant: Σ x̂·v = Σ 2^e·v − η·Σ v. Where Δ < 1, neighbouring codes may share an exponent: there are
# then fewer values than codes.


class ShiftedLog(Table):
    """Shift-uniform-log2 format per tensor.

    eta: float32 [] > 0, η. low, high: float32 [], m and M, finite, m ≤ M; ValueError for others. exponents: int32
    [2ᵇ], e(code).
    """

    kind = "shifted-log2"

    def __init__(self, eta: Tensor, low: Tensor, high: Tensor, bits: int):
        super().__init__(bits, signed=False)
        eta = parameter("eta", eta)
        low, high = (parameter(name, end, positive=False) for name, end in (("low", low), ("high", high)))
        span = float(high) - float(low)
        if span < 0:
            raise ValueError("low must be no larger than high")
        self._step = span / self.qmax if span > 0 else 1.0
        exponents = (torch.arange(2**bits, dtype=torch.float64) * self._step + float(low)).round()
        levels = (torch.exp2(exponents) - float(eta)).to(eta.device, torch.float32)
        self._hold(eta=eta, low=low, high=high)
        self._hold(derived=True, exponents=exponents.to(eta.device, torch.int32), levels=levels)

    @classmethod
    def covering(cls, eta: float, values: Tensor, bits: int) -> "ShiftedLog":
        """The format whose range is that of ``values`` (≥ 0, any shape)."""
        ends = torch.stack([values.min(), values.max()]).clamp_min(0.0) + eta
        low, high = ends.log2()
        return cls(torch.tensor(eta, device=values.device), low, high, bits)

    def _logarithm(self, x: Tensor) -> Tensor:
        return (x + self.eta).clamp_min_(torch.finfo(torch.float32).tiny).log2_()

    def _index(self, x: Tensor) -> Tensor:
        return self._logarithm(x).sub_(self.low).mul_(1.0 / self._step).round_().clamp_(0.0, float(self.qmax))

    def _inside(self, x: Tensor) -> Tensor:
        logarithm = self._logarithm(x)
        return (logarithm >= self.low) & (logarithm <= self.high)
