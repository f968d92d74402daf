"""The graph as ONNX operators: one function per ATen operation, shapes from the captured graph, the batch dynamic.

Numbers cross an edge with a quantizer as QuantizeLinear → DequantizeLinear (codes, scales and zero points of the very
quantizer that was measured), and a weight is stored as its integer codes behind a DequantizeLinear. Runtimes fuse these
pairs into integer kernels. Formats without such operators can be written as float operations that reproduce them
(``simulate``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_file import Initializer
from quantlens.formats import AdaLog, BlockScaled, Log, Quantizer, SquaredRows, Uniform
from quantlens.formats.group_scaled import LEAST, MOST, PARTS
from quantlens.graph import Graph
from quantlens.graph.graph import op_name

OPSET = 21
"""ONNX operator set written: the first with 4-bit weights in DequantizeLinear."""

IR_VERSION = 10

CODE_TYPES = {(8, True): "INT8", (8, False): "UINT8", (4, True): "INT4", (4, False): "UINT4"}
"""Widths that QuantizeLinear and DequantizeLinear have types for (16 bits are no use to kernels)."""

WEIGHT_TYPES = CODE_TYPES | {(bits, True): "INT8" for bits in (5, 6, 7)}
"""The same for weights: codes of 5 to 7 bits are codes of 8. An activation's would have to be clipped apart."""


