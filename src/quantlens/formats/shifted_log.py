"""Shift-uniform-log2 quantization of softmax outputs (I&S-ViT, Zhong et al., 2023, section 3.2).

A shift η before the logarithm makes small values take part, and a uniform quantizer of the logarithm uses the codes
where the values are:

    code = clamp(round((log2(x + η) − m)/Δ), 0, 2ᵇ − 1),   Δ = (M − m)/(2ᵇ − 1)
    x̂    = 2^e(code) − η,                                   e(code) = round(code·Δ + m)

[m, M] is the range of log2(x + η). The exponents e are integers, so that a product with x̂ is a shift, and η comes back
as one constant: Σ x̂·v = Σ 2^e·v − η·Σ v. Where Δ < 1, neighbouring codes may share an exponent: there are then fewer
values than codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer, needs_grad


class ShiftedLog(Quantizer):
    """Shift-uniform-log2 format per tensor.

    eta: float32 [] > 0, η. low, high: float32 [], m and M, finite, m ≤ M; ValueError for others. exponents: int32
    [2ᵇ], e(code).
    """

    kind = "shifted-log2"
    eta: Tensor
    low: Tensor
    high: Tensor
    exponents: Tensor

    def __init__(self, eta: Tensor, low: Tensor, high: Tensor, bits: int):
        super().__init__(bits, signed=False)
        for name, value in (("eta", eta), ("low", low), ("high", high)):
            value = torch.as_tensor(value, dtype=torch.float32).detach().clone()
            if value.dim() != 0 or not bool(torch.isfinite(value)):
                raise ValueError(f"{name} must be one finite number")
            self.register_buffer(name, value)
        if not bool(self.eta > 0) or not bool(self.low <= self.high):
            raise ValueError("eta must be positive, and low no larger than high")
        span = float(self.high) - float(self.low)
        self._step = span / self.qmax if span > 0 else 1.0
        exponents = (torch.arange(2**bits, dtype=torch.float64) * self._step + float(self.low)).round()
        table = torch.exp2(exponents) - float(self.eta)
        self.register_buffer("exponents", exponents.to(self.eta.device, torch.int32), persistent=False)
        self.register_buffer("levels", table.to(self.eta.device, torch.float32), persistent=False)

    @classmethod
    def covering(cls, eta: float, values: Tensor, bits: int) -> ShiftedLog:
        """The format whose range is that of ``values`` (≥ 0, any shape)."""
        ends = torch.stack([values.min(), values.max()]).clamp_min(0.0) + eta
        low, high = ends.log2()
        return cls(torch.tensor(eta, device=values.device), low, high, bits)

    def _index(self, x: Tensor) -> Tensor:
        """Codes as float32."""
        logarithm = torch.log2((x + self.eta).clamp_min_(torch.finfo(torch.float32).tiny))
        return logarithm.sub_(self.low).mul_(1.0 / self._step).round_().clamp_(0.0, float(self.qmax))

    def forward(self, x: Tensor) -> Tensor:
        if needs_grad(x):
            with torch.no_grad():
                value = self.decode(self.encode(x))
                logarithm = torch.log2((x + self.eta).clamp_min(torch.finfo(torch.float32).tiny))
                inside = ((logarithm >= self.low) & (logarithm <= self.high)).to(x.dtype)
            return value + (x - x.detach()) * inside
        return self.decode(self._index(x).to(torch.int32))

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._index(x).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.index_select(self.levels, 0, codes.to(torch.int32).reshape(-1)).view(codes.shape)

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> ShiftedLog:
        return cls(tensors["eta"], tensors["low"], tensors["high"], config["bits"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, η {float(self.eta):.3g}"
