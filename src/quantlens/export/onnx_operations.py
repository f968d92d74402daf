"""The graph as ONNX operators: one function per ATen operation, shapes from the captured graph, the batch dynamic."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_graph import Emitter
from quantlens.graph.graph import argument, op_name

Writer = Callable[[Emitter, fx.Node], str]

LAST = (1 << 31) - 1
"""The end of a slice that has none."""


def write_graph(e: Emitter) -> str:
    """Write every node of the emitter's graph; returns the name of the logits."""
    for node in e.graph.fx.nodes:
        if node.op == "placeholder":
            e.names[node] = e.output(node, "images")
        elif node.op == "call_function" and not node.meta.get("symbolic"):
            kind = op_name(node)
            if kind.startswith("aten.sym_size"):
                continue
            if kind not in OPERATIONS:
                raise UnsupportedError(
                    f"export knows no ONNX operator for {kind} ({node.meta.get('module') or 'the model'}); "
                    "please report it with the model's name"
                )
            e.names[node] = e.output(node, OPERATIONS[kind](e, node))
    return e.names[e.graph.output]


def _linear(e: Emitter, node: fx.Node) -> str:
    product, bias = e.op("MatMul", e.value(node), e.weight(node, transpose=True)), argument(node, "bias")
    return product if bias is None else e.op("Add", product, e.read(bias))


def _conv(e: Emitter, node: fx.Node) -> str:
    if argument(node, "transposed"):
        raise UnsupportedError("export does not know transposed convolutions")

    def two(name: str) -> list[int]:
        value = argument(node, name)
        return [value, value] if isinstance(value, int) else [value[0], value[-1]]

    attributes: dict[str, Any] = {"strides": two("stride"), "dilations": two("dilation")}
    padding, bias = argument(node, "padding"), argument(node, "bias")
    if isinstance(padding, str):
        attributes["auto_pad"] = "VALID" if padding == "valid" else "SAME_UPPER"
    else:
        attributes["pads"] = two("padding") * 2
    inputs = [e.value(node), e.weight(node), *([] if bias is None else [e.read(bias)])]
    kernel = argument(node, "weight").meta["shape"][2:]
    return e.op("Conv", *inputs, kernel_shape=kernel, group=argument(node, "groups"), **attributes)


def _layer_norm(e: Emitter, node: fx.Node) -> str:
    shape, scale, shift = (argument(node, name) for name in ("normalized_shape", "weight", "bias"))
    inputs = [e.value(node), np.ones(shape, np.float32) if scale is None else e.read(scale)]
    inputs += [] if shift is None else [e.read(shift)]
    return e.op("LayerNormalization", *inputs, axis=-len(shape), epsilon=float(argument(node, "eps")))


def _binary(kind: str) -> Writer:
    def write(e: Emitter, node: fx.Node) -> str:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise UnsupportedError(f"export does not know {op_name(node)} with {dict(node.kwargs)}")
        return e.op(kind, e.value(node, 0), e.value(node, 1))

    return write


def _reshape(e: Emitter, node: fx.Node) -> str:
    dims = node.meta["shape"]
    if dims.count(None) > 1:
        raise UnsupportedError(f"export cannot reshape to {dims}: more than one dimension follows the batch")
    return e.op("Reshape", e.value(node), [-1 if d is None else d for d in dims])


def _permute(e: Emitter, node: fx.Node) -> str:
    """permute and transpose: the order in which the dimensions of a small array end up."""
    rank = len(node.meta["shape"])
    order = node.target(torch.empty(*range(rank), device="meta"), *node.args[1:]).shape  # type: ignore[operator]
    return e.op("Transpose", e.value(node), perm=list(order))


def _select(e: Emitter, node: fx.Node) -> str:
    return e.op("Gather", e.value(node), np.int64(argument(node, "index")), axis=argument(node, "dim"))


def _index_select(e: Emitter, node: fx.Node) -> str:
    index, axis = e.graph.constant(argument(node, "index")), argument(node, "dim")
    assert index is not None
    wanted = index.tolist()
    if wanted == list(range(wanted[0], wanted[0] + len(wanted))):
        return _slice_of(e, e.value(node), axis, wanted[0], wanted[0] + len(wanted))
    return e.op("Gather", e.value(node), wanted, axis=axis)


