"""Uniform quantization: equally spaced levels, symmetric or asymmetric; with a power-of-two factor per channel, too.

    code = clamp(round(x / s) + z, qmin, qmax)        x̂ = (code − z)·s

z is an integer. It may lie outside [qmin, qmax]: the range [lo, hi] then excludes zero (channels of a LayerNorm
output do), and the grid still covers it. Symmetric: z = 0, codes signed.
"""

import math
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
        return bounded_((x * self.spread(self.inverse, x.dim())).round_(), *self.bounds(x.dim()))

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
    return scale, (-low / scale.double()).round().to(torch.int32)


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


# -- power-of-two factors ------------------------------------------------------------------------------------------
# Power-of-two factors: channels of very different range share one scale (and zero point), up to a shift each.
#
#     code = clamp(round(x / (s·2^α_c)) + z, qmin, qmax)        x̂ = (code − z)·s·2^α_c
#
# The exponents α_c are small integers ≥ 0, so that an integer kernel brings all channels to the scale s by shifting
# ``code − z`` left by α_c (FQ-ViT, IJCAI 2022, section 3.2, where α_c lies in 0 … 3). The zero point may also be a
# channel's own, z_c: an integer that is subtracted in front of the shift, which centres every channel's codes.


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


# -- two uniform ranges in one code --------------------------------------------------------------------------------
# Twin uniform quantization: two uniform ranges in one code of b bits (Yuan et al., ECCV 2022, section 3.2).
#
# One bit selects the range, b − 1 bits are the magnitude; every value is coded in exactly one range.
#
# By magnitude (softmax outputs, codes unsigned): Δ1·(0 … 2ᵇ⁻¹ − 1) up to s, then Δ2·(j … 2ᵇ⁻¹ − 1) up to the top, j the
# first step beyond s, Δ2 = 2ᵐ·Δ1. A value goes to the nearest level of both; with the paper's boundary at s, what lies
# just above s would be rounded below it.
#
# By sign (GELU outputs, codes two's complement): Δ1·(−2ᵇ⁻¹ … −1) and Δ2·(0 … 2ᵇ⁻¹ − 1).
#
# ``shift`` is m, by which a product shifts one range's integers before it sums both; by sign it may be missing (None).


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
    def by_magnitude(cls, shift: int, bits: int, *, top: float = 1.0) -> "Twin":
        """For values in [0, top]: Δ2 = top/(2ᵇ⁻¹ − 1), Δ1 = Δ2·2^(−shift), ranges [0, s] and (s, top] with s =
        top·2^(−shift)."""
        two = (torch.tensor(top, dtype=torch.float64) / (2 ** (bits - 1) - 1)).float()
        return cls(torch.stack([two * 2.0**-shift, two]), bits, split=MAGNITUDE)

    @classmethod
    def by_sign(cls, negative: float | Tensor, positive: float | Tensor, bits: int) -> "Twin":
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
