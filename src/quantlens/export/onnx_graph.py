"""Writing one ONNX graph: nodes, constants, quantizers.

Numbers cross an edge with a quantizer as QuantizeLinear → DequantizeLinear (codes, scales and zero points of the very
quantizer that was measured), and a weight is stored as its integer codes before a DequantizeLinear. Runtimes fuse these
pairs into integer kernels. Formats without such operators can be written as float operations that reproduce them
(``simulate``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_file import Initializer
from quantlens.formats import AdaLog, GroupScaled, Log, Quantizer, SqrtSoftmax, Uniform
from quantlens.formats.group_scaled import LEAST, MOST, PARTS
from quantlens.graph import Graph

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

    # -- values ------------------------------------------------------------------------------------------------------
    def output(self, node: fx.Node, name: str) -> str:
        """The value of a node as its readers see it: after the quantizer of its output edge, if there is one."""
        for edge in self.edges.get(node, ()):
            if edge.position is None and edge.key in self.quantizers:
                return self.quantize(self.quantizers[edge.key], name, edge.key, len(node.meta["shape"]))
        return name

    def value(self, node: fx.Node, position: int) -> str:
        """Argument ``position`` of a node, after the quantizer of its edge, or a constant."""
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
            inverse = self.constant(quantizer.spread(quantizer.inverse, dims))
            low, high = (self.constant(bound, dtype=np.float32) for bound in quantizer.bounds(dims))
            levels = self.op("Round", self.op("Mul", source, inverse))
            levels = self.op("Min", self.op("Max", levels, low), high)
            return self.op("Mul", levels, self.constant(quantizer.spread(quantizer.scale, dims)))
        if isinstance(quantizer, SqrtSoftmax):
            return self._rows(quantizer, source)
        if isinstance(quantizer, GroupScaled):
            return self._blocks(quantizer, source, dims)
        if isinstance(quantizer, AdaLog) and bool(quantizer.shift != 0):
            shift = self.constant(quantizer.shift)
            return self.op("Sub", self._logarithmic(quantizer, self.op("Add", source, shift)), shift)
        if isinstance(quantizer, Log):
            return self._logarithmic(quantizer, source)
        raise UnsupportedError(f"the format {quantizer.kind!r} cannot be written as ONNX operations yet")

    def _rows(self, quantizer: SqrtSoftmax, source: str) -> str:
        roots = self.op("Sqrt", self.op("Max", source, self.constant(np.float32(0))))
        last = self.constant([-1], dtype=np.int64)
        peak = self.op("Max", self.op("ReduceMax", roots, last), self.constant(np.finfo(np.float32).tiny))
        factor = self.op("Div", self.constant(np.float32(quantizer.qmax)), peak)
        k = self.op("Round", self.op("Mul", roots, factor))
        squares = self.op("Mul", k, k)
        total = self.op("Max", self.op("ReduceSum", squares, last), self.constant(np.float32(1)))
        return self.op("Div", squares, total)

    def _blocks(self, quantizer: GroupScaled, source: str, dims: int) -> str:
        keys = [*range(dims - 2), dims - 1, dims - 2]
        turned = source if quantizer.axis == -1 else self.op("Transpose", source, perm=keys)
        apart = self.constant([0] * (dims - 1) + [-1, quantizer.group_size], dtype=np.int64)
        x = self.op("Reshape", turned, apart)
        last = self.constant([-1], dtype=np.int64)
        size = self.op("Sqrt", self.op("ReduceMean", self.op("Mul", x, x), last))
        octaves = self.op("Log", self.op("Mul", size, self.constant(quantizer.scale)))
        parts = self.op("Round", self.op("Mul", octaves, self.constant(np.float32(PARTS / np.log(2.0)))))
        exponent = self.op("Clip", parts, self.constant(np.float32(LEAST)), self.constant(np.float32(MOST)))
        index = self.op("Cast", self.op("Sub", exponent, self.constant(np.float32(LEAST))), to=7)
        scale, half = self.op("Gather", self.constant(quantizer.powers), index), self.constant(np.float32(0.5))
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
        k = self.op("Add", octaves, self.constant(np.float32(quantizer.offset)))
        last = float(quantizer.qmax - 1)
        is_zero = self.op("Greater", k, self.constant(np.float32(last + quantizer.steps)))
        nearest = self.op("Clip", self.op("Round", k), self.constant(np.float32(0)), self.constant(np.float32(last)))
        code = self.op("Where", is_zero, self.constant(np.float32(last + 1)), nearest)
        return self.op("Gather", self.constant(quantizer.levels), self.op("Cast", code, to=7))

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