class Emitter:
    """Writes nodes and constants of one ONNX graph.

    simulate: formats that ONNX cannot hold as integers become float operations instead of an error.
    """

    def __init__(self, graph: Graph, quantizers: dict[str, Quantizer], *, simulate: bool = False):
        self.graph, self.quantizers, self.simulate = graph, quantizers, simulate
        self.nodes: list[Any] = []
        self.constants: dict[str, Initializer] = {}
        self.names: dict[fx.Node, str] = {}
        self.edges = graph.sites.edges_by_node
        self._count = 0
        self._placed: dict[tuple[str, int], str] = {}
        self._dims: dict[fx.Node, str] = {}

    # -- writing ------------------------------------------------------------------------------------------------------
    def op(self, kind: str, *inputs: str, domain: str = "", out: str | None = None, **attributes: Any) -> str:
        """One node with one output; returns the output's name."""
        from onnx import helper

        name = out or self.fresh(kind)
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"{name}.op", domain=domain, **attributes))
        return name

    def fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def constant(self, value: Any, name: str | None = None, dtype: Any = None) -> str:
        """An initializer from a tensor, array, list or number; the same array under one name is written once."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if dtype is not None:
            array = array.astype(dtype)
        elif array.dtype == np.float64:
            array = array.astype(np.float32)
        name = name or self.fresh("const")
        if name not in self.constants:
            self.constants[name] = Initializer.of(name, array)
        return name

    def codes(self, codes: np.ndarray, kind: str, name: str) -> str:
        """An initializer of integer codes; 4-bit ones are packed two to a byte."""
        from onnx import TensorProto

        raw = codes.astype(np.int8 if kind == "INT8" else np.uint8)
        if kind in ("INT4", "UINT4"):
            flat = np.append(codes.reshape(-1), 0)[: codes.size + codes.size % 2].astype(np.int16) & 0xF
            raw = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
        made = Initializer(name, getattr(TensorProto, kind), codes.shape, raw.nbytes, lambda: raw.tobytes())
        self.constants[name] = made
        return name

    # -- the graph ----------------------------------------------------------------------------------------------------
    def run(self) -> str:
        """Write every node; returns the name of the logits."""
        for node in self.graph.fx.nodes:
            if node.op == "placeholder":
                self.names[node] = self._behind(node, "images")
            elif node.op == "call_function" and not node.meta.get("symbolic"):
                kind = op_name(node)
                if kind.startswith("aten.sym_size"):
                    continue
                if kind not in OPERATIONS:
                    raise UnsupportedError(
                        f"export knows no ONNX operator for {kind} ({node.meta.get('module') or 'the model'}); "
                        "please report it with the model's name"
                    )
                name = OPERATIONS[kind](self, node)
                self.names[node] = self._behind(node, name)
        return self.names[self.graph.output]

    def _behind(self, node: fx.Node, name: str) -> str:
        """The value of a node as its readers see it: behind the quantizer of its output edge, if there is one."""
        for edge in self.edges.get(node, ()):
            if edge.position is None and edge.key in self.quantizers:
                return self.quantize(self.quantizers[edge.key], name, edge.key, len(node.meta["shape"]))
        return name

    def value(self, node: fx.Node, position: int) -> str:
        """Argument ``position`` of a node, behind the quantizer of its edge, or a constant."""
        argument = node.args[position]
        for edge in self.edges.get(node, ()):
            if edge.position == position and not edge.is_weight and edge.key in self.quantizers:
                source = self.read(argument)
                shape = argument.meta.get("shape") or ()
                return self.quantize(self.quantizers[edge.key], source, edge.key, len(shape))
        return self.read(argument)

    def read(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            constant = self.graph.constant(argument)
            if constant is not None:
                return self.constant(constant, str(argument.target))
            return self.names[argument]
        if isinstance(argument, int | float | bool):
            return self.constant(np.float32(argument))
        raise UnsupportedError(f"export cannot read an argument of type {type(argument).__name__}")

    def weight_quantizer(self, node: fx.Node) -> tuple[str, Quantizer] | None:
        for edge in self.edges.get(node, ()):
            if edge.is_weight and edge.key in self.quantizers:
                return edge.key, self.quantizers[edge.key]
        return None

    # -- quantizers ---------------------------------------------------------------------------------------------------
    def quantize(self, quantizer: Quantizer, source: str, key: str, dims: int) -> str:
        """An activation through a quantizer. The same parameters on the same value are written once."""
        mark = (source, _identity(quantizer))
        if mark not in self._placed:
            if is_integer(quantizer):
                self._placed[mark] = self._pair(quantizer, source, key)
            elif self.simulate:
                self._placed[mark] = self._simulated(quantizer, source, dims)
            else:
                raise refused(key, quantizer)
        return self._placed[mark]

    def _pair(self, quantizer: Quantizer, source: str, key: str) -> str:
        assert isinstance(quantizer, Uniform)
        scale, zero = self._parameters(quantizer, key)
        axis: dict[str, Any] = {} if quantizer.axis is None else {"axis": quantizer.axis}
        codes = self.op("QuantizeLinear", source, scale, zero, out=f"{key}.codes", **axis)
        return self.op("DequantizeLinear", codes, scale, zero, out=f"{key}.value", **axis)

    def _parameters(self, quantizer: Uniform, key: str) -> tuple[str, str]:
        kind = WEIGHT_TYPES[quantizer.bits, quantizer.signed]
        scale = self.constant(quantizer.scale, f"{key}.scale")
        zero = self.codes(quantizer.zero_point.cpu().numpy(), kind, f"{key}.zero_point")
        return scale, zero

    def _simulated(self, quantizer: Quantizer, source: str, dims: int) -> str:
        """A quantizer as float operations that give its values."""
        if isinstance(quantizer, Uniform):
            spread = [quantizer._spread(t, dims) for t in (quantizer._inverse, quantizer._low, quantizer._high)]
            inverse, low, high = (self.constant(t) for t in spread)
            levels = self.op("Round", self.op("Mul", source, inverse))
            levels = self.op("Min", self.op("Max", levels, low), high)
            return self.op("Mul", levels, self.constant(quantizer._spread(quantizer.scale, dims)))
        if isinstance(quantizer, SquaredRows):
            return self._rows(quantizer, source)
        if isinstance(quantizer, BlockScaled):
            return self._blocks(quantizer, source, dims)
        if isinstance(quantizer, AdaLog) and bool(quantizer.shift != 0):
            shift = self.constant(quantizer.shift)
            return self.op("Sub", self._logarithmic(quantizer, self.op("Add", source, shift)), shift)
        if isinstance(quantizer, Log):
            return self._logarithmic(quantizer, source)
        raise UnsupportedError(f"the format {quantizer.kind!r} cannot be written as ONNX operations yet")

    def _rows(self, quantizer: SquaredRows, source: str) -> str:
        roots = self.op("Sqrt", self.op("Max", source, self.constant(np.float32(0))))
        last = self.constant([-1], dtype=np.int64)
        peak = self.op("Max", self.op("ReduceMax", roots, last), self.constant(np.finfo(np.float32).tiny))
        factor = self.op("Div", self.constant(np.float32(quantizer.qmax)), peak)
        k = self.op("Round", self.op("Mul", roots, factor))
        squares = self.op("Mul", k, k)
        total = self.op("Max", self.op("ReduceSum", squares, last), self.constant(np.float32(1)))
        return self.op("Div", squares, total)

    def _blocks(self, quantizer: BlockScaled, source: str, dims: int) -> str:
        keys = [*range(dims - 2), dims - 1, dims - 2]
        turned = source if quantizer.axis == -1 else self.op("Transpose", source, perm=keys)
        apart = self.constant([0] * (dims - 1) + [-1, quantizer.block], dtype=np.int64)
        x = self.op("Reshape", turned, apart)
        last = self.constant([-1], dtype=np.int64)
        size = self.op("Sqrt", self.op("ReduceMean", self.op("Mul", x, x), last))
        octaves = self.op("Log", self.op("Mul", size, self.constant(quantizer.scale)))
        parts = self.op("Round", self.op("Mul", octaves, self.constant(np.float32(PARTS / np.log(2.0)))))
        exponent = self.op("Clip", parts, self.constant(np.float32(LEAST)), self.constant(np.float32(MOST)))
        index = self.op("Cast", self.op("Sub", exponent, self.constant(np.float32(LEAST))), to=7)
        scale, half = self.op("Gather", self.constant(quantizer._powers), index), self.constant(np.float32(0.5))
        units = self.op("Mul", x, self.op("Reciprocal", scale))  # as the format does: a quotient has other last bits
        levels = self.op("Round", self.op("Sub", units, half))
        ends = (self.constant(np.float32(end)) for end in (quantizer.qmin, quantizer.qmax))
        value = self.op("Mul", self.op("Add", self.op("Clip", levels, *ends), half), scale)
        value = self.op("Reshape", value, self.constant([0] * (dims - 1) + [-1], dtype=np.int64))
        return value if quantizer.axis == -1 else self.op("Transpose", value, perm=keys)

    def _logarithmic(self, quantizer: Log, source: str) -> str:
        """Values of a log format, before an AdaLog's shift."""
        positive = self.op("Max", source, self.constant(np.float32(1e-38)))
        octaves = self.op("Mul", self.op("Log", positive), self.constant(np.float32(-quantizer.steps / np.log(2.0))))
        k = self.op("Add", octaves, self.constant(np.float32(quantizer._offset)))
        last = float(quantizer.qmax - 1)
        is_zero = self.op("Greater", k, self.constant(np.float32(last + quantizer.steps)))
        nearest = self.op("Clip", self.op("Round", k), self.constant(np.float32(0)), self.constant(np.float32(last)))
        code = self.op("Where", is_zero, self.constant(np.float32(last + 1)), nearest)
        return self.op("Gather", self.constant(quantizer._table), self.op("Cast", code, to=7))

    def dequantized_weight(self, node: fx.Node, weight: Tensor, *, transpose: bool) -> str:
        """The weight of a linear or conv node, quantized if it has a quantizer; transposed to [in, out] on request."""
        name = str(node.args[1].target)  # type: ignore[union-attr]
        found = self.weight_quantizer(node)
        if found is None:
            return self.constant(weight.T if transpose else weight, f"{name}.T" if transpose else name)
        key, quantizer = found
        if not is_integer(quantizer, WEIGHT_TYPES):
            if not self.simulate:
                raise refused(key, quantizer)
            value = quantizer(weight)
            return self.constant(value.T if transpose else value, f"{key}.value")
        assert isinstance(quantizer, Uniform)
        codes = quantizer.encode(weight).cpu().numpy()
        kind = WEIGHT_TYPES[quantizer.bits, quantizer.signed]
        data = self.codes(codes.T if transpose else codes, kind, f"{key}.codes")
        scale, zero = self._parameters(quantizer, key)
        axis: dict[str, Any] = {} if quantizer.axis is None else {"axis": 1 if transpose else 0}
        return self.op("DequantizeLinear", data, scale, zero, out=f"{key}.value", **axis)

    # -- shapes -------------------------------------------------------------------------------------------------------
    def shape(self, dims: Any) -> str:
        """A shape with at most one unknown dimension as a constant for Reshape."""
        fixed = [-1 if d is None else int(d) for d in dims]
        if fixed.count(-1) > 1:
            raise UnsupportedError(f"export cannot reshape to {dims}: more than one dimension follows the batch")
        return self.constant(fixed, dtype=np.int64)

    def batch(self) -> str:
        """The batch size as int64 [1]."""
        if "batch" not in {n.output[0] for n in self.nodes}:
            self.op("Shape", "images", out="batch", start=0, end=1)
        return "batch"


def is_integer(quantizer: Quantizer, types: Mapping[tuple[int, bool], str] = CODE_TYPES) -> bool:
    """Whether ONNX has an integer type for the format: uniform, of a width in ``types``, zero points that are codes."""
    if type(quantizer) is not Uniform or (quantizer.bits, quantizer.signed) not in types:
        return False
    zero = quantizer.zero_point
    return bool(((zero >= quantizer.qmin) & (zero <= quantizer.qmax)).all())


def refused(key: str, quantizer: Quantizer) -> UnsupportedError:
    """The error for a format that no runtime computes in."""
    what = f"{quantizer.kind}, {quantizer.bits} bits"
    return UnsupportedError(
        f"{key} has the format {what}, which ONNX has no integers for: uniform formats of 8 or 4 bits are exported, "
        "of weights also 5 to 7. "
        "Quantize for a runtime (`quantlens quantize --target openvino-cpu`), or export with --simulate, which keeps "
        "the format as float operations"
    )


def _identity(quantizer: Quantizer) -> int:
    import hashlib

    digest = hashlib.sha256(repr(sorted(quantizer.config().items())).encode())
    for name, value in sorted(quantizer.tensors().items()):
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


# -- operations -------------------------------------------------------------------------------------------------------
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
