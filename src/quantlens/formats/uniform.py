"""Uniform quantization: equally spaced levels, symmetric or asymmetric.

    code = clamp(round(x / s) + z, qmin, qmax)        x̂ = (code − z)·s

z is an integer. It may lie outside [qmin, qmax]: the range [lo, hi] then excludes zero (channels of a LayerNorm
output do), and the grid still covers it. Symmetric: z = 0, codes signed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlens.formats.base import Quantizer, bounded_, needs_grad, round_ste

MAX_ZERO_POINT = 1 << 20
"""Largest |z|. float32 holds integers exactly to 2²⁴; beyond 2²⁰ a range is as good as constant."""


class Uniform(Quantizer):
    """Uniform format with scale and integer zero point, per tensor or along one axis.

    scale: float32 [] or [n], positive and finite. zero_point: integers, same shape; ``None`` for symmetric (z = 0,
    signed).
    """

    kind = "uniform"
    scale: Tensor
    zero_point: Tensor

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
        scale = torch.as_tensor(scale, dtype=torch.float32).detach().clone()
        if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
            raise ValueError("scale must be positive and finite")
        if zero_point is None:
            zero_point = torch.zeros_like(scale)
        zero_point = torch.as_tensor(zero_point, device=scale.device).round().to(torch.int32)
        if zero_point.shape != scale.shape or scale.dim() != (0 if axis is None else 1):
            raise ValueError(
                f"scale {tuple(scale.shape)} and zero point {tuple(zero_point.shape)} do not fit axis {axis}"
            )
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self._derive()

    def _derive(self) -> None:
        """What forward needs, computed once: 1/s and the code bounds less z."""
        self.register_buffer("inverse", 1.0 / self.scale, persistent=False)
        self.register_buffer("_low", (self.qmin - self.zero_point).float(), persistent=False)
        self.register_buffer("_high", (self.qmax - self.zero_point).float(), persistent=False)
        one = self.axis is None
        self._bounds = (float(self._low), float(self._high)) if one else None

    @property
    def symmetric(self) -> bool:
        return self.signed and not bool(self.zero_point.any())

    def _levels(self, x: Tensor) -> Tensor:
        """round(x/s) clamped to the codes less z: the integer by which s is multiplied."""
        dims = x.dim()
        levels = (x * self.spread(self.inverse, dims)).round_()
        return bounded_(levels, *self.bounds(dims))

    def bounds(self, dims: int) -> tuple[Any, Any]:
        """Smallest and largest level (code less zero point): numbers, or shaped to broadcast to ``dims`` dimensions."""
        if self._bounds is not None:
            return self._bounds
        return self.spread(self._low, dims), self.spread(self._high, dims)

    def forward(self, x: Tensor) -> Tensor:
        if needs_grad(x):
            dims = x.dim()
            levels = round_ste(x * self.spread(self.inverse, dims))
            levels = levels.clamp(self.spread(self._low, dims), self.spread(self._high, dims))
            return levels * self.spread(self.scale, dims)
        return self._levels(x).mul_(self.spread(self.scale, x.dim()))

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            levels = self._levels(x).to(torch.int32)
            return (levels + self.spread(self.zero_point, x.dim())).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        dims = codes.dim()
        levels = codes.to(torch.int32) - self.spread(self.zero_point, dims)
        return levels.float() * self.spread(self.scale, dims)

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Uniform:
        return cls(
            tensors["scale"],
            tensors["zero_point"],
            config["bits"],
            signed=config["signed"],
            granularity=config["granularity"],
            axis=config["axis"],
        )


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
