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

import torch
from torch import Tensor

from quantlens.formats.base import parameter
from quantlens.formats.log import Table


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
    def covering(cls, eta: float, values: Tensor, bits: int) -> ShiftedLog:
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