def _getitem(e: Emitter, node: fx.Node) -> str:
    """A piece of unbind, split or chunk."""
    parent, index = node.args
    source, axis = e.names[parent], argument(parent, "dim")
    if op_name(parent) == "aten.unbind.int":
        return e.op("Gather", source, np.int64(index), axis=axis)
    whole, sizes = parent.args[0].meta["shape"][axis], parent.args[1]
    if isinstance(sizes, int):
        step = sizes if op_name(parent) == "aten.split.Tensor" else -(-whole // sizes)
        start = index * step
        return _slice_of(e, source, axis, start, min(start + step, whole))
    start = sum(sizes[:index])
    return _slice_of(e, source, axis, start, start + sizes[index])


def _slice_of(e: Emitter, source: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    return e.op("Slice", source, [start], [stop], [axis], [step])


def _slice(e: Emitter, node: fx.Node) -> str:
    axis, start, stop, step = (argument(node, name) for name in ("dim", "start", "end", "step"))
    stop = LAST if stop is None else min(stop, LAST)
    return _slice_of(e, e.value(node), axis, start or 0, stop, step)


def _roll(e: Emitter, node: fx.Node) -> str:
    value = e.value(node)
    for shift, axis in zip(argument(node, "shifts"), argument(node, "dims"), strict=True):
        size = node.meta["shape"][axis]
        cut = (-shift) % size
        if cut:
            back, front = _slice_of(e, value, axis, cut, size), _slice_of(e, value, axis, 0, cut)
            value = e.op("Concat", back, front, axis=axis)
    return value


def _cat(e: Emitter, node: fx.Node) -> str:
    return e.op("Concat", *map(e.read, node.args[0]), axis=argument(node, "dim"))


def _expand(e: Emitter, node: fx.Node) -> str:
    before, after = node.args[0].meta["shape"], node.meta["shape"]
    if before == after:
        return e.value(node)
    batch_first = after[0] is None and before[0] is not None
    known = list(after[1:] if batch_first else after)
    if None in known:
        raise UnsupportedError(f"export cannot expand {before} to {after}")
    return e.op("Expand", e.value(node), e.op("Concat", e.batch(), known, axis=0) if batch_first else known)


def _mean(e: Emitter, node: fx.Node) -> str:
    return e.op("ReduceMean", e.value(node), list(argument(node, "dim")), keepdims=int(argument(node, "keepdim")))


def _same(e: Emitter, node: fx.Node) -> str:
    """What changes no value; unbind, split and chunk, too, which are written when a piece is read."""
    return e.value(node)


def _call(kind: str, **attributes: str) -> Writer:
    """An operator of one input. attributes: its own, and the arguments of the ATen operation that they are."""
    return lambda e, node: e.op(kind, e.value(node), **{own: argument(node, name) for own, name in attributes.items()})


def _silu(e: Emitter, node: fx.Node) -> str:
    value = e.value(node)
    return e.op("Mul", value, e.op("Sigmoid", value))


def _pad(e: Emitter, node: fx.Node) -> str:
    pads = list(argument(node, "pad"))
    before, after = pads[-2::-2], pads[::-2]
    rest = [0] * (len(node.meta["shape"]) - len(before))
    return e.op("Pad", e.value(node), rest + before + rest + after, float(argument(node, "value") or 0))


OPERATIONS: dict[str, Writer] = {
    "aten.linear.default": _linear,
    "aten.conv2d.default": _conv,
    "aten.conv2d.padding": _conv,
    "aten.convolution.default": _conv,
    "aten.layer_norm.default": _layer_norm,
    "aten.gelu.default": _call("Gelu", approximate="approximate"),
    "aten.softmax.int": _call("Softmax", axis="dim"),
    "aten.matmul.default": _binary("MatMul"),
    "aten.add.Tensor": _binary("Add"),
    "aten.sub.Tensor": _binary("Sub"),
    "aten.mul.Tensor": _binary("Mul"),
    "aten.mul.Scalar": _binary("Mul"),
    "aten.div.Tensor": _binary("Div"),
    "aten.div.Scalar": _binary("Div"),
    "aten.reshape.default": _reshape,
    "aten.view.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.flatten.using_ints": _reshape,
    "aten.unflatten.int": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.permute.default": _permute,
    "aten.transpose.int": _permute,
    "aten.select.int": _select,
    "aten.index_select.default": _index_select,
    "aten.unbind.int": _same,
    "aten.split.Tensor": _same,
    "aten.split_with_sizes.default": _same,
    "aten.chunk.default": _same,
    "<built-in function getitem>": _getitem,
    "aten.slice.Tensor": _slice,
    "aten.roll.default": _roll,
    "aten.cat.default": _cat,
    "aten.expand.default": _expand,
    "aten.mean.dim": _mean,
    "aten.clone.default": _same,
    "aten.contiguous.default": _same,
    "aten.dropout.default": _same,
    "aten.relu.default": _call("Relu"),
    "aten.sigmoid.default": _call("Sigmoid"),
    "aten.tanh.default": _call("Tanh"),
    "aten.sqrt.default": _call("Sqrt"),
    "aten.neg.default": _call("Neg"),
    "aten.silu.default": _silu,
    "aten.constant_pad_nd.default": _pad,
}
"""ATen operation -> how it is written."""
