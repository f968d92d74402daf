"""Uniform quantization: equally spaced levels, symmetric or asymmetric.

    code = clamp(round(x / s) + z, qmin, qmax)        x̂ = (code − z)·s

z is an integer. It may lie outside [qmin, qmax]: the range [lo, hi] then excludes zero (channels of a LayerNorm
output do), and the grid still covers it. Symmetric: z = 0, codes signed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer, bounded_, needs_grad, parameter, round_ste

MAX_ZERO_POINT = 1 << 20
"""Largest |z|. float32 holds integers exactly to 2²⁴; beyond 2²⁰ a range is as good as constant."""


class Affine(Quantizer):
    """Codes on an equally spaced grid: what :class:`Uniform` and :class:`~quantlens.formats.PowerOfTwo` share.

    Buffers: ``zero_point``, and ``scales`` and ``inverse``, by which integers are multiplied, and values.
    """

    def _derive(self, inverse: Tensor) -> None:
        """What forward needs, computed once: 1/s and the code bounds less z."""
        low, high = (self.qmin - self.zero_point).float(), (self.qmax - self.zero_point).float()
        self._hold(derived=True, inverse=inverse, _low=low, _high=high)
        self._bounds = None if self.zero_point.dim() else (float(low), float(high))

    @property
    def scales(self) -> Tensor:
        """float32 [] or [n], by which the integers code − z are multiplied."""
        return self.scale

    def _levels(self, x: Tensor) -> Tensor:
        """round(x/s) clamped to the codes less z: the integer by which s is multiplied."""
        levels = (x * self.spread(self.inverse, x.dim())).round_()
        return bounded_(levels, *self.bounds(x.dim()))

    def _zero(self, dims: int) -> Tensor:
        return self.spread(self.zero_point, dims) if self.zero_point.dim() else self.zero_point

    def bounds(self, dims: int) -> tuple[Any, Any]:
        """Smallest and largest level (code less zero point): numbers, or shaped to broadcast to ``dims`` dimensions."""
        return self._bounds or self._gradient_bounds(dims)

    def _gradient_bounds(self, dims: int) -> tuple[Any, Any]:
        """As tensors: a clamp by tensors passes half of the gradient at the very bounds, one by numbers nothing."""
        return self.spread(self._low, dims), self.spread(self._high, dims)

    def forward(self, x: Tensor) -> Tensor:
        scales = self.spread(self.scales, x.dim())
        if needs_grad(x):
            return round_ste(x * self.spread(self.inverse, x.dim())).clamp(*self._gradient_bounds(x.dim())) * scales
        return self._levels(x).mul_(scales)

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return (self._levels(x).to(torch.int32) + self._zero(x.dim())).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        dims = codes.dim()
        return (codes.to(torch.int32) - self._zero(dims)).float() * self.spread(self.scales, dims)


class Uniform(Affine):
    """Uniform format with scale and integer zero point, per tensor or along one axis.

    scale: float32 [] or [n], positive and finite. zero_point: integers, same shape; ``None`` for symmetric (z = 0,
    signed).
    """

    kind = "uniform"

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        *,
        signed: bool | None = None,
        granularity: str = "tensor",
        axis: int | None = None,
    ):
        super().__init__(
            bits, signed=zero_point is None if signed is None else signed, granularity=granularity, axis=axis
        )
        scale = parameter("scale", scale, dims=0 if axis is None else 1)
        zero_point = torch.zeros_like(scale) if zero_point is None else torch.as_tensor(zero_point, device=scale.device)
        if zero_point.shape != scale.shape:
            raise ValueError(f"scale {tuple(scale.shape)} and zero point {tuple(zero_point.shape)} do not fit")
        self._hold(scale=scale, zero_point=zero_point.round().to(torch.int32))
        self._derive(1.0 / scale)

    @property
    def symmetric(self) -> bool:
        return self.signed and not bool(self.zero_point.any())


def pixel_codes(device: torch.device | str = "cpu") -> Uniform:
    """The format of pixel/255 in 0 … 1, whose codes 0 … 255 are the pixels."""
    return Uniform(torch.tensor(1 / 255, device=device), torch.tensor(0, device=device), 8, signed=False)


def affine_parameters(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point of unsigned codes that cover [low, high] (any shape, float).

    s = (high − low)/(2ᵇ − 1), z = round(−low/s). Zero need not lie in the range. A range that is a single value c (a
    dead channel, an all-zero tensor), or as good as one in float32, gets s = |c| (1 for c = 0) and a zero point that
    makes c exact.
    """
    constant = is_constant(low, high, bits)
    low, high = torch.minimum(low, high).double(), torch.maximum(low, high).double()
    magnitude = torch.maximum(low.abs(), high.abs())
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(constant, torch.where(magnitude > 0, magnitude, torch.ones_like(scale)), scale)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny * 4).float()
    zero_point = (-low / scale.double()).round()
    return scale, zero_point.to(torch.int32)


def is_constant(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Where a range is one value for all practical purposes: its zero point would exceed :data:`MAX_ZERO_POINT`."""
    magnitude = torch.maximum(low.double().abs(), high.double().abs())
    return (high.double() - low.double()).abs() / (2**bits - 1) * MAX_ZERO_POINT <= magnitude


def symmetric_parameters(magnitude: Tensor, bits: int) -> Tensor:
    """Scale of signed codes that cover [−magnitude, magnitude]: s = magnitude/(2ᵇ⁻¹ − 1); 1 where the magnitude is
    0."""
    scale = magnitude.double() / max(2 ** (bits - 1) - 1, 1)
    tiny = torch.finfo(torch.float32).tiny * 4
    return torch.where(scale > tiny, scale, torch.ones_like(scale)).float()
