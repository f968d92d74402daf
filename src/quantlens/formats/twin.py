"""Twin uniform quantization: two uniform ranges in one code of b bits (Yuan et al., ECCV 2022, section 3.2).

One bit selects the range, b − 1 bits are the magnitude; every value is coded in exactly one range.

By magnitude (softmax outputs, codes unsigned): Δ1·(0 … 2ᵇ⁻¹ − 1) up to s, then Δ2·(j … 2ᵇ⁻¹ − 1) up to the top, j the
first step beyond s, Δ2 = 2ᵐ·Δ1. A value goes to the nearest level of both; with the paper's boundary at s, what lies
just above s would be rounded below it.

By sign (GELU outputs, codes two's complement): Δ1·(−2ᵇ⁻¹ … −1) and Δ2·(0 … 2ᵇ⁻¹ − 1).

``shift`` is m, by which a product shifts one range's integers before it sums both; by sign it may be missing (None).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer, parameter

MAGNITUDE, SIGN = "magnitude", "sign"


class Twin(Quantizer):
    """Twin uniform format per tensor.

    steps: float32 [2], positive and finite: Δ1 and Δ2. split: what selects the range, "magnitude" or "sign". Raises
    ValueError for steps that a split by magnitude cannot have (Δ2/Δ1 not a power of two, or less than 1),
    UnsupportedError for one bit.
    """

    kind, settings, narrowest = "twin", ("split",), 2  # one bit selects the range

    def __init__(self, steps: Tensor, bits: int, *, split: str):
        if split not in (MAGNITUDE, SIGN):
            raise ValueError(f"split {split!r}: a twin format splits by magnitude or sign")
        super().__init__(bits, signed=split == SIGN)
        steps = parameter("steps", steps, dims=1)
        if len(steps) != 2:
            raise ValueError("steps must be two positive finite numbers")
        self.split = split
        self._hold(steps=steps)
        self._one, self._two = (float(s) for s in steps)
        self._half = 1 << (bits - 1)
        shift = self.shift
        if split == MAGNITUDE:
            if shift is None or shift < 0:
                raise ValueError("a split by magnitude needs a second step of 1, 2, 4 … times the first")
            top = self._half - 1
            self._first = (top >> shift) + 1
            ends = (top * self._one, self._first * self._two)
            self._boundary = math.inf if self._first > top else (ends[0] + ends[1]) / 2

    @classmethod
    def by_magnitude(cls, shift: int, bits: int, *, top: float = 1.0) -> Twin:
        """For values in [0, top]: Δ2 = top/(2ᵇ⁻¹ − 1), Δ1 = Δ2·2^(−shift), ranges [0, s] and (s, top] with s =
        top·2^(−shift)."""
        two = (torch.tensor(top, dtype=torch.float64) / (2 ** (bits - 1) - 1)).float()
        return cls(torch.stack([two * 2.0**-shift, two]), bits, split=MAGNITUDE)

    @classmethod
    def by_sign(cls, negative: float | Tensor, positive: float | Tensor, bits: int) -> Twin:
        """For values of both signs: a step for the negative ones and a step for the others."""
        steps = torch.stack([torch.as_tensor(step, dtype=torch.float32) for step in (negative, positive)])
        return cls(steps, bits, split=SIGN)

    @property
    def shift(self) -> int | None:
        """m if Δ2 = 2ᵐ·Δ1 exactly, else None."""
        mantissa, exponent = math.frexp(self._two / self._one)
        return exponent - 1 if mantissa == 0.5 else None

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value that the format holds."""
        return (-self._half * self._one if self.split == SIGN else 0.0), (self._half - 1) * self._two

    # -- the three verbs --------------------------------------------------------------------------------------------
    def _magnitudes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of ``x`` in range 1 and in range 2, less the bit that selects, as float32."""
        one, two = (x * (1.0 / self._one)).round_(), (x * (1.0 / self._two)).round_()
        if self.split == SIGN:  # one of the two is 0
            return one.clamp_(-self._half, 0), two.clamp_(0, self._half - 1)
        return one.clamp_(0, self._half - 1), two.clamp_(self._first, self._half - 1)

    def _inside(self, x: Tensor) -> Tensor:
        low, high = self.range
        return (x >= low) & (x <= high)

    def _value(self, x: Tensor) -> Tensor:
        one, two = self._magnitudes(x)
        one, two = one.mul_(self._one), two.mul_(self._two)
        return one.add_(two) if self.split == SIGN else torch.where(x > self._boundary, two, one)

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            one, two = self._magnitudes(x)
            codes = one.add_(two) if self.split == SIGN else torch.where(x > self._boundary, two.add_(self._half), one)
            return codes.to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        codes = codes.to(torch.int32)
        if self.split == SIGN:
            return codes.float() * torch.where(codes < 0, self._one, self._two)
        second = codes >= self._half
        return (codes - self._half * second).float() * torch.where(second, self._two, self._one)
