"""What every number format is: a frozen rule x → integer codes → x̂ with its parameters as buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantlens.errors import UnsupportedError
from quantlens.plugins import Registry

_FORMATS: Registry[type[Quantizer]] = Registry(
    "number format",
    "quantlens.formats",
    hint="it may be a plugin's, which --plugin MODULE_OR_FILE and ql.load_plugin load",
)


class Quantizer(nn.Module, ABC):
    """A number format with its parameters.

    ``forward(x)`` is fake quantization: float in, float out, bit for bit ``decode(encode(x))``, with a straight-through
    gradient inside the range and none outside. Parameters are buffers and do not change once made.

    Attributes
    ----------
    bits: width of a code.
    signed: whether codes may be negative.
    granularity: "tensor", "channel", "head", "token" or "group": what shares one scale.
    dynamic: whether the scales are found when values are quantized, and are no parameters.
    axis: the dimension (negative, counted from the end, or 0 for the output channels of a weight) that has a scale per
        index; ``None`` for granularity "tensor".
    """

    dynamic: ClassVar[bool] = False
    kind: ClassVar[str]
    """Name of the format, unique, written into checkpoints. A subclass that sets it is registered under it."""

    def __init__(self, bits: int, *, signed: bool, granularity: str = "tensor", axis: int | None = None):
        super().__init__()
        if not 1 <= bits <= 16:
            raise UnsupportedError(f"{bits} bits: integer codes have 1 to 16 bits")
        if (granularity == "tensor") != (axis is None):
            raise ValueError(f"granularity {granularity!r} and axis {axis!r} contradict each other")
        self.bits, self.signed, self.granularity, self.axis = bits, signed, granularity, axis

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            _FORMATS.add(cls, cls.kind)

    # -- the three verbs --------------------------------------------------------------------------------------------
    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize: same shape and dtype as ``x``."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes in [``qmin``, ``qmax``], of :attr:`code_dtype`, same shape as ``x``."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of integer codes."""

    # -- ranges of codes --------------------------------------------------------------------------------------------
    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed or self.bits <= 15 else torch.int32

    # -- plain data -------------------------------------------------------------------------------------------------
    def config(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON-able data."""
        return {
            "kind": self.kind,
            "bits": self.bits,
            "signed": self.signed,
            "granularity": self.granularity,
            "axis": self.axis,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that, with :meth:`config`, make the quantizer again."""
        return {name: value for name, value in self.named_buffers() if name not in self._non_persistent_buffers_set}

    @classmethod
    @abstractmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Quantizer:
        """The inverse of :meth:`config` and :meth:`tensors`."""

    def extra_repr(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}, per {self.granularity}"

    def spread(self, parameter: Tensor, dims: int) -> Tensor:
        """A [n] parameter shaped to broadcast along :attr:`axis` of a tensor with ``dims`` dimensions."""
        if self.axis is None:
            return parameter
        shape = [1] * dims
        shape[self.axis] = -1
        return parameter.reshape(shape)


def restore(config: dict[str, Any], tensors: dict[str, Tensor]) -> Quantizer:
    """Make a quantizer from its plain data. Raises UnknownNameError for a format that neither this version nor a plugin
    has."""
    return _FORMATS.get(str(config.get("kind")), suggest=False).restore(config, tensors)


def formats() -> dict[str, type[Quantizer]]:
    """Number formats by name, those of plugins included."""
    return _FORMATS.all()


class RoundSTE(torch.autograd.Function):
    """Round to nearest, ties to even; the gradient passes unchanged (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_ste(x: Tensor) -> Tensor:
    """:class:`RoundSTE` as a function."""
    return RoundSTE.apply(x)


def bounded_(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``x`` clamped in place, without a gradient. Bounds: numbers, or tensors that broadcast to x.

    As ``torch.clamp``, bit for bit, which with tensors takes seven times as long on a CPU as two passes do.
    """
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.minimum(torch.maximum(x, low, out=x), high, out=x)
    return x.clamp_(low, high)  # type: ignore[arg-type]


def needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad
