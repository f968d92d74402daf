"""Rows of probabilities (softmax outputs) as squares of integers, every row by its own peak and its own sum:

    k = round((2ᵇ − 1)·√(p / max p)),   p̂ = k² / Σ k²     (max and Σ along the row)

There is nothing to calibrate: the peak of a row always gets the largest code, whether the row looks at one token or at
all of them, where one scale for a tensor fits either. Squares lie close together near zero, and rounding the root keeps
what is above a quarter of the smallest one, so that the many small probabilities are not lost together; dividing by the
sum of what is left keeps their whole. Codes alone decide the values: integers k² (of 4 bits at most 225) go into the
product with v, whose rows are then divided by Σ k².
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer


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
