"""Small floating-point numbers: a sign, exponent bits E and mantissa bits M, as OCP defines them (FP8, 2023; MX, 2023).

    E > 0:  (−1)^S · 2^(E − bias) · (1 + M/2^m)        E = 0:  (−1)^S · 2^(1 − bias) · M/2^m

Conversion rounds to nearest, ties to even, and saturates: what lies beyond the largest value, ±∞ too, becomes it. NaN
stays NaN in FP8, with its sign; the narrower ones have no code for it. −0 and what rounds to it keep their sign.
MXINT8's element is an integer of two's complement in 1/64, of which −128 is read and not written.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

EXPONENT = 0x7F800000
"""The exponent bits of float32."""


@dataclass(frozen=True)
class Element:
    """A number of a sign, ``exponent`` and ``mantissa`` bits; without exponent bits an integer in units of 2^−mantissa.

    largest: the largest finite value. infinite: whether the largest exponent is for ±∞ and NaN, as in IEEE 754.
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    largest: float
    infinite: bool = False

    @property
    def bits(self) -> int:
        return 1 + max(self.exponent, 1) + self.mantissa

    @property
    def least(self) -> int:
        """Exponent of the smallest normal number; of an integer, of one."""
        return 1 - self.bias

    @property
    def most(self) -> int:
        """Exponent of the largest number: emax."""
        return math.frexp(self.largest)[1] - 1

    @property
    def not_a_number(self) -> int:
        """The code that NaN gets, without its sign; 0 where there is none."""
        return 0x7F if self.bits == 8 and self.exponent else 0

    def round(self, x: Tensor) -> Tensor:
        """The nearest values, float32, of float32; NaN stays."""
        v = x.clamp(-self.largest, self.largest)
        # v + 1.5·2^k − 1.5·2^k is v in steps of 2^(k − 23), ties to even: here those of v's own exponent
        step = (v.view(torch.int32) & EXPONENT).view(torch.float32)
        step.clamp_(2.0**self.least, 2.0**self.most).mul_(1.5 * 2.0 ** (23 - self.mantissa))
        v.add_(step).sub_(step)
        return torch.copysign(v, x, out=v) if self.exponent else v

    def encode(self, x: Tensor) -> Tensor:
        """Bit patterns, uint8 in the low bits, of the nearest values to float32 ``x``. NaN without a code becomes 0."""
        value = self.round(x)
        if not self.exponent:
            return value.mul_(2.0**self.mantissa).nan_to_num_(0.0).to(torch.int8).view(torch.uint8)
        size, bits = value.abs(), value.view(torch.int32) & 0x7FFFFFFF
        normal = (bits >> (23 - self.mantissa)) - ((127 - self.bias) << self.mantissa)
        below = (size.clamp_max(2.0**self.least) * 2.0 ** (self.mantissa - self.least)).to(torch.int32)
        code = torch.where(size >= 2.0**self.least, normal, below)
        code = torch.where(value.isnan(), self.not_a_number, code)
        negative = torch.signbit(value) & (~value.isnan() | bool(self.not_a_number))
        return (code | (negative.int() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of bit patterns."""
        return self.table(codes.device)[codes.long()]

    def table(self, device: torch.device) -> Tensor:
        """float32 [2^bits]: the value of every bit pattern."""
        return _table(self, device)


@cache
def _table(element: Element, device: torch.device) -> Tensor:
    codes = torch.arange(1 << element.bits)
    if not element.exponent:
        return codes.to(torch.int8).float().mul_(2.0**-element.mantissa).to(device)
    half, fractions = 1 << (element.bits - 1), 1 << element.mantissa
    magnitude, negative = codes % half, codes >= half
    power, fraction = magnitude // fractions, (magnitude % fractions).double() / fractions
    powers = torch.exp2((power.clamp_min(1) - element.bias).double())
    value = powers * torch.where(power > 0, 1 + fraction, fraction)
    if element.infinite:
        last = power == (1 << element.exponent) - 1
        value = torch.where(last, torch.where(fraction == 0, math.inf, math.nan), value)
    else:
        value = torch.where(value > element.largest, math.nan, value)
    return torch.where(negative, -value, value).float().to(device)


ELEMENTS = {
    one.name: one
    for one in (
        Element("E4M3", 4, 3, 7, 448.0),
        Element("E5M2", 5, 2, 15, 57344.0, infinite=True),
        Element("E2M3", 2, 3, 1, 7.5),
        Element("E3M2", 3, 2, 3, 28.0),
        Element("E2M1", 2, 1, 1, 6.0),
        Element("INT8", 0, 6, 1, 127 / 64),
    )
}
"""The element formats by name. INT8: a sign, a bit of one and 6 bits below it."""
