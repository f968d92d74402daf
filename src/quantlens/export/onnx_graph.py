"""Writing one ONNX graph: nodes, constants, quantizers.

Numbers cross an edge with a quantizer as QuantizeLinear → DequantizeLinear (codes, scales and zero points of the very
quantizer that was measured), and a weight is stored as its integer codes before a DequantizeLinear. Runtimes fuse these
pairs into integer kernels. Formats without such operators can be written as float operations that reproduce them
(``simulate``).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_codes import OPSET, code_types, first_opset, held_types, packed
from quantlens.export.onnx_file import Initializer
from quantlens.export.onnx_formats import simulated
from quantlens.export.onnx_values import Size, constants, described, fixed, kind_of, values
from quantlens.formats import NVFP4, Blocks, FloatingPoint, Quantizer, floating_name_of
from quantlens.graph import Graph
from quantlens.graph.graph import op_name

KINDS: dict[str, tuple[Any, int]] = {"float": (np.float32, 1), "int": (np.int64, 7), "bool": (np.bool_, 9)}
"""Kind of a value -> its type in NumPy and ONNX's number of it. A file has no others: half precision is computed in
float32."""

LOWEST = float(np.finfo(np.float32).min)


class Emitter:
    """Writes nodes and constants of one ONNX graph.

    simulate: formats that the file cannot hold become float operations instead of an error. opset: the operator set;
    None: the file is for OpenVINO, see :func:`~quantlens.export.onnx_codes.held_types`.
    """

    def __init__(
        self,
        graph: Graph,
        quantizers: dict[str, Quantizer],
        *,
        simulate: bool = False,
        opset: int | None = OPSET,
    ):
        self.graph, self.quantizers, self.simulate, self.opset = graph, quantizers, simulate, opset
        self.nodes: list[Any] = []
        self.constants: dict[str, Initializer] = {}
        self.names: dict[fx.Node, Any] = {}
        self.folded = constants(graph)
        self.values = values(graph, self.folded)
        self.fixed = fixed(graph)
        self.edges = graph.sites.edges_by_node
        self.moves = True
        """Whether what reads the file moves quantizers to where they are wrong, as OpenVINO does: see :meth:`apart`."""
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

    def codes(self, codes: Tensor, kind: str, name: str) -> str:
        """An initializer of codes in one of ONNX's types for them, packed where a byte holds several."""
        from onnx import TensorProto

        raw = packed(codes.cpu().numpy(), kind)
        proto = TensorProto(name=name, data_type=getattr(TensorProto, kind), dims=codes.shape)
        self.constants[name] = Initializer(proto, len(raw), lambda: raw)
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
            rank = len(read.meta.get("shape") or ())
            if types := held_types(quantizer, self.opset, weight=False):
                scale, zero, axis = self._parameters(quantizer, key, types[0])
                if self._movable(source, rank):
                    source = self.apart(source)
                codes = self.op("QuantizeLinear", source, scale, zero, out=f"{key}.codes", **axis)
                self._placed[mark] = self.op("DequantizeLinear", codes, scale, zero, out=f"{key}.value", **axis)
            else:
                self._check_simulated(key, quantizer, weight=False)
                self._placed[mark] = simulated(self, quantizer, source, rank)
        return self._placed[mark]

    def apart(self, name: str) -> str:
        """The same value behind an operator that OpenVINO moves nothing across (other identities are removed)."""
        return self.op("Max", name, LOWEST) if self.moves else name

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
        types = held_types(quantizer, self.opset, weight=True)
        if not types:
            self._check_simulated(key, quantizer, weight=True)
            return self.constant(turned(quantizer(weight)), f"{key}.value")
        if isinstance(quantizer, Blocks):
            return self._blocks(quantizer, weight, key, types, transpose=transpose)
        codes = self.codes(turned(quantizer.encode(weight)), types[0], f"{key}.codes")
        scale, zero, axis = self._parameters(quantizer, key, types[0])
        if transpose:
            axis = {name: 1 - where % 2 for name, where in axis.items()}
        return self.op("DequantizeLinear", codes, scale, zero, out=f"{key}.value", **axis)

    # -- quantizers ---------------------------------------------------------------------------------------------------
    def _parameters(self, quantizer: Any, key: str, kind: str) -> tuple[str, str, dict[str, Any]]:
        """Names of scale and zero point, and the attribute that says of which axis they are."""
        floating = isinstance(quantizer, FloatingPoint)
        zero = torch.zeros_like(quantizer.scale, dtype=torch.uint8) if floating else quantizer.zero_point
        axis = {} if quantizer.axis is None else {"axis": quantizer.axis}
        return self.constant(quantizer.scale, f"{key}.scale"), self.codes(zero, kind, f"{key}.zero_point"), axis

    def _blocks(self, quantizer: Any, weight: Tensor, key: str, types: Sequence[str], *, transpose: bool) -> str:
        """A weight whose blocks of inputs have scales of their own: of MX powers of two, of NVFP4 codes of a second
        DequantizeLinear, by the tensor's scale."""
        codes, scales = quantizer.encode(weight).flatten(1), quantizer.scale_codes.squeeze(-1)  # [out, in], [out, G]
        codes, scales = (codes.T, scales.T) if transpose else (codes, scales)
        how: dict[str, Any] = {"axis": int(not transpose), "block_size": quantizer.group_size}
        scale = self.codes(scales, types[1], f"{key}.block_scale")
        if isinstance(quantizer, NVFP4):
            whole = self.constant(quantizer.scale, f"{key}.scale")
            scale = self.op("DequantizeLinear", scale, whole, out=f"{key}.block_scale.value")
        else:
            how["output_dtype"] = KINDS["float"][1]
        codes = self.codes(codes, types[0], f"{key}.codes")
        value = self.op("DequantizeLinear", codes, scale, out=f"{key}.value", **how)
        return value if weight.dim() == 2 else self.op("Reshape", value, list(weight.shape))

    def _check_simulated(self, key: str, quantizer: Quantizer, *, weight: bool) -> None:
        """Raise UnsupportedError for a format that the file cannot hold, unless it is to be simulated."""
        if self.simulate:
            return
        name, types = floating_name_of(quantizer), code_types(quantizer, weight=weight)
        if types and self.opset is not None:
            later = first_opset(types)
            raise UnsupportedError(
                f"{key} has {name or f'codes of {quantizer.bits} bits'}, which ONNX has from operator set {later} on: "
                f"give --opset {later}, or --simulate, which writes float operations"
            )
        where, widths = ("ONNX", "8, 4 or 2") if self.opset is not None else ("an OpenVINO file", "8 or 4")
        if name:
            held = "FP8, FP8-E5M2, MXFP8, MXFP8-E5M2, MXFP4 or NVFP4" if self.opset is not None else "integers"
            raise UnsupportedError(
                f"{key} has the format {name}, which {where} has no type for: quantize weights to {held}, or export "
                "with --simulate, as float operations"
            )
        raise UnsupportedError(
            f"{key} has the format {quantizer.kind}, {quantizer.bits} bits, which {where} has no integers for: "
            f"uniform formats of {widths} bits are exported, of weights also 5 to 7. Quantize for a runtime "
            "(`quantlens quantize --target openvino-cpu`), or export with --simulate, as float operations"
        )

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


def _identity(quantizer: Quantizer) -> str:
    """What two quantizers have in common exactly when they give the same values."""
    values = {name: value.tolist() for name, value in quantizer.tensors().items()}
    return repr(sorted({**quantizer.config(), **values}.items()))
