"""The graph as ONNX operators: one function per ATen operation, shapes from the captured graph, the batch dynamic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_graph import Emitter
from quantlens.graph.graph import op_name


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
    weight = e.graph.constant(node.args[1])
    assert weight is not None
    product = e.op("MatMul", e.value(node, 0), e.dequantized_weight(node, weight, transpose=True))
    bias = node.args[2] if len(node.args) > 2 else None
    if bias is None:
        return product
    return e.op("Add", product, e.read(bias))


def _conv(e: Emitter, node: fx.Node) -> str:
    weight = e.graph.constant(node.args[1])
    assert weight is not None
    given = dict(enumerate(node.args))
    stride, padding, dilation = (given.get(i, d) for i, d in ((3, 1), (4, 0), (5, 1)))
    groups = given.get(8 if op_name(node) == "aten.convolution.default" else 6, 1)
    if op_name(node) == "aten.convolution.default" and given.get(6):
        raise UnsupportedError("export does not know transposed convolutions")

    def two(value: Any) -> list[int]:
        return [value, value] if isinstance(value, int) else [value[0], value[-1]]

    attributes: dict[str, Any] = {"strides": two(stride), "dilations": two(dilation), "group": groups}
    if isinstance(padding, str):
        attributes["auto_pad"] = "VALID" if padding == "valid" else "SAME_UPPER"
    else:
        attributes["pads"] = two(padding) * 2
    inputs = [e.value(node, 0), e.dequantized_weight(node, weight, transpose=False)]
    if given.get(2) is not None:
        inputs.append(e.read(given[2]))
    return e.op("Conv", *inputs, kernel_shape=list(weight.shape[2:]), **attributes)


def _layer_norm(e: Emitter, node: fx.Node) -> str:
    shape = node.args[1]
    scale = node.args[2] if len(node.args) > 2 else None
    shift = node.args[3] if len(node.args) > 3 else None
    eps = node.args[4] if len(node.args) > 4 else 1e-5
    ones = e.read(scale) if scale is not None else e.constant(np.ones(shape, np.float32))
    inputs = [e.value(node, 0), ones] + ([e.read(shift)] if shift is not None else [])
    return e.op("LayerNormalization", *inputs, axis=-len(shape), epsilon=float(eps))


def _gelu(e: Emitter, node: fx.Node) -> str:
    return e.op("Gelu", e.value(node, 0), approximate=str(node.kwargs.get("approximate", "none")))


def _softmax(e: Emitter, node: fx.Node) -> str:
    return e.op("Softmax", e.value(node, 0), axis=int(node.args[1]))


def _binary(kind: str) -> Callable[[Emitter, fx.Node], str]:
    def write(e: Emitter, node: fx.Node) -> str:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise UnsupportedError(f"export does not know {op_name(node)} with {dict(node.kwargs)}")
        return e.op(kind, e.value(node, 0), e.value(node, 1))

    return write


def _reshape(e: Emitter, node: fx.Node) -> str:
    return e.op("Reshape", e.value(node, 0), e.shape(node.meta["shape"]))


def _permute(e: Emitter, node: fx.Node) -> str:
    rank = len(node.meta["shape"])
    return e.op("Transpose", e.value(node, 0), perm=[d % rank for d in node.args[1]])


def _transpose(e: Emitter, node: fx.Node) -> str:
    order = list(range(len(node.meta["shape"])))
    a, b = (d % len(order) for d in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return e.op("Transpose", e.value(node, 0), perm=order)


def _select(e: Emitter, node: fx.Node) -> str:
    return e.op("Gather", e.value(node, 0), e.constant(np.int64(node.args[2])), axis=int(node.args[1]))


def _index_select(e: Emitter, node: fx.Node) -> str:
    index = e.graph.constant(node.args[2])
    assert index is not None
    first, last = int(index.min()), int(index.max())
    if index.tolist() == list(range(first, last + 1)):
        return _slice_of(e, e.value(node, 0), int(node.args[1]), first, last + 1)
    return e.op("Gather", e.value(node, 0), e.constant(index, dtype=np.int64), axis=int(node.args[1]))


def _pieces(e: Emitter, node: fx.Node) -> str:
    """unbind, split, chunk: written when a piece is read."""
    return e.value(node, 0)


def _getitem(e: Emitter, node: fx.Node) -> str:
    parent, index = node.args
    source, kind = e.names[parent], op_name(parent)
    axis = parent.args[-1] if kind == "aten.unbind.int" and len(parent.args) > 1 else 0
    if kind == "aten.unbind.int":
        return e.op("Gather", source, e.constant(np.int64(index)), axis=int(axis))
    axis = parent.args[2] if len(parent.args) > 2 else 0
    whole = parent.args[0].meta["shape"][axis]
    sizes = parent.args[1]
    if isinstance(sizes, int):
        step = sizes if kind == "aten.split.Tensor" else -(-whole // sizes)
        sizes = [min(step, whole - start) for start in range(0, whole, step)]
    start = sum(sizes[:index])
    return _slice_of(e, source, int(axis), start, start + sizes[index])


def _slice_of(e: Emitter, source: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    parts = (e.constant([v], dtype=np.int64) for v in (start, stop, axis, step))
    return e.op("Slice", source, *parts)


def _slice(e: Emitter, node: fx.Node) -> str:
    given = dict(enumerate(node.args))
    axis, start, stop, step = given.get(1, 0), given.get(2), given.get(3), given.get(4, 1)
    start, stop = start or 0, min(stop, (1 << 31) - 1) if stop is not None else (1 << 31) - 1
    return _slice_of(e, e.value(node, 0), int(axis), int(start), int(stop), int(step))


def _roll(e: Emitter, node: fx.Node) -> str:
    value = e.value(node, 0)
    for shift, axis in zip(node.args[1], node.args[2], strict=True):
        size = node.meta["shape"][axis]
        cut = (-shift) % size
        if cut:
            back = _slice_of(e, value, axis, cut, size)
            front = _slice_of(e, value, axis, 0, cut)
            value = e.op("Concat", back, front, axis=axis)
    return value


def _cat(e: Emitter, node: fx.Node) -> str:
    axis = node.args[1] if len(node.args) > 1 else 0
    return e.op("Concat", *(e.read(a) for a in node.args[0]), axis=int(axis))


def _expand(e: Emitter, node: fx.Node) -> str:
    before, after = node.args[0].meta["shape"], node.meta["shape"]
    if before == after:
        return e.value(node, 0)
    if None not in after:
        shape = e.constant([int(d) for d in after], dtype=np.int64)
    elif after[0] is None and None not in after[1:] and before[0] is not None:
        shape = e.op("Concat", e.batch(), e.constant([int(d) for d in after[1:]], dtype=np.int64), axis=0)
    else:
        raise UnsupportedError(f"export cannot expand {before} to {after}")
    return e.op("Expand", e.value(node, 0), shape)


def _mean(e: Emitter, node: fx.Node) -> str:
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    return e.op("ReduceMean", e.value(node, 0), e.constant(list(node.args[1]), dtype=np.int64), keepdims=int(keep))


def _same(e: Emitter, node: fx.Node) -> str:
    return e.value(node, 0)


def _unary(kind: str) -> Callable[[Emitter, fx.Node], str]:
    return lambda e, node: e.op(kind, e.value(node, 0))


def _silu(e: Emitter, node: fx.Node) -> str:
    value = e.value(node, 0)
    return e.op("Mul", value, e.op("Sigmoid", value))


def _pad(e: Emitter, node: fx.Node) -> str:
    rank, pads = len(node.meta["shape"]), list(node.args[1])
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    fill = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0.0
    return e.op("Pad", e.value(node, 0), e.constant(before + after, dtype=np.int64), e.constant(np.float32(fill)))


OPERATIONS: dict[str, Callable[[Emitter, fx.Node], str]] = {
    "aten.linear.default": _linear,
    "aten.conv2d.default": _conv,
    "aten.conv2d.padding": _conv,
    "aten.convolution.default": _conv,
    "aten.layer_norm.default": _layer_norm,
    "aten.gelu.default": _gelu,
    "aten.softmax.int": _softmax,
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
    "aten.transpose.int": _transpose,
    "aten.select.int": _select,
    "aten.index_select.default": _index_select,
    "aten.unbind.int": _pieces,
    "aten.split.Tensor": _pieces,
    "aten.split_with_sizes.default": _pieces,
    "aten.chunk.default": _pieces,
    "<built-in function getitem>": _getitem,
    "aten.slice.Tensor": _slice,
    "aten.roll.default": _roll,
    "aten.cat.default": _cat,
    "aten.expand.default": _expand,
    "aten.mean.dim": _mean,
    "aten.clone.default": _same,
    "aten.contiguous.default": _same,
    "aten.dropout.default": _same,
    "aten.relu.default": _unary("Relu"),
    "aten.sigmoid.default": _unary("Sigmoid"),
    "aten.tanh.default": _unary("Tanh"),
    "aten.sqrt.default": _unary("Sqrt"),
    "aten.neg.default": _unary("Neg"),
    "aten.silu.default": _silu,
    "aten.constant_pad_nd.default": _pad,
}
"""ATen operation -> how it is written."""
