"""The graph as ONNX operators: one function or one line of data per ATen operation, the batch dynamic.

Operations that depend on no input are computed here and written as constants.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_arithmetic import ARITHMETIC, Writer
from quantlens.export.onnx_graph import Emitter
from quantlens.export.onnx_moves import MOVES, slice_of
from quantlens.export.onnx_spatial import SPATIAL
from quantlens.export.onnx_values import described, is_size
from quantlens.graph.graph import argument, op_name

NO_BIAS = 1e-30
"""A bias that changes no sum, and that no runtime takes for zeros and leaves out."""


def write_graph(e: Emitter, inputs: Sequence[str] = ("images",)) -> list[str]:
    """Write every node of the emitter's graph, whose inputs have these names; returns the names of its outputs.

    Raises UnsupportedError, before anything is written, naming the operations that are not known.
    """
    written = [n for n in e.graph.fx.nodes if n.op == "call_function" and not is_size(n) and n not in e.folded]
    unknown = dict.fromkeys(described(node) for node in written if op_name(node) not in OPERATIONS)
    if unknown:
        shown = list(unknown)[:3]
        more = f" and {len(unknown) - len(shown)} more" if len(unknown) > len(shown) else ""
        raise UnsupportedError(
            f"export knows no ONNX operator for {', '.join(shown)}{more}; please report it with the model's name"
        )
    for node, name in zip(e.graph.inputs, inputs, strict=True):
        e.names[node] = e.output(node, name)
    for node in written:
        made = OPERATIONS[op_name(node)](e, node)
        e.names[node] = e.output(node, made) if isinstance(made, str) else made
    return [e.read(node) for node in e.graph.outputs]


# ---- layers with weights ---------------------------------------------------------------------------------------------


def _linear(e: Emitter, node: fx.Node) -> str:
    if e.known(node.args[1]) is None:
        turned = list(range(len(e.sizes(node.args[1]))))
        weight = e.op("Transpose", e.value(node, 1), perm=turned[:-2] + turned[-2:][::-1])
    else:
        weight = e.weight(node, transpose=True)
    product, bias = e.op("MatMul", e.value(node), weight), argument(node, "bias")
    return product if bias is None else e.op("Add", product, e.read(bias))


def _conv(e: Emitter, node: fx.Node) -> str:
    """Convolutions of one, two or three dimensions, transposed or not."""
    kernel = e.sizes(node.args[1])[2:]

    def each(name: str, default: Any = 0) -> list[int]:
        value = argument(node, name, default)
        value = [value] if isinstance(value, int) else list(value)
        return value * (len(kernel) // len(value))

    attributes: dict[str, Any] = {"strides": each("stride"), "dilations": each("dilation")}
    padding, bias = argument(node, "padding"), argument(node, "bias")
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(attributes["dilations"], kernel, strict=True)]
        attributes["pads"] = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        attributes["pads"] = [0] * 2 * len(kernel) if padding == "valid" else each("padding") * 2
    kind = "Conv"
    if argument(node, "transposed", "transpose" in op_name(node)):
        kind, attributes["output_padding"] = "ConvTranspose", each("output_padding")
    weight = e.value(node, 1) if e.known(node.args[1]) is None else e.weight(node)
    inputs = [e.value(node), weight, *([] if bias is None else [e.read(bias)])]
    if bias is None and e.key(node, 1):
        # of an integer convolution without one OpenVINO gets the scale wrong where two operations read its value
        inputs.append(e.constant(np.full(e.sizes(node)[1], NO_BIAS, np.float32)))
    found = e.op(kind, *inputs, kernel_shape=list(kernel), group=argument(node, "groups"), **attributes)
    quantizer = e.quantizers.get(e.key(node, 1) or "")
    if argument(node, "groups") > 1 and e.sizes(node.args[1])[1] > 1 and not getattr(quantizer, "signed", False):
        e.grouped.add(found)
    return found


def _layer_norm(e: Emitter, node: fx.Node) -> str:
    shape, scale, shift = (argument(node, name) for name in ("normalized_shape", "weight", "bias"))
    inputs = [e.value(node), np.ones(shape, np.float32) if scale is None else e.read(scale)]
    inputs += [] if shift is None else [e.read(shift)]
    return e.op("LayerNormalization", *inputs, axis=-len(shape), epsilon=float(argument(node, "eps")))


def _rms_norm(e: Emitter, node: fx.Node) -> str:
    x, scale, eps = e.value(node), argument(node, "weight"), argument(node, "eps")
    axes = list(range(-len(argument(node, "normalized_shape")), 0))
    power = e.op("ReduceMean", e.op("Mul", x, x), axes, keepdims=1)
    eps = float(np.finfo(np.float32).eps if eps is None else eps)
    normed = e.op("Div", x, e.op("Sqrt", e.op("Add", power, eps)))
    return normed if scale is None else e.op("Mul", normed, e.read(scale))


def _batch_norm(e: Emitter, node: fx.Node) -> str:
    if argument(node, "training") or argument(node, "running_mean") is None:
        raise UnsupportedError(f"export cannot write {described(node)} with the statistics of its batch")
    width, inputs = e.sizes(node.args[0])[1], []
    for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        given = argument(node, name)
        inputs.append(np.full(width, fill, np.float32) if given is None else e.read(given))
    return e.op("BatchNormalization", e.value(node), *inputs, epsilon=float(argument(node, "eps")))


def _group_norm(e: Emitter, node: fx.Node) -> str:
    """Groups of channels, or channels alone (instance norm), normalised over all their places."""
    batch, width, *places = e.sizes(node.args[0])
    groups = argument(node, "num_groups", argument(node, "group", width))
    scale, shift = argument(node, "weight"), argument(node, "bias")
    count = width // groups * int(np.prod(e.whole(node, *places)))
    grouped = e.reshape(e.value(node), [batch, groups, count])
    ones = np.ones(count, np.float32)
    normed = e.op("LayerNormalization", grouped, ones, axis=-1, epsilon=float(argument(node, "eps")))
    value = e.reshape(normed, [batch, width, *places])
    for kind, given in (("Mul", scale), ("Add", shift)):
        if given is not None:
            held, sizes = e.known(given), [1, width, *[1] * len(places)]
            value = e.op(kind, value, e.reshape(e.read(given), sizes) if held is None else held.reshape(sizes))
    return value


def _instance_norm(e: Emitter, node: fx.Node) -> str:
    return _group_norm(e, node) if argument(node, "use_input_stats") else _batch_norm(e, node)


def _lstm(e: Emitter, node: fx.Node) -> list[str]:
    """Layers of LSTM, of one direction or both: the outputs, and the last hidden and cell states."""
    both, turned = bool(argument(node, "bidirectional")), [1, 0, 2] if argument(node, "batch_first") else [0, 1, 2]
    held, directions = [e.known(given) for given in argument(node, "params")], 2 if both else 1
    count = 4 if argument(node, "has_biases") else 2
    layers, states = int(argument(node, "num_layers")), [e.read(state) for state in argument(node, "hx")]
    if any(given is None for given in held) or len(held) != layers * directions * count:
        raise UnsupportedError(f"export cannot write {described(node)} with projections or weights that are computed")
    gates = [given.unflatten(0, (4, -1))[[0, 3, 1, 2]].flatten(0, 1) for given in held if given is not None]
    value, ends = e.op("Transpose", e.value(node), perm=turned), []
    for first in range(0, layers * directions, directions):
        own = [gates[count * place : count * (place + 1)] for place in range(first, first + directions)]
        weight, recurrent, *bias = (torch.stack(parts) for parts in zip(*own, strict=True))
        starts = [slice_of(e, state, 0, first, first + directions) for state in states]
        inputs = [value, weight, recurrent, torch.cat(bias, 1) if bias else None, None, *starts]
        how = {"hidden_size": recurrent.shape[-1], "direction": "bidirectional" if both else "forward"}
        value, *last = e.ops("LSTM", *inputs, outs=3, **how)
        value = e.op("Reshape", e.op("Transpose", value, perm=[0, 2, 1, 3]), [0, 0, -1])
        ends.append(last)
    return [
        e.op("Transpose", value, perm=turned),
        *(e.op("Concat", *parts, axis=0) for parts in zip(*ends, strict=True)),
    ]


def _first(writer: Writer) -> Writer:
    """For an operation that gives several values, of which all but the first are for training."""
    return lambda e, node: [writer(e, node)]


LAYERS: dict[str, Writer] = {
    "aten.linear.default": _linear,
    **dict.fromkeys(
        (
            *(f"aten.conv{n}d.{kind}" for n in (1, 2, 3) for kind in ("default", "padding")),
            "aten.convolution.default",
            "aten.conv_transpose1d.default",
            "aten.conv_transpose2d.input",
            "aten.conv_transpose3d.input",
        ),
        _conv,
    ),
    "aten.lstm.input": _lstm,
    "aten.layer_norm.default": _layer_norm,
    "aten.native_layer_norm.default": _first(_layer_norm),
    "aten.rms_norm.default": _rms_norm,
    "aten.batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _first(_batch_norm),
    "aten.group_norm.default": _group_norm,
    "aten.native_group_norm.default": _first(_group_norm),
    "aten.instance_norm.default": _instance_norm,
}

OPERATIONS: dict[str, Writer] = {**ARITHMETIC, **MOVES, **SPATIAL, **LAYERS}
"""ATen operation -> how it is written: the name of its value, or a list of names."""
