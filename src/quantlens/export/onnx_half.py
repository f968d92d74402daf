"""The float part of an ONNX graph in float16, for runtimes that take the types of a file as they are (TensorRT).

Codes and scales stay what they were: a scale that is no number of float16 is refused. LayerNorm is computed in float32
between casts, as squares of a residual stream exceed float16's range.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_file import Initializer
from quantlens.export.onnx_graph import Emitter

FLOAT, HALF = 1, 10
"""ONNX's numbers of the types."""

LARGEST = float(np.finfo(np.float16).max)

IN_FLOAT = {"Resize": (1, 2), "LayerNormalization": (1, 2)}
"""Operators -> places of inputs that stay float32."""

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def to_half(e: Emitter, inputs: Iterable[str]) -> Callable[[str], str]:
    """Rewrite what was written so far; float inputs of the file, of these names, are cast. Returns a function of a
    value that gives it in float32 again, for what is written after.

    Raises UnsupportedError for a scale of a quantizer that float16 does not have.
    """
    floats = {name for name, one in e.constants.items() if one.proto.data_type == FLOAT}
    nodes, e.nodes = e.nodes, []
    renamed = {name: e.op("Cast", name, to=HALF, out=f"{name}.half") for name in inputs}
    for node in nodes:
        single = IN_FLOAT.get(node.op_type, ())
        for place, name in enumerate(node.input):
            if name in floats and place not in single:
                node.input[place] = _half(e, name, scale=place == 1 and node.op_type in QUANTIZERS)
            node.input[place] = renamed.get(node.input[place], node.input[place])
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == FLOAT:
                attribute.i = HALF
            if attribute.HasField("t") and attribute.t.data_type == FLOAT:
                attribute.t.CopyFrom(_tensor(attribute.t))
        if node.op_type == "LayerNormalization":
            node.input[0] = e.op("Cast", node.input[0], to=FLOAT)
            made, node.output[0], node.name = node.output[0], f"{node.output[0]}.float32", f"{node.name}.float32"
            e.nodes.append(node)
            e.op("Cast", node.output[0], to=HALF, out=made)
        else:
            e.nodes.append(node)
    used = {name for node in e.nodes for name in node.input}
    e.constants = {name: one for name, one in e.constants.items() if name in used}
    return lambda name: name if name in e.constants else e.op("Cast", renamed.get(name, name), to=FLOAT)


def _half(e: Emitter, name: str, *, scale: bool) -> str:
    """A constant in float16, written once."""
    found, given = f"{name}.half", e.constants[name]
    if found not in e.constants:
        proto = type(given.proto)()
        proto.CopyFrom(given.proto)
        proto.name, proto.data_type = found, HALF
        e.constants[found] = Initializer(proto, given.size // 2, lambda: _narrow(given.content()).tobytes())
    if scale:
        own = np.frombuffer(given.content(), "<f4")
        if not np.array_equal(own, own.astype(np.float16).astype(np.float32)):
            raise UnsupportedError(
                f"{name.removesuffix('.scale')} has a scale that float16 does not have: quantize with --target "
                "tensorrt, or export without --half"
            )
    return found


def _narrow(raw: bytes) -> np.ndarray:
    """float16 of float32; what lies beyond its range, a mask's -inf too, is its largest number."""
    return np.frombuffer(raw, "<f4").clip(-LARGEST, LARGEST).astype("<f2")


def _tensor(tensor: Any) -> Any:
    from onnx import numpy_helper

    array = numpy_helper.to_array(tensor)
    return numpy_helper.from_array(_narrow(array.tobytes()).reshape(array.shape), tensor.name)
