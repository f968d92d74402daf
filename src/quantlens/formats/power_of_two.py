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

from quantlens.formats.base import parameter
from quantlens.formats.uniform import Affine

MAX_EXPONENT = 15
"""Largest exponent: codes of 16 bits, shifted, still fit 32 bits."""


class PowerOfTwo(Affine):
    """Uniform format with one scale and zero point for the tensor and a power-of-two factor per index of ``axis``.

    ``PowerOfTwo(scale, exponents, zero_point, bits, signed=False, axis=-1)``

    scale: float32 [], positive and finite, the scale of a channel with exponent 0. exponents: integers [C], 0 to 15.
    zero_point: integers, [] shared or [C] one per channel, which may lie outside the codes; ``None`` for 0. axis: the
    dimension of the channels.

    Raises ValueError for parameters that do not fit.
    """

    kind = "ptf"

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
        scale = parameter("scale", scale)
        exponents = torch.as_tensor(exponents, device=scale.device).detach()
        zero_point = torch.as_tensor(0 if zero_point is None else zero_point, device=scale.device)
        if exponents.dim() != 1 or not bool(((exponents >= 0) & (exponents <= MAX_EXPONENT)).all()):
            raise ValueError(f"exponents must be a list of numbers in 0 … {MAX_EXPONENT}")
        if zero_point.dim() != 0 and zero_point.shape != exponents.shape:
            raise ValueError("a power-of-two format has one zero point, or one per exponent")
        exponents, zero_point = exponents.round().to(torch.uint8).clone(), zero_point.round().to(torch.int32).clone()
        factors = torch.exp2(exponents.double()).float()
        self._hold(scale=scale, exponents=exponents, zero_point=zero_point)
        self._hold(derived=True, _scales=parameter("scale·2^exponent", scale * factors, dims=1))
        self._derive((1.0 / scale) / factors)

    @property
    def scales(self) -> Tensor:
        """float32 [C], s·2^α_c, exactly."""
        return self._scales

    def _gradient_bounds(self, dims: int) -> tuple[Any, Any]:
        return self._bounds or super()._gradient_bounds(dims)
