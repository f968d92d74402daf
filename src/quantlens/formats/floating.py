"""Floating-point formats: FP8 with a static scale, and formats whose blocks of values share a scale (OCP MX 1.0,
section 5; NVIDIA's NVFP4), found when values are quantized, or once, for a weight.

FP8      x̂ = s·e,         s static, per tensor or channel (1: a plain cast), e in E4M3 or E5M2
MX       x̂ = 2ᵗ·e,        blocks of 32, t = max(floor(log₂ max|x|) − emax, −127): 8 bits, E8M0
NVFP4    x̂ = s·b·e,       blocks of 16, b = E4M3(max|x|/6s), s = max|X|/(448·6) of the whole tensor, static; e in E2M1

Elements are rounded to nearest, ties to even, and saturate (:mod:`quantlens.formats.elements`). With ``search`` a block
takes, of the standard's scale and some near it, that of the least squared error. A block of zeros has the least scale;
so has one below 2⁻¹²⁶, whose elements are then the smaller ones, or 0. A block with a NaN or ±∞ is NaN as a whole: its
scale is. The last block is filled up with zeros, which are not kept.
"""

import math
from abc import abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from quantlens.errors import UnsupportedError
from quantlens.formats.base import Quantizer, parameter
from quantlens.formats.elements import ELEMENTS


class FloatingPoint(Quantizer):
    """Small floating-point numbers times a scale, static, per tensor or along one axis.

    ``FloatingPoint("E4M3", scale)``

    scale: float32 [] or [n], positive and finite. ``encode`` gives bit patterns, uint8.
    """

    kind, settings = "float", ("element",)

    def __init__(
        self, element: str, scale: Tensor | float = 1.0, *, granularity: str = "tensor", axis: int | None = None
    ):
        super().__init__(ELEMENTS[element].bits, signed=False, granularity=granularity, axis=axis)
        self.element, self._element = element, ELEMENTS[element]
        self._hold(scale=parameter("scale", scale, dims=0 if axis is None else 1))

    def _value(self, x: Tensor) -> Tensor:
        scale = self.spread(self.scale, x.dim())
        return self._element.round(x / scale).mul_(scale)

    def _inside(self, x: Tensor) -> Tensor:
        return x.abs() <= self._element.largest * self.spread(self.scale, x.dim())

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._element.encode(x / self.spread(self.scale, x.dim()))

    def decode(self, codes: Tensor) -> Tensor:
        return self._element.decode(codes).mul_(self.spread(self.scale, codes.dim()))


