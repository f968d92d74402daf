"""An ONNX file written piece by piece, so that weights are in memory once: in the model.

A ModelProto built in memory holds every weight, and the graph around it, the checker and the serialisation copy them
again. Here the graph is built without them, checked with inputs in their place, and the file is written as protobuf
lays it out: the model's fields, the graph's fields, then one initializer after the other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlens.errors import UnsupportedError

LIMIT = 2**31 - 1
"""Bytes that a protobuf file can have."""

SMALL = 4096
"""Bytes up to which the checker is given an initializer's values (it needs those of shapes and axes)."""

GRAPH_IN_MODEL, TENSOR_IN_GRAPH, RAW_IN_TENSOR = 7, 5, 9
"""Numbers of protobuf's fields."""


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph. proto: ONNX's TensorProto without values; size: bytes of these; content: makes them when
    they are written."""

    proto: Any
    size: int
    content: Callable[[], bytes]

    @staticmethod
    def of(name: str, array: np.ndarray) -> "Initializer":
        """From an array (which is kept, not copied), in its own type."""
        from onnx import TensorProto, helper

        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = TensorProto(name=name, data_type=kind, dims=array.shape)
        return Initializer(proto, array.nbytes, array.tobytes)


def check(model: Any, initializers: list[Initializer]) -> None:
    """Run ONNX's checker with shape inference on a model whose large initializers became inputs."""
    import onnx
    from onnx import helper

    tried = onnx.ModelProto()
    tried.CopyFrom(model)
    for one in initializers:
        proto = one.proto
        if one.size <= SMALL:
            tried.graph.initializer.add(raw_data=one.content()).MergeFrom(proto)
        else:
            tried.graph.input.append(helper.make_tensor_value_info(proto.name, proto.data_type, proto.dims))
    onnx.checker.check_model(tried, full_check=True)


def pieces(model: Any, initializers: list[Initializer]) -> Iterator[bytes]:
    """The file, of a ModelProto whose graph has no initializers. Raises UnsupportedError beyond protobuf's 2 GiB."""
    graph, heads = model.graph.SerializeToString(), []
    for one in initializers:
        head = one.proto.SerializeToString() + _head(RAW_IN_TENSOR, one.size)
        heads.append(_head(TENSOR_IN_GRAPH, len(head) + one.size) + head)
    total = len(graph) + sum(map(len, heads)) + sum(one.size for one in initializers)
    if total > LIMIT:
        raise UnsupportedError(
            f"the model needs {total / 1e9:.1f} GB, more than the 2 GiB of an ONNX file; quantize it to fewer bits"
        )
    bare = type(model)()
    bare.CopyFrom(model)
    bare.ClearField("graph")
    yield bare.SerializeToString() + _head(GRAPH_IN_MODEL, total) + graph
    for head, one in zip(heads, initializers, strict=True):
        yield head
        yield one.content()


def _head(field: int, length: int) -> bytes:
    """What protobuf writes before a field that has a length: its number, and the length in base 128."""
    found = bytearray([field << 3 | 2])
    while length > 0x7F:
        found.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*found, length])
