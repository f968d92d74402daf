"""Operators in integer arithmetic that take the place of a site's float operation (LayerNorm, softmax).

A quantizer changes the numbers on an edge; an operator changes how a site computes. Both are part of the plan. An
operator is called with the arguments of the node it replaces (``layer_norm(x, shape, γ, β, eps)``, ``softmax(x,
dim)``), whose tensors lie on the grids of the quantizers in front of it, and puts out values on its own output grid.
The site's ``output`` edge then needs no quantizer: its format is :attr:`Operator.output`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from quantlens.errors import UnknownNameError
from quantlens.formats.base import Quantizer, restore

_OPERATORS: dict[str, type[Operator]] = {}


class Operator(nn.Module, ABC):
    """An operation in integer arithmetic with its parameters as buffers, which do not change once made.

    output: the number format of what comes out; every value is ``output.decode`` of a code.
    """

    kind: ClassVar[str]
    """Name of the operator, unique, written into checkpoints."""

    output: Quantizer

    def __init__(self, output: Quantizer):
        super().__init__()
        self.output = output

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            _OPERATORS[cls.kind] = cls

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The node's arguments -> the node's value, as float32 numbers on the output grid."""

    def config(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON-able data."""
        return {"kind": self.kind, "output": self.output.config()}

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that, with :meth:`config`, make the operator again; those of the output format begin with
        ``output.``."""
        own = {name: value for name, value in self._buffers.items() if name not in self._non_persistent_buffers_set}
        return {  # type: ignore[return-value]
            **{name: value for name, value in own.items() if value is not None},
            **{f"output.{name}": value for name, value in self.output.tensors().items()},
        }

    @classmethod
    @abstractmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Operator:
        """The inverse of :meth:`config` and :meth:`tensors`."""

    @staticmethod
    def restore_output(config: dict[str, Any], tensors: dict[str, Tensor]) -> Quantizer:
        """The output format out of an operator's plain data."""
        own = {name.removeprefix("output."): t for name, t in tensors.items() if name.startswith("output.")}
        return restore(config["output"], own)


def restore_operator(config: dict[str, Any], tensors: dict[str, Tensor]) -> Operator:
    """Make an operator from its plain data. Raises UnknownNameError for one this version does not know."""
    kind = str(config.get("kind"))
    if kind not in _OPERATORS:
        raise UnknownNameError("integer operator", kind, _OPERATORS)
    return _OPERATORS[kind].restore(config, tensors)
