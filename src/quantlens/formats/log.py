"""Logarithmic quantization of values in [0, δ] (softmax outputs): levels δ·base^(−k), base 2 or √2.

    k = round(−log_base(x/δ)),   x̂ = δ·base^(−k),   k = 0 … 2ᵇ − 2;   the last code, 2ᵇ − 1, is exact zero.

A value below the smallest level goes to that level or to zero, whichever is nearer: zero is for x < half the smallest
level.

The RepQ-ViT authors' code has 2ᵇ magnitudes *and* zero, that is 2ᵇ + 1 levels, which b bits cannot hold, and sends to
zero whatever is nearer to the next level that it lacks (x < δ·2^(−7.75) for 4 bits and √2).
"""

from __future__ import annotations

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
