"""Operators in integer arithmetic that take the place of a site's float operation (LayerNorm, softmax).

A quantizer changes the numbers on an edge; an operator changes how a site computes. Both are part of the plan. An
operator is called with the arguments of the node it replaces (``layer_norm(x, shape, γ, β, eps)``, ``softmax(x,
dim)``), whose tensors lie on the grids of the quantizers in front of it, and puts out values on its own output grid.
The site's ``output`` edge then needs no quantizer: its format is :attr:`Operator.output`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

from torch import Tensor

from quantlens.formats.base import Described, Quantizer, restore


class Operator(Described):
    """An operation in integer arithmetic with its parameters as buffers, which do not change once made.

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
