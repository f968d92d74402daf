"""Logarithmic quantization of values in [0, δ] (softmax outputs): levels δ·base^(−k), base 2 or √2.

    k = round(−log_base(x/δ)),   x̂ = δ·base^(−k),   k = 0 … 2ᵇ − 2;   the last code, 2ᵇ − 1, is exact zero.

A value below the smallest level goes to that level or to zero, whichever is nearer: zero is for x < half the smallest
level.

The RepQ-ViT authors' code has 2ᵇ magnitudes *and* zero, that is 2ᵇ + 1 levels, which b bits cannot hold, and sends to
zero whatever is nearer to the next level that it lacks (x < δ·2^(−7.75) for 4 bits and √2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer, needs_grad


class Log(Quantizer):
    """Log format per tensor. delta: float32 [] > 0, the value of code 0. base: 2 or √2 (``steps`` = 1 or 2 codes an
    octave)."""

    kind = "log"
    delta: Tensor
    steps: float

    def __init__(self, delta: Tensor, bits: int, *, steps: int = 1):
        super().__init__(bits, signed=False)
        if steps not in (1, 2):
            raise ValueError("steps (codes per octave) must be 1 (log2) or 2 (log√2)")
        if bits < 2:
            raise ValueError("a log format needs at least 2 bits")
        self._prepare(delta, steps, torch.exp2(-torch.arange(2**bits, dtype=torch.float64) / steps))

    def _prepare(self, delta: Tensor, steps: float, levels: Tensor) -> None:
        """Take δ, the codes per octave and what the codes multiply δ by, float64 [2ᵇ] (the last one becomes 0)."""
        delta = torch.as_tensor(delta, dtype=torch.float32).detach().clone()
        if delta.dim() != 0 or not bool(torch.isfinite(delta)) or not bool(delta > 0):
            raise ValueError("delta must be one positive finite number")
        self.steps = steps
        self.register_buffer("delta", delta)
        table = self.delta * levels.float().to(delta.device)
        table[-1] = 0.0
        self.register_buffer("levels", table, persistent=False)
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

    def forward(self, x: Tensor) -> Tensor:
        if needs_grad(x):
            with torch.no_grad():
                codes = self.encode(x)
                value = self.decode(codes)
                inside = ((x <= self._top) & (codes != self.qmax)).to(x.dtype)
            return value + (x - x.detach()) * inside
        return self.decode(self._index(x).to(torch.int32))

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._index(x).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.index_select(self.levels, 0, codes.to(torch.int32).reshape(-1)).view(codes.shape)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "steps": self.steps}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Log:
        return cls(tensors["delta"], config["bits"], steps=config["steps"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base {'2' if self.steps == 1 else '√2'}"