class Blocks(Quantizer):
    """What formats have in common whose blocks of values share a scale of 8 bits.

    axis: the dimension along which the blocks lie: −1; −2 as in the keys [..., C, N] of an attention; −3 as in the maps
    [B, C, H, W] of a convolution; 1 of a convolution's weight [out, in, h, w]: all that it sums over, in this order.
    search: whether a block looks for its scale. scale_codes: uint8 [..., ⌈C/group_size⌉, 1], static scales of one
    tensor (:meth:`fitted`); ``None``: dynamic.

    ``encode`` gives bit patterns of the elements in the low bits of uint8; with dynamic scales, for C values along the
    axis, C + ⌈C/group_size⌉ of them: then those of the scales.
    """

    settings: ClassVar[tuple[str, ...]] = ("group_size", "search")
    group_size: ClassVar[int]
    steps: ClassVar[tuple[int, ...]]
    """What is added to the code of the standard's scale in a search."""
    undefined: ClassVar[int]
    """The code of a scale that is NaN."""

    def __init__(self, element: str, *, axis: int, search: bool, scale_codes: Tensor | None):
        if axis not in (-1, -2, -3, 1):
            raise ValueError(f"axis {axis}: blocks lie along one of the last three dimensions, or 1 of a weight")
        super().__init__(ELEMENTS[element].bits, signed=False, granularity="group", axis=axis)
        self.element, self._element, self.search = element, ELEMENTS[element], search
        self.dynamic = scale_codes is None
        self._hold(scale_codes=None if scale_codes is None else scale_codes.detach().to(torch.uint8).clone())

    def fitted(self, x: Tensor) -> Self:
        """The format with the scales that the blocks of ``x`` get, static: for a weight, whose values change with
        rounding and whose scales must not."""
        codes = self.chosen(self.groups(x)).to(torch.uint8)
        return type(self).restore(self.config(), {**self.tensors(), "scale_codes": codes}).to(x.device)

    @abstractmethod
    def standard(self, largest: Tensor) -> Tensor:
        """int32 code of the scale of blocks with these largest magnitudes."""

    @abstractmethod
    def scales(self, codes: Tensor) -> Tensor:
        """float32 scales of codes, by which elements are multiplied."""

    # -- blocks -----------------------------------------------------------------------------------------------------
    def groups(self, x: Tensor) -> Tensor:
        """x [..., C] as [..., G, group_size], blocks last, zeros at the end; a view where it can be."""
        turned = x.flatten(1) if self.axis == 1 else x.movedim(self.axis, -1)  # type: ignore[arg-type]
        count = -(-turned.shape[-1] // self.group_size)
        missing = count * self.group_size - turned.shape[-1]
        if missing:
            turned = torch.nn.functional.pad(turned, (0, missing))
        return turned.unflatten(-1, (count, self.group_size))

    def whole(self, groups: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`groups`, with the shape of ``like``."""
        if self.axis == 1:
            return groups.flatten(1)[:, : like[0].numel()].reshape(like.shape)
        return groups.flatten(-2)[..., : like.shape[self.axis]].movedim(-1, self.axis)  # type: ignore[index,arg-type]

    def chosen(self, groups: Tensor) -> Tensor:
        """int32 codes [..., G, 1] of the scales of blocks [..., G, group_size]."""
        if not self.dynamic:
            return self.scale_codes.int()
        found = self.standard(groups.abs().amax(-1, keepdim=True))
        if not self.search:
            return found
        first, least = found, self._error(groups, found)
        for step in self.steps:
            other = (first + step).clamp_(0, self.undefined - 1)
            error = self._error(groups, other)
            better = error < least  # nothing is less than NaN
            least, found = torch.where(better, error, least), torch.where(better, other, found)
        return found

    def _error(self, groups: Tensor, codes: Tensor) -> Tensor:
        """Squared error of every block [..., G, 1]."""
        return self._rounded(groups, codes).sub_(groups).square_().sum(-1, keepdim=True)

    def _units(self, groups: Tensor, codes: Tensor) -> Tensor:
        """Values in units of the scales; 0 where a scale is 0."""
        scales = self.scales(codes)
        return groups / torch.where(scales == 0, math.inf, scales)

    def _rounded(self, groups: Tensor, codes: Tensor) -> Tensor:
        return self._element.round(self._units(groups, codes)).mul_(self.scales(codes))

    # -- the three verbs --------------------------------------------------------------------------------------------
    def _value(self, x: Tensor) -> Tensor:
        groups = self.groups(x)
        return self.whole(self._rounded(groups, self.chosen(groups)), x)

    def _inside(self, x: Tensor) -> Tensor:
        groups = self.groups(x)
        return self.whole(groups.abs() <= self._element.largest * self.scales(self.chosen(groups)), x)

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            groups = self.groups(x)
            scales = self.chosen(groups)
            units = self._units(groups, scales).masked_fill_(scales == self.undefined, 0.0)
            elements = self.whole(self._element.encode(units), x)
            if not self.dynamic:
                return elements
            flat = elements.flatten(1) if self.axis == 1 else elements
            return torch.cat([flat, scales.to(torch.uint8).squeeze(-1).movedim(-1, self.axis)], self.axis)  # type: ignore[arg-type]

    def decode(self, codes: Tensor) -> Tensor:
        elements, scales = (codes, self.scale_codes) if not self.dynamic else self.planes(codes)
        if self.dynamic:
            scales = scales.movedim(self.axis, -1).unsqueeze(-1)  # type: ignore[arg-type]
        return self.whole(self._element.decode(self.groups(elements)).mul_(self.scales(scales.int())), elements)

    def planes(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`encode` gives with dynamic scales, in two: elements and scales."""
        both = codes.shape[self.axis]  # type: ignore[index]
        count = -(-both // (self.group_size + 1))
        elements, scales = codes.split([both - count, count], self.axis)  # type: ignore[arg-type]
        return elements, scales

    def each_scale(self, x: Tensor) -> Tensor:
        """The scale of every value of ``x``, in its shape."""
        groups = self.groups(x)
        return self.whole(self.scales(self.chosen(groups)).expand_as(groups), x)


class MicroScaled(Blocks):
    """The OCP Microscaling formats: blocks of 32 with a scale that is a power of two. They need no calibration.

    ``MicroScaled("E2M1")`` is MXFP4, E2M3 and E3M2 MXFP6, E4M3 and E5M2 MXFP8, INT8 MXINT8. A search tries
    twice the standard's scale too, at which no element saturates.
    """

    kind, settings = "mx", (*Blocks.settings, "element")
    group_size, steps, undefined = 32, (1,), 255

    def __init__(self, element: str, *, axis: int = -1, search: bool = False, scale_codes: Tensor | None = None):
        super().__init__(element, axis=axis, search=search, scale_codes=scale_codes)
        powers = torch.exp2(torch.arange(-127, 128, dtype=torch.float64))
        self._hold(derived=True, powers=torch.cat([powers, powers.new_tensor([math.nan])]).float())

    def standard(self, largest: Tensor) -> Tensor:
        exponents = largest.view(torch.int32) >> 23  # with their bias, 127; of NaN and ∞ 255
        return torch.where(exponents == 255, self.undefined, (exponents - self._element.most).clamp_min_(0))

    def scales(self, codes: Tensor) -> Tensor:
        return self.powers[codes.long()]


class NVFP4(Blocks):
    """NVIDIA's NVFP4: E2M1 in blocks of 16 with a scale in E4M3, and a static float32 scale of the tensor.

    ``NVFP4(scale)``; ``NVFP4.of(x)`` is that of a tensor.

    scale: float32 [], positive and finite, always static. Blocks beyond 448·6 of it saturate. A block whose scale
    rounds to 0 is 0. A search tries the scales at which the largest element is about 4, not 6 (1.5 times the
    standard's, as in "Four over six", 2025), and the one below the standard's.
    """

    kind = "nvfp4"
    group_size, steps, undefined = 16, (4, 5, -1), 0x7F

    def __init__(
        self,
        scale: Tensor | float = 1.0,
        *,
        axis: int = -1,
        search: bool = False,
        scale_codes: Tensor | None = None,
    ):
        super().__init__("E2M1", axis=axis, search=search, scale_codes=scale_codes)
        self._hold(scale=parameter("scale", scale))
        self._hold(derived=True, values=ELEMENTS["E4M3"].table(self.scale.device).clone())

    @classmethod
    def of(cls, x: Tensor, *, axis: int = -1, search: bool = False) -> Self:
        """The format with the scale of the largest finite magnitude in a tensor."""
        return cls.up_to(x.detach().abs().nan_to_num(0.0, posinf=0.0).amax() if x.numel() else 0.0, axis, search)

    @classmethod
    def up_to(cls, largest: Tensor | float, axis: int = -1, search: bool = False) -> Self:
        """The format for values up to a magnitude; of 0, the scale is 1."""
        scale = torch.as_tensor(largest, dtype=torch.float32) / (448.0 * 6.0)
        least = scale.new_tensor(torch.finfo(torch.float32).tiny)
        return cls(torch.where(scale > 0, torch.maximum(scale, least), 1.0), axis=axis, search=search)

    def standard(self, largest: Tensor) -> Tensor:
        codes = ELEMENTS["E4M3"].encode(largest / 6.0 / self.scale).int()
        return torch.where(torch.isfinite(largest), codes, self.undefined)

    def scales(self, codes: Tensor) -> Tensor:
        return self.values[codes.long()] * self.scale


# -- by name -------------------------------------------------------------------------------------------------------
_ELEMENT_OF = {
    "FP8": "E4M3",
    "FP8-E5M2": "E5M2",
    "MXFP8": "E4M3",
    "MXFP8-E5M2": "E5M2",
    "MXFP6": "E2M3",
    "MXFP6-E3M2": "E3M2",
    "MXFP4": "E2M1",
    "MXINT8": "INT8",
    "NVFP4": "E2M1",
}
FLOATING = tuple(_ELEMENT_OF)
"""Names of the floating-point formats; the element's name may follow any, and FP8 be left out before it."""


def _key(name: object) -> str:
    return str(name).strip().upper().replace("-", "").replace("_", "")


_NAMES = {_key(name): name for name in FLOATING}
_NAMES |= {_key(name.partition("-")[0] + element): name for name, element in _ELEMENT_OF.items()}
_NAMES |= {element: name for name, element in _ELEMENT_OF.items() if name.startswith("FP8")}


def floating_name(name: object) -> str | None:
    """The one spelling of a floating-point format's name (any case, hyphens or none); None for another name."""
    return _NAMES.get(_key(name))


def floating_name_of(quantizer: object) -> str:
    """The name of the floating-point format that a quantizer is; "" of another."""
    families = {"float": "FP8", "mx": "MX", "nvfp4": "NVFP4"}
    family = families.get(getattr(quantizer, "kind", ""), "-")
    element = getattr(quantizer, "element", "")
    return next((name for name, one in _ELEMENT_OF.items() if name.startswith(family) and one == element), "")


def checked_name(name: object) -> str:
    """The same. Raises UnsupportedError, which lists the formats, for another name."""
    found = floating_name(name)
    if found is None:
        raise UnsupportedError(f"no floating-point format {name!r}: choose one of {', '.join(FLOATING)}")
    return found


def floating_bits(name: str) -> int:
    """Width of an element of a format, by its one spelling."""
    return ELEMENTS[_ELEMENT_OF[name]].bits


def floating_format(
    name: str, largest: Tensor | float | None = None, *, axis: int | None = -1, search: bool = False
) -> Quantizer:
    """The format of a name for values up to a magnitude.

    largest: float32 [], of FP8 also [n] along ``axis``; what has a static scale fits it: s = largest/448 of E4M3.
    ``None`` leaves the scale at 1, as in a cast to FP8. axis: of blocks, see :class:`Blocks`; of FP8 the dimension with
    a scale per index, or None. search: of blocks, whether they look for their scales.

    Raises UnsupportedError for a name that is none.
    """
    name = checked_name(name)
    element = ELEMENTS[_ELEMENT_OF[name]]
    if name.startswith("MX"):
        return MicroScaled(element.name, axis=-1 if axis is None else axis, search=search)
    if name == "NVFP4":
        where = -1 if axis is None else axis
        return NVFP4(axis=where, search=search) if largest is None else NVFP4.up_to(largest, where, search)
    if largest is None:
        return FloatingPoint(element.name)
    scale = torch.as_tensor(largest, dtype=torch.float32) / element.largest
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
    channel = scale.dim() > 0
    return FloatingPoint(
        element.name, scale, granularity="channel" if channel else "tensor", axis=axis if channel else None
    )


def cast(x: Tensor, name: str) -> Tensor:
    """x̂: a tensor as a floating-point format holds it, blocks along its last dimension.

    x: any shape, floating-point or integers; computed in float32 and returned in the type of ``x`` (float32 of
    integers). name: of :data:`FLOATING`. FP8 is a plain cast that saturates; NVFP4's scale is that of the tensor.

    Raises UnsupportedError for an unknown name, and for complex numbers.

    >>> cast(torch.tensor([0.3, 1.0, -2.6, 7.0]), "MXFP4")
    tensor([ 0.5000,  1.0000, -3.0000,  6.0000])
    """
    name, x = checked_name(name), torch.as_tensor(x)
    if x.is_complex():
        raise UnsupportedError(f"{name} holds real numbers: cast the real and the imaginary part")
    wide = x.float().reshape(x.shape or (1,))
    made = NVFP4.of(wide) if name == "NVFP4" else floating_format(name).to(x.device)
    return made(wide).reshape(x.shape).to(x.dtype if x.is_floating_point() else torch.float32)
