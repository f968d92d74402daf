"""Power-of-two factors: channels of very different range share one scale (and zero point), up to a shift each.

    code = clamp(round(x / (s·2^α_c)) + z, qmin, qmax)        x̂ = (code − z)·s·2^α_c

The exponents α_c are small integers ≥ 0, so that an integer kernel brings all channels to the scale s by shifting
``code − z`` left by α_c (FQ-ViT, IJCAI 2022, section 3.2, where α_c lies in 0 … 3). The zero point may also be a
channel's own, z_c: an integer that is subtracted in front of the shift, which centres every channel's codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer, bounded_, needs_grad, round_ste

MAX_EXPONENT = 15
"""Largest exponent: codes of 16 bits, shifted, still fit 32 bits."""


class PowerOfTwo(Quantizer):
    """Uniform format with one scale and zero point for the tensor and a power-of-two factor per index of ``axis``.

    ``PowerOfTwo(scale, exponents, zero_point, bits, signed=False, axis=-1)``

    scale: float32 [], positive and finite, the scale of a channel with exponent 0. exponents: integers [C], 0 to 15.
    zero_point: integers, [] shared or [C] one per channel, which may lie outside the codes; ``None`` for 0. axis: the
    dimension of the channels.

    Raises ValueError for parameters that do not fit.
    """

    kind = "ptf"
    scale: Tensor
    exponents: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: Tensor,
        exponents: Tensor,
        zero_point: Tensor | None,
        bits: int,
        signed: bool = False,
        axis: int = -1,
    ):
        super().__init__(bits, signed=signed, granularity="channel", axis=axis)
        scale = torch.as_tensor(scale, dtype=torch.float32).detach().clone()
        exponents = torch.as_tensor(exponents, device=scale.device).detach()
        zero_point = torch.as_tensor(0 if zero_point is None else zero_point, device=scale.device)
        if scale.dim() != 0 or exponents.dim() != 1:
            raise ValueError("a power-of-two format has one scale and a list of exponents")
        if zero_point.dim() != 0 and zero_point.shape != exponents.shape:
            raise ValueError("a power-of-two format has one zero point, or one per exponent")
        if not bool(torch.isfinite(scale)) or not bool(scale > 0):
            raise ValueError("scale must be positive and finite")
        if not bool(((exponents >= 0) & (exponents <= MAX_EXPONENT)).all()):
            raise ValueError(f"exponents must lie in 0 … {MAX_EXPONENT}")
        self.register_buffer("scale", scale)
        self.register_buffer("exponents", exponents.round().to(torch.uint8).clone())
        self.register_buffer("zero_point", zero_point.round().to(torch.int32).clone())
        factors = torch.exp2(self.exponents.double()).float()
        self.register_buffer("_scales", self.scale * factors, persistent=False)
        if not bool(torch.isfinite(self._scales).all()):
            raise ValueError("scale·2^exponent must be finite")
        self.register_buffer("inverse", (1.0 / self.scale) / factors, persistent=False)
        self.register_buffer("_low", (self.qmin - self.zero_point).float(), persistent=False)
        self.register_buffer("_high", (self.qmax - self.zero_point).float(), persistent=False)
        one = self.zero_point.dim() == 0
        self._bounds = (float(self._low), float(self._high)) if one else None  # type: ignore[arg-type]

    @property
    def scales(self) -> Tensor:
        """float32 [C], s·2^α_c, exactly."""
        return self._scales  # type: ignore[return-value]

    def bounds(self, dims: int) -> tuple[Any, Any]:
        """Smallest and largest code less the zero point: floats, or with a zero point per channel float32 tensors that
        broadcast along :attr:`axis` of a tensor with ``dims`` dimensions."""
        if self._bounds is not None:
            return self._bounds
        return self.spread(self._low, dims), self.spread(self._high, dims)  # type: ignore[arg-type]

    def _levels(self, x: Tensor) -> Tensor:
        """The integers code − z, as float32."""
        levels = (x * self.spread(self.inverse, x.dim())).round_()  # type: ignore[arg-type]
        return bounded_(levels, *self.bounds(x.dim()))

    def _zero(self, dims: int) -> Tensor:
        return self.spread(self.zero_point, dims) if self.zero_point.dim() else self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        scales = self.spread(self.scales, x.dim())
        if needs_grad(x):
            levels = round_ste(x * self.spread(self.inverse, x.dim()))  # type: ignore[arg-type]
            return levels.clamp(*self.bounds(x.dim())) * scales
        return self._levels(x).mul_(scales)

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return (self._levels(x).to(torch.int32) + self._zero(x.dim())).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes.to(torch.int32) - self._zero(codes.dim())).float() * self.spread(self.scales, codes.dim())

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> PowerOfTwo:
        return cls(
            tensors["scale"],
            tensors["exponents"],
            tensors["zero_point"],
            config["bits"],
            signed=config["signed"],
            axis=config["axis"],
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, exponents 0 to {int(self.exponents.max())}"
