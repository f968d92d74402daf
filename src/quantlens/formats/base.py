"""What every number format is: a frozen rule x → integer codes → x̂ with its parameters as buffers. And what every
operator in integer arithmetic is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quantlens.errors import UnsupportedError
from quantlens.plugins import Registry

_KINDS: Registry[type[Described]] = Registry(
    "number format",
    "quantlens.formats",
    hint="it may be a plugin's, which --plugin MODULE_OR_FILE and ql.load_plugin load",
)


class Described(nn.Module, ABC):
    """A module that plain data makes again: a configuration and the tensors in its buffers, which do not change.

    kind: its name, unique, written into checkpoints. settings: names of the attributes that the configuration holds.
    """

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            """Buffers are tensors."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass that sets ``kind`` is registered under it."""
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            _KINDS.add(cls, cls.kind)

    def _hold(self, *, derived: bool = False, **buffers: Tensor | None) -> None:
        """Keep tensors as buffers; ``derived``: they follow from the others, and are not saved."""
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=not derived)

    def config(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON-able data."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.settings}}

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that, with :meth:`config`, make the module again."""
        return dict(self.state_dict())

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """The inverse of :meth:`config` and :meth:`tensors`, which hold the arguments of the class by name."""
        given = {**config, **tensors}
        return cls(**{name: given[name] for name in signature(cls).parameters if name in given})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items() if name not in ("kind", "output"))


class Quantizer(Described):
    """A number format with its parameters.

    ``forward(x)`` is fake quantization: float in, float out, bit for bit ``decode(encode(x))``, with a straight-through
    gradient inside the range and none outside. Parameters are buffers and do not change once made.

    Attributes
    ----------
    bits: width of a code, at least ``narrowest``.
    signed: whether codes may be negative.
    granularity: "tensor", "channel", "head", "token" or "group": what shares one scale.
    dynamic: whether the scales are found when values are quantized, and are no parameters.
    axis: the dimension (negative, counted from the end, or 0 for the output channels of a weight) that has a scale per
        index; ``None`` for granularity "tensor".
    """

    dynamic: bool = False
    narrowest: ClassVar[int] = 1

    def __init__(self, bits: int, *, signed: bool, granularity: str = "tensor", axis: int | None = None):
        super().__init__()
        if not self.narrowest <= bits <= 16:
            raise UnsupportedError(f"{bits} bits: codes of this format have at least {self.narrowest} bits, at most 16")
        if (granularity == "tensor") != (axis is None):
            raise ValueError(f"granularity {granularity!r} and axis {axis!r} contradict each other")
        self.bits, self.signed, self.granularity, self.axis = bits, signed, granularity, axis

    # -- the three verbs --------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize: same shape and dtype as ``x``."""
        if not needs_grad(x):
            return self._value(x)
        with torch.no_grad():
            value, inside = self._value(x), self._inside(x)
        return value + (x - x.detach()) * inside.to(x.dtype)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes in [``qmin``, ``qmax``], of :attr:`code_dtype`, same shape as ``x``."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of integer codes."""

    def _value(self, x: Tensor) -> Tensor:
        """x̂, without a gradient."""
        return self.decode(self.encode(x))

    def _inside(self, x: Tensor) -> Tensor:
        """Where ``x`` lies in the range, bool: there the gradient passes."""
        return torch.ones_like(x, dtype=torch.bool)

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

    def config(self) -> dict[str, Any]:
        common = {name: getattr(self, name) for name in ("bits", "signed", "granularity", "axis")}
        return {"kind": self.kind, **common, **super().config()}

    def spread(self, parameter: Tensor, dims: int) -> Tensor:
        """A [n] parameter shaped to broadcast along :attr:`axis` of a tensor with ``dims`` dimensions."""
        if self.axis is None:
            return parameter
        shape = [1] * dims
        shape[self.axis] = -1
        return parameter.reshape(shape)


class Operator(Described):
    """An operation in integer arithmetic in the place of a site's float operation (LayerNorm, softmax).

    A quantizer changes the numbers on an edge; an operator changes how a site computes. Both are part of the plan. An
    operator is called with the arguments of the node it replaces (``layer_norm(x, shape, γ, β, eps)``, ``softmax(x,
    dim)``), whose tensors lie on the grids of the quantizers in front of it, and puts out values on its own output
    grid. The site's ``output`` edge then needs no quantizer.

    output: the number format of what comes out; every value is ``output.decode`` of a code. The names of its tensors
    begin with ``output.``.
    """

    output: Any

    def __init__(self, output: Quantizer):
        super().__init__()
        self.output = output

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The node's arguments -> the node's value, as float32 numbers on the output grid."""

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "output": self.output.config(), **super().config()}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        own = {name.removeprefix("output."): t for name, t in tensors.items() if name.startswith("output.")}
        return super().restore({**config, "output": restore(config["output"], own)}, tensors)


def restore(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Make a quantizer or an operator from its plain data. Raises UnknownNameError for a kind that neither this version
    nor a plugin has."""
    return _KINDS.get(str(config.get("kind")), suggest=False).restore(config, tensors)


def parameter(name: str, value: Tensor | float, *, dims: int = 0, positive: bool = True) -> Tensor:
    """A parameter of a format as a float32 tensor of its own. Raises ValueError unless it has so many dimensions and
    all of its numbers are finite (and positive)."""
    tensor = torch.as_tensor(value, dtype=torch.float32).detach().clone()
    good = torch.isfinite(tensor) & (tensor > 0) if positive else torch.isfinite(tensor)
    if tensor.dim() != dims or not bool(good.all()):
        what = ("one " if dims == 0 else "a list of ") + ("positive finite" if positive else "finite")
        raise ValueError(f"{name} must be {what} {'number' if dims == 0 else 'numbers'}")
    return tensor


class RoundSTE(torch.autograd.Function):
    """Round to nearest, ties to even; the gradient passes unchanged (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


round_ste: Callable[[Tensor], Tensor] = RoundSTE.apply


def bounded_(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``x`` clamped in place, without a gradient. Bounds: numbers, or tensors that broadcast to x.

    As ``torch.clamp``, bit for bit, which with tensors takes seven times as long on a CPU as two passes do.
    """
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.minimum(torch.maximum(x, low, out=x), high, out=x)
    return x.clamp_(low, high)  # type: ignore[arg-type]


def needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad
