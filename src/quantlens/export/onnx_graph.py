"""Writing one ONNX graph: nodes, constants, quantizers.

Numbers cross an edge with a quantizer as QuantizeLinear → DequantizeLinear (codes, scales and zero points of the very
quantizer that was measured), and a weight is stored as its integer codes before a DequantizeLinear. Runtimes fuse these
pairs into integer kernels. Formats without such operators can be written as float operations that reproduce them
(``simulate``).
"""

from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_file import Initializer
from quantlens.export.onnx_values import Size, constants, described, fixed, kind_of, values
from quantlens.formats import LEAST, MOST, PARTS, AdaLog, GroupAffine, Grouped, Log, Quantizer, SqrtSoftmax, Uniform
from quantlens.graph import Graph
from quantlens.graph.graph import op_name

OPSET = 21
"""ONNX operator set written: the first with 4-bit weights in DequantizeLinear."""

IR_VERSION = 10

CODE_TYPES = {(8, True): "INT8", (8, False): "UINT8", (4, True): "INT4", (4, False): "UINT4"}
"""Width of codes and whether they are signed -> the type that Quantize- and DequantizeLinear have for them (16 bits are
no use to kernels)."""

WEIGHT_TYPES = CODE_TYPES | {(bits, True): "INT8" for bits in (5, 6, 7)}
"""The same for weights: codes of 5 to 7 bits are codes of 8. An activation's would have to be clipped apart."""

KINDS: dict[str, tuple[Any, int]] = {"float": (np.float32, 1), "int": (np.int64, 7), "bool": (np.bool_, 9)}
"""Kind of a value -> its type in NumPy and ONNX's number of it. A file has no others: half precision is computed in
float32."""

TINY = float(np.finfo(np.float32).tiny)
LOWEST = float(np.finfo(np.float32).min)


