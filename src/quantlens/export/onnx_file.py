"""An ONNX file written piece by piece, so that weights are in memory once: in the model.

A ModelProto built in memory holds every weight, and the graph around it, the checker and the serialisation copy them
again. Here the graph is built without them, checked with inputs in their place, and the file is written as protobuf
lays it out: the model's fields, the graph's fields, then one initializer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlens.errors import UnsupportedError

LIMIT = 2**31 - 1
"""Bytes that a protobuf file can have."""

SMALL = 4096
"""Bytes up to which the checker is given an initializer's values (it needs those of shapes and axes)."""

GRAPH_IN_MODEL, TENSOR_IN_GRAPH, RAW_IN_TENSOR = (7 << 3) | 2, (5 << 3) | 2, (9 << 3) | 2
"""Protobuf tags: field number and the wire type of what has a length."""


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph. kind: ONNX's TensorProto type; size: bytes of values; content: makes them when they are
    written."""

    name: str
    kind: int
    shape: tuple[int, ...]
    size: int
    content: Callable[[], bytes]

    @staticmethod
    def of(name: str, array: np.ndarray) -> Initializer:
        """From an array (which is kept, not copied), in its own type."""
        from onnx import helper

        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return Initializer(name, kind, array.shape, array.nbytes, lambda: np.asarray(array, order="C").tobytes())

    def proto(self, *, full: bool) -> Any:
        """The TensorProto, with its values or without."""
        from onnx import TensorProto

        tensor = TensorProto(name=self.name, data_type=self.kind, dims=self.shape)
        if full:
            tensor.raw_data = self.content()
        return tensor

    @property
    def length(self) -> int:
        """Bytes of the serialised TensorProto."""
        return int(self.proto(full=False).ByteSize()) + 1 + len(_varint(self.size)) + self.size

    def pieces(self) -> Iterator[bytes]:
        yield self.proto(full=False).SerializeToString()
        yield bytes([RAW_IN_TENSOR]) + _varint(self.size)
        yield self.content()


def check(model: Any, initializers: list[Initializer]) -> None:
    """Run ONNX's checker with shape inference on a model whose large initializers became inputs."""
    import onnx
    from onnx import helper

    tried = onnx.ModelProto()
    tried.CopyFrom(model)
    for one in initializers:
        if one.size <= SMALL:
            tried.graph.initializer.append(one.proto(full=True))
        else:
            tried.graph.input.append(helper.make_tensor_value_info(one.name, one.kind, one.shape))
    onnx.checker.check_model(tried, full_check=True)


def pieces(model: Any, initializers: list[Initializer]) -> Iterator[bytes]:
    """The file, of a ModelProto whose graph has no initializers. Raises UnsupportedError beyond protobuf's 2 GiB."""
    graph = model.graph.SerializeToString()
    lengths = [one.length for one in initializers]
    total = len(graph) + sum(1 + len(_varint(n)) + n for n in lengths)
    if total > LIMIT:
        raise UnsupportedError(
            f"the model needs {total / 1e9:.1f} GB, more than the 2 GiB of an ONNX file; quantize it to fewer bits"
        )
    bare = type(model)()
    bare.CopyFrom(model)
    bare.ClearField("graph")
    yield bare.SerializeToString()
    yield bytes([GRAPH_IN_MODEL]) + _varint(total)
    yield graph
    for one, length in zip(initializers, lengths, strict=True):
        yield bytes([TENSOR_IN_GRAPH]) + _varint(length)
        yield from one.pieces()


def _varint(value: int) -> bytes:
    """A number in protobuf's base-128 form."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