class Emitter:
    """Writes nodes and constants of one ONNX graph.

    simulate: formats that ONNX cannot hold as integers become float operations instead of an error.
    """

    def __init__(self, graph: Graph, quantizers: dict[str, Quantizer], *, simulate: bool = False):
        self.graph, self.quantizers, self.simulate = graph, quantizers, simulate
        self.nodes: list[Any] = []
        self.constants: dict[str, Initializer] = {}
        self.names: dict[fx.Node, Any] = {}
        self.folded = constants(graph)
        self.values = values(graph, self.folded)
        self.fixed = fixed(graph)
        self.edges = graph.sites.edges_by_node
        self.grouped: set[str] = set()
        """Results of grouped convolutions that are computed in float."""
        self._count = 0
        self._placed: dict[tuple[str, str], str] = {}

    # -- writing ------------------------------------------------------------------------------------------------------
    def op(self, kind: str, *inputs: Any, out: str | None = None, **attributes: Any) -> str:
        """One node with one output; returns the output's name. An input that is no name is written as a constant, None
        is an input left out."""
        return self.ops(kind, *inputs, outs=[out or self._fresh(kind)], **attributes)[0]

    def ops(self, kind: str, *inputs: Any, outs: Sequence[str] | int, **attributes: Any) -> list[str]:
        """The same with several outputs: their names, or how many."""
        from onnx import helper

        filled = ("" if value is None else value for value in inputs)
        names = [value if isinstance(value, str) else self.constant(value) for value in filled]
        found = [self._fresh(kind) for _ in range(outs)] if isinstance(outs, int) else list(outs)
        self.nodes.append(helper.make_node(kind, names, found, name=f"{found[0]}.op", **attributes))
        return found

    def keep(self, names: Iterable[str]) -> None:
        """Leave out the nodes and constants that none of these values needs."""
        needed, kept = set(names), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}

    def _fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def constant(self, value: Any, name: str | None = None) -> str:
        """An initializer from a tensor, array, number (float32) or list of integers (int64); the same array under one
        name is written once."""
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if kind_of(value.dtype) == "float" else value).numpy()
        array = np.asarray(value)
        kind = "float" if array.dtype.kind == "f" else "bool" if array.dtype.kind == "b" else "int"
        array = array.astype(KINDS[kind][0], copy=False)
        name = name or self._fresh("const")
        self.constants.setdefault(name, Initializer.of(name, array))
        return name

    def codes(self, codes: Tensor, quantizer: Uniform, name: str) -> str:
        """An initializer of integer codes; 4-bit ones are packed two to a byte."""
        from onnx import TensorProto

        kind, values = WEIGHT_TYPES[quantizer.bits, quantizer.signed], codes.cpu().numpy()
        raw = values.astype(np.int8 if quantizer.signed else np.uint8)
        if quantizer.bits == 4:
            flat = np.pad(raw.reshape(-1), (0, raw.size % 2)).astype(np.uint8) & 0xF
            raw = flat[0::2] | (flat[1::2] << 4)
        proto = TensorProto(name=name, data_type=getattr(TensorProto, kind), dims=values.shape)
        self.constants[name] = Initializer(proto, raw.nbytes, raw.tobytes)
        return name

    def info(self, name: str, kind: str, sizes: Sequence[Any]) -> Any:
        """What a file says of an input or output. The batch is "batch", a multiple of it is called after it."""
        from onnx import helper

        said = [f"{s.per_image}*batch+{s.fixed}" if isinstance(s, Size) else s for s in sizes]
        dims = ["batch" if size == Size(1) else text for size, text in zip(sizes, said, strict=True)]
        return helper.make_tensor_value_info(name, KINDS[kind][1], dims)

    # -- values ------------------------------------------------------------------------------------------------------
    def output(self, node: fx.Node, name: str) -> str:
        """The value of a node as its readers see it: after the quantizer of its output edge, if there is one."""
        return self._quantized(node, None, name, node)

    def value(self, node: fx.Node, position: int = 0) -> str:
        """Argument ``position`` of a node, after the quantizer of its edge, or a constant."""
        argument: Any = node.args[position]
        return self._quantized(node, position, self.read(argument), argument)

    def read(self, argument: Any, kind: str | None = None) -> str:
        """A node's value or a number, without the quantizer of an edge; as another kind on request."""
        if not isinstance(argument, fx.Node):
            return self.constant(KINDS[kind or "float"][0](argument))
        if argument.meta.get("symbolic"):
            size = self.op("Squeeze", self.shape([self.values[argument]]), [0])
            return self.cast(size, "int", kind)
        held = self.known(argument)
        if held is None:
            name = self.names[argument]
        else:
            name = self.constant(held, str(argument.target) if argument.op == "get_attr" else f"{argument.name}.folded")
        return self.cast(name, self.values[argument].kind, kind)

    def known(self, argument: Any) -> Tensor | None:
        """The tensor that a node always gives; None for one that depends on an input."""
        return self.folded.get(argument) if argument in self.folded else self.graph.constant(argument)

    def operand(self, node: fx.Node, position: int, kind: str | None = None) -> str:
        """As :meth:`value`, as a kind."""
        argument: Any = node.args[position]
        if not isinstance(argument, fx.Node) or argument.meta.get("symbolic"):
            return self.read(argument, kind)
        return self.cast(self.value(node, position), self.values[argument].kind, kind)

    def factor(self, node: fx.Node, position: int, kind: str | None = None) -> str:
        """The same of a product; a linear layer's result apart from factors that are fixed and differ by token, of
        which OpenVINO takes the first token's for scales of the layer's channels."""
        name, (own, other) = self.operand(node, position, kind), (node.args[position], node.args[1 - position])
        scaled = isinstance(own, fx.Node) and op_name(own) == "aten.linear.default" and other in self.fixed
        return self.apart(name) if scaled and set(self.sizes(other)[:-1]) - {1} else name

    def cast(self, name: str, kind: str, wanted: str | None) -> str:
        """A value of one kind as another (None: as it is)."""
        return name if wanted in (None, kind) else self.op("Cast", name, to=KINDS[str(wanted)][1])

    def _quantized(self, node: fx.Node, position: int | None, source: str, read: fx.Node) -> str:
        """A value through the quantizer of an edge, if it has one. The same parameters on the same value are written
        once."""
        key = self.key(node, position)
        if key is None:
            return source
        quantizer = self.quantizers[key]
        mark = (source, _identity(quantizer))
        if mark not in self._placed:
            if is_integer(quantizer, CODE_TYPES):
                scale, zero, axis = self._parameters(quantizer, key)  # type: ignore[arg-type]
                if self._movable(source, len(read.meta.get("shape") or ())):
                    source = self.apart(source)
                codes = self.op("QuantizeLinear", source, scale, zero, out=f"{key}.codes", **axis)
                self._placed[mark] = self.op("DequantizeLinear", codes, scale, zero, out=f"{key}.value", **axis)
            else:
                self._check_simulated(key, quantizer)
                self._placed[mark] = self._simulated(quantizer, source, len(read.meta.get("shape") or ()))
        return self._placed[mark]

    def apart(self, name: str) -> str:
        """The same value behind an operator that OpenVINO moves nothing across (other identities are removed)."""
        return self.op("Max", name, LOWEST)

    def _movable(self, name: str, rank: int) -> bool:
        """Whether OpenVINO's passes make the quantizer of a value one of what the value is made of, and wrongly: of the
        parts of a concatenation, of what has been scaled or shifted by one number for each channel (the second
        dimension), or of a grouped convolution before a limit (then without its rounding)."""
        made = source = self._maker(name)
        while source is not None and source.op_type in ("Relu", "Clip", "Max", "Min"):
            source = self._maker(source.input[0])
        if source is not made:
            return source is not None and source.output[0] in self.grouped
        if made is None or made.op_type not in ("Mul", "Add", "Sub", "Div"):
            return made is not None and made.op_type in ("Concat", "BatchNormalization")
        repeated = {n.output[0]: n.input[0] for n in self.nodes if n.op_type == "Expand"}
        parts = [repeated.get(part, part) for part in made.input]
        held = [self.constants[part].proto.dims for part in parts if part in self.constants]
        return any(sum(n > 1 for n in dims) == 1 and (dims[-1] == 1 or rank == 2) for dims in held)

    def _maker(self, name: str) -> Any:
        """The node that gives a value; None for an input or a constant."""
        return next((node for node in self.nodes if name in node.output), None)

    def key(self, node: fx.Node, position: int | None) -> str | None:
        """The key of a node's quantized edge: at an argument, or at its output (None)."""
        edges = (edge for edge in self.edges.get(node, ()) if edge.position == position)
        return next((edge.key for edge in edges if edge.key in self.quantizers), None)

    def weight(self, node: Any, *, transpose: bool = False) -> str:
        """The weight of a linear or conv node, quantized if it has a quantizer; transposed to [in, out] on request."""
        weight, key, name = self.graph.constant(node.args[1]), self.key(node, 1), str(node.args[1].target)
        assert weight is not None

        def turned(values: Tensor) -> Tensor:
            return values.mT if transpose and values.dim() > 1 else values

        if key is None:
            return self.constant(turned(weight), f"{name}.T" if transpose else name)
        quantizer: Any = self.quantizers[key]
        if weight.dim() == 1:  # of a product with a vector, which no kernel takes as codes
            return self.constant(quantizer(weight), f"{key}.value")
        if not is_integer(quantizer, WEIGHT_TYPES):
            self._check_simulated(key, quantizer)
            return self.constant(turned(quantizer(weight)), f"{key}.value")
        codes = self.codes(turned(quantizer.encode(weight)), quantizer, f"{key}.codes")
        scale, zero, axis = self._parameters(quantizer, key)
        if transpose:
            axis = {name: 1 - where % 2 for name, where in axis.items()}
        return self.op("DequantizeLinear", codes, scale, zero, out=f"{key}.value", **axis)

    # -- quantizers ---------------------------------------------------------------------------------------------------
    def _parameters(self, quantizer: Uniform, key: str) -> tuple[str, str, dict[str, Any]]:
        """Names of scale and zero point, and the attribute that says of which axis they are."""
        zero = self.codes(quantizer.zero_point, quantizer, f"{key}.zero_point")
        axis = {} if quantizer.axis is None else {"axis": quantizer.axis}
        return self.constant(quantizer.scale, f"{key}.scale"), zero, axis

    def _check_simulated(self, key: str, quantizer: Quantizer) -> None:
        """Raise UnsupportedError for a format that no runtime computes in, unless it is to be simulated."""
        if not self.simulate:
            raise UnsupportedError(
                f"{key} has the format {quantizer.kind}, {quantizer.bits} bits, which ONNX has no integers for: "
                "uniform formats of 8 or 4 bits are exported, of weights also 5 to 7. Quantize for a runtime "
                "(`quantlens quantize --target openvino-cpu`), or export with --simulate, as float operations"
            )

    def _simulated(self, quantizer: Quantizer, source: str, dims: int) -> str:
        """A quantizer as float operations that give its values."""
        if isinstance(quantizer, Uniform):
            low, high = quantizer.bounds(dims)
            levels = self.op("Round", self.op("Mul", source, quantizer.spread(quantizer.inverse, dims)))
            levels = self.op("Min", self.op("Max", levels, low), high)
            return self.op("Mul", levels, quantizer.spread(quantizer.scale, dims))
        if isinstance(quantizer, SqrtSoftmax):
            return self._rows(quantizer, source)
        if isinstance(quantizer, Grouped):
            return self._grouped(quantizer, source, dims)
        if isinstance(quantizer, AdaLog) and bool(quantizer.shift != 0):
            shift = self.constant(quantizer.shift)
            return self.op("Sub", self._logarithmic(quantizer, self.op("Add", source, shift)), shift)
        if isinstance(quantizer, Log):
            return self._logarithmic(quantizer, source)
        raise UnsupportedError(f"the format {quantizer.kind!r} cannot be written as ONNX operations yet")

    def _rows(self, quantizer: SqrtSoftmax, source: str) -> str:
        roots = self.op("Sqrt", self.op("Max", source, 0.0))
        peak = self.op("Max", self.op("ReduceMax", roots, [-1]), TINY)
        k = self.op("Round", self.op("Mul", roots, self.op("Div", float(quantizer.qmax), peak)))
        squares = self.op("Mul", k, k)
        return self.op("Div", squares, self.op("Max", self.op("ReduceSum", squares, [-1]), 1.0))

    def _grouped(self, quantizer: Grouped, source: str, dims: int) -> str:
        """Groups of channels with scales of their own, as the format finds them."""
        channels = dims + (quantizer.axis or 0)
        last = [*(d for d in range(dims) if d != channels), channels]
        turned = source if quantizer.axis == -1 else self.op("Transpose", source, perm=last)
        x = self.op("Reshape", turned, [0] * (dims - 1) + [-1, quantizer.group_size])
        value = self._affine_groups(quantizer, x) if isinstance(quantizer, GroupAffine) else self._scaled(quantizer, x)
        value = self.op("Reshape", value, [0] * (dims - 1) + [-1])
        back = [last.index(d) for d in range(dims)]
        return value if quantizer.axis == -1 else self.op("Transpose", value, perm=back)

    def _exponents(self, quantizer: Grouped, size: str) -> str:
        octaves = self.op("Log", self.op("Mul", size, quantizer.scale))
        parts = self.op("Round", self.op("Mul", octaves, PARTS / np.log(2.0)))
        return self.op("Clip", parts, float(LEAST), float(MOST))

    def _scales(self, quantizer: Grouped, exponents: str) -> str:
        return self.op("Gather", quantizer.powers, self.op("Cast", self.op("Sub", exponents, float(LEAST)), to=7))

    def _scaled(self, quantizer: Grouped, x: str) -> str:
        size = self.op("Sqrt", self.op("ReduceMean", self.op("Mul", x, x), [-1]))
        scale = self._scales(quantizer, self._exponents(quantizer, size))
        units = self.op("Mul", x, self.op("Reciprocal", scale))  # as the format does: a quotient has other last bits
        ends = float(quantizer.qmin), float(quantizer.qmax)
        levels = self.op("Clip", self.op("Round", self.op("Sub", units, 0.5)), *ends)
        return self.op("Mul", self.op("Add", levels, 0.5), scale)

    def _affine_groups(self, quantizer: GroupAffine, x: str) -> str:
        low, high = (self.op(name, self.op(f"Reduce{name}", x, [-1]), 0.0) for name in ("Min", "Max"))
        largest = self._exponents(quantizer, self.op("Sub", high, low))
        middle = self.op("Mul", self.op("Add", low, high), -0.5)
        ends, value, least = (0.0, float(quantizer.qmax)), "", ""
        for smaller in range(quantizer.tries):
            exponents = self.op("Max", self.op("Sub", largest, float(smaller)), float(LEAST)) if smaller else largest
            scale = self._scales(quantizer, exponents)
            inverse = self.op("Reciprocal", scale)
            units, centre = self.op("Mul", x, inverse), self.op("Mul", middle, inverse)
            zero = self.op("Clip", self.op("Round", self.op("Add", centre, 0.5 * quantizer.qmax)), *ends)
            codes = self.op("Clip", self.op("Add", self.op("Round", units), zero), *ends)
            other = self.op("Mul", self.op("Sub", codes, zero), scale)
            if quantizer.tries == 1:
                return other
            off = self.op("Sub", other, x)
            error = self.op("ReduceSum", self.op("Mul", off, off), [-1])
            better = self.op("Less", error, least) if value else ""
            value, least = (
                (self.op("Where", better, other, value), self.op("Min", error, least)) if value else (other, error)
            )
        return value

    def _logarithmic(self, quantizer: Log, source: str) -> str:
        """Values of a log format, before an AdaLog's shift."""
        octaves = self.op("Mul", self.op("Log", self.op("Max", source, 1e-38)), -quantizer.steps / np.log(2.0))
        k = self.op("Add", octaves, float(quantizer.offset))
        last = float(quantizer.qmax - 1)
        nearest = self.op("Clip", self.op("Round", k), 0.0, last)
        code = self.op("Where", self.op("Greater", k, last + quantizer.steps), last + 1, nearest)
        return self.op("Gather", quantizer.levels, self.op("Cast", code, to=7))

    # -- shapes -------------------------------------------------------------------------------------------------------
    def shape(self, sizes: Sequence[Any]) -> str:
        """Sizes as int64 [n]."""
        if not any(isinstance(size, Size) for size in sizes):
            return self.constant([int(size) for size in sizes] or np.zeros(0, np.int64))
        parts = [self._size(size) if isinstance(size, Size) else self.constant([size]) for size in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def _size(self, size: Size) -> str:
        name = self.batch()
        name = name if size.per_image == 1 else self.op("Mul", name, [size.per_image])
        return name if size.fixed == 0 else self.op("Add", name, [size.fixed])

    def reshape(self, name: str, sizes: Sequence[Any]) -> str:
        """A value in other sizes; the one that follows the batch, if it is one, is left to the runtime."""
        if sum(isinstance(size, Size) for size in sizes) == 1:
            sizes = [-1 if isinstance(size, Size) else size for size in sizes]
        return self.op("Reshape", name, self.shape(sizes))

    def sizes(self, node: Any) -> tuple[Any, ...]:
        """The sizes of what a node gives."""
        return tuple(self.values[node].shape)

    def axis(self, node: Any, dim: int) -> int:
        """A dimension of what a node gives, from 0."""
        return int(dim) % max(1, len(self.sizes(node)))

    def whole(self, node: fx.Node, *sizes: Any) -> list[int]:
        """Sizes that must not follow the batch. Raises UnsupportedError for those that do."""
        if any(not isinstance(size, int) for size in sizes):
            raise UnsupportedError(f"export cannot write {described(node)} along the batch")
        return list(sizes)

    def batch(self) -> str:
        """The batch size as int64 [1]."""
        if "batch" not in {n.output[0] for n in self.nodes}:
            self.op("Shape", "images", out="batch", start=0, end=1)
        return "batch"


def is_integer(quantizer: Quantizer, known: Container[tuple[int, bool]]) -> bool:
    """Whether runtimes have integers for a format: uniform, of a known width and sign, zero points that are codes."""
    if type(quantizer) is not Uniform or (quantizer.bits, quantizer.signed) not in known:
        return False
    zero = quantizer.zero_point
    return bool(((zero >= quantizer.qmin) & (zero <= quantizer.qmax)).all())


def _identity(quantizer: Quantizer) -> str:
    """What two quantizers have in common exactly when they give the same values."""
    values = {name: value.tolist() for name, value in quantizer.tensors().items()}
    return repr(sorted({**quantizer.config(), **values}.items()))
