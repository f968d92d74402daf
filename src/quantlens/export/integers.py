"""The codes that an exported file holds, integers and small floating-point numbers, read from its own constants and
from the operations that use them."""

import math
import mmap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from quantlens.errors import BadWeightsError, first_line
from quantlens.export.onnx_codes import unpacked
from quantlens.export.runtimes import need


class Held(NamedTuple):
    """A quantizer in a file. kind: the type of its codes, "int8". scale, zero_point: one-dimensional; codes: of a
    weight, as the layer of the model has it, int32; None of an activation. axis: of the weight that has a scale per
    index. blocks: codes of the scales of a weight's blocks, [out, n], int32, each of ``group_size`` values. wrong: what
    in the file contradicts the rest, in words. The codes of floating-point formats are bit patterns."""

    kind: str
    scale: np.ndarray
    zero_point: np.ndarray
    codes: np.ndarray | None = None
    axis: int | None = None
    blocks: np.ndarray | None = None
    group_size: int | None = None
    wrong: str = ""


class Contents(NamedTuple):
    """What was read. held: quantizers, of weights by the names of their edges; inputs: of a layer with such a weight,
    the name of the quantizer of what it multiplies (None: it is float). metadata: what the file says of itself. opset:
    ONNX operator set; None of other files."""

    held: dict[str, Held]
    inputs: dict[str, str | None]
    metadata: dict[str, str]
    opset: int | None = None


def damaged(path: Path, error: Exception) -> BadWeightsError:
    what = (
        f"it and {path.with_suffix('.bin').name} are damaged, or no pair" if path.suffix == ".xml" else "it is damaged"
    )
    return BadWeightsError(f"{path} cannot be read: {what} ({first_line(error)}); copy or export it again")


def _turned(held: Held) -> Held:
    """A weight of a product x @ W, [in, out], as the layer has it, [out, in]."""
    assert held.codes is not None
    codes, axis = np.swapaxes(held.codes, -1, -2), held.axis
    blocks = None if held.blocks is None else held.blocks.T
    return held._replace(codes=codes, axis=None if axis is None else 1 - axis, blocks=blocks)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def read_onnx(path: Path) -> Contents:
    """Raises BadWeightsError for a file that is damaged, or none."""
    onnx = need("onnx")
    try:
        model = onnx.load(str(path))
        return _Graph(onnx, model).contents()
    except Exception as error:  # of protobuf, of onnx, of NumPy: they share no base
        raise damaged(path, error) from error


class _Graph:
    """The nodes and constants of an ONNX model by their names."""

    def __init__(self, onnx: Any, model: Any):
        self.onnx, self.model = onnx, model
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def kind(self, name: str) -> str:
        return str(self.onnx.TensorProto.DataType.Name(self.constants[name].data_type))

    def codes(self, name: str) -> np.ndarray:
        """Integers of a constant, or the bit patterns of floating-point numbers; int32."""
        tensor, kind = self.constants[name], self.kind(name)
        if kind.startswith(("FLOAT8", "FLOAT4")):
            return unpacked(tensor.raw_data, kind, tuple(tensor.dims)).astype(np.int32)
        return np.asarray(self.onnx.numpy_helper.to_array(tensor)).astype(np.int32)

    def parameters(self, node: Any) -> tuple[np.ndarray, np.ndarray, str, np.ndarray | None]:
        """Scale, zero point, type of codes and codes of scales of a QuantizeLinear or DequantizeLinear."""
        scaled, given = node.input[1], node.input[2] if len(node.input) > 2 else ""
        coded = given or (node.input[0] if node.input[0] in self.constants else "")
        kind, blocks = self.kind(coded).lower() if coded else "uint8", None
        scale = np.ones(1, np.float32)
        if scaled in self.constants and self.kind(scaled) == "FLOAT8E8M0":
            blocks = self.codes(scaled)
        elif scaled not in self.constants:
            scale, _, _, _ = self.parameters(self.makers[scaled])
            blocks = self.codes(self.makers[scaled].input[0])
        else:
            scale = self.onnx.numpy_helper.to_array(self.constants[scaled])
        zero = self.codes(given) if given else np.zeros(scale.shape, np.int32)
        return scale.reshape(-1), zero.reshape(-1), kind, blocks

    def reader(self, name: str) -> Any:
        """The first node that reads a value, past changes of its sizes; None where there is none."""
        found = next(iter(self.readers[name]), None)
        return self.reader(found.output[0]) if found is not None and found.op_type == "Reshape" else found

    def contents(self) -> Contents:
        held: dict[str, Held] = {}
        inputs: dict[str, str | None] = {}
        for node in self.model.graph.node:
            scales = any(one.op_type == "DequantizeLinear" for one in self.readers[node.output[0]])
            if node.op_type != "DequantizeLinear" or scales:
                continue
            name, source = node.output[0].removesuffix(".value"), node.input[0]
            scale, zero, kind, blocks = own = self.parameters(node)
            if source not in self.constants:
                maker, wrong = self.makers.get(source), ""
                if maker is None or maker.op_type != "QuantizeLinear":
                    wrong = "its codes are made by no QuantizeLinear"
                elif not _same(own, self.parameters(maker)):
                    wrong = "the file quantizes and dequantizes it by different numbers"
                held[name] = Held(kind, scale, zero, wrong=wrong)
                continue
            told = {one.name: self.onnx.helper.get_attribute_value(one) for one in node.attribute}
            codes, reader = self.codes(source), self.reader(node.output[0])
            axis = told.get("axis", 1) % max(codes.ndim, 1) if len(scale) > 1 else None
            found = Held(kind, scale, zero, codes, axis, blocks, told.get("block_size"))
            held[name] = _turned(found) if reader is not None and reader.op_type == "MatMul" else found
            maker = None if reader is None else self.makers.get(reader.input[0])
            passed = maker is not None and maker.op_type == "DequantizeLinear"
            inputs[name] = maker.output[0].removesuffix(".value") if maker is not None and passed else None
        metadata = {entry.key: entry.value for entry in self.model.metadata_props}
        opset = next((one.version for one in self.model.opset_import if not one.domain), None)
        return Contents(held, inputs, metadata, opset)


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# ---- OpenVINO --------------------------------------------------------------------------------------------------------

KINDS = {"i8": "int8", "u8": "uint8", "i4": "int4", "u4": "uint4"}
"""OpenVINO's names of the types of codes."""

NUMBERS = {"i8": "i1", "u8": "u1", "i4": "i1", "u4": "u1", "i32": "<i4", "i64": "<i8", "f32": "<f4", "f16": "<f2"}


class _Layer(NamedTuple):
    name: str
    type: str
    data: dict[str, str]
    inputs: list[str]
    readers: list[str]


def read_openvino(path: Path) -> Contents:
    """From the .xml and the .bin themselves. Raises BadWeightsError for files that are damaged."""
    try:
        root = ElementTree.parse(path).getroot()
        with path.with_suffix(".bin").open("rb") as stream:
            weights = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        metadata = {one.tag: one.get("value", "") for one in root.findall("rt_info/quantlens/*")}
        return _Network(root, weights).contents(metadata)
    except (ElementTree.ParseError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise damaged(path, error) from error


class _Network:
    """The layers of an .xml by their numbers, with the .bin."""

    def __init__(self, root: Any, weights: Any):
        self.weights = weights
        self.layers: dict[str, _Layer] = {}
        for layer in root.findall("layers/layer"):
            data = layer.find("data")
            told = {} if data is None else dict(data.attrib)
            self.layers[layer.get("id")] = _Layer(layer.get("name"), layer.get("type"), told, [], [])
        edges = [[int(edge.get(end)) for end in ("to-layer", "to-port")] for edge in root.findall("edges/edge")]
        for _, edge in sorted(zip(edges, root.findall("edges/edge"), strict=True), key=lambda pair: pair[0]):
            self.layers[edge.get("to-layer")].inputs.append(edge.get("from-layer"))
            self.layers[edge.get("from-layer")].readers.append(edge.get("to-layer"))

    def maker(self, layer: _Layer, place: int) -> _Layer:
        return self.layers[layer.inputs[place]]

    def constant(self, layer: _Layer) -> np.ndarray | None:
        """The values of a layer that is constant, as they are stored or reshaped; None of another."""
        if layer.type in ("Convert", "Reshape"):
            value = self.constant(self.maker(layer, 0))
            sizes = self.constant(self.maker(layer, 1)) if layer.type == "Reshape" else None
            return value if value is None or sizes is None else value.reshape([int(size) for size in sizes])
        if layer.type != "Const":
            return None
        kind, start, size = layer.data["element_type"], int(layer.data["offset"]), int(layer.data["size"])
        shape = [int(one) for one in layer.data.get("shape", "").split(",") if one.strip()]
        raw = np.frombuffer(self.weights[start : start + size], NUMBERS[kind])
        if kind in ("i4", "u4"):
            raw = np.stack([raw & 0xF, raw >> 4 & 0xF], 1).reshape(-1)[: math.prod(shape)]
            raw = raw - 16 * (raw > 7) if kind == "i4" else raw
        return raw.reshape(shape)

    def contents(self, metadata: dict[str, str]) -> Contents:
        held, inputs = {}, {}
        for layer in self.layers.values():
            found = self.dequantized(layer)
            if found is None:
                continue
            name, reader = _name(layer), self.reader(layer)
            if found.codes is not None:
                product = reader is not None and reader.type == "MatMul"
                turned = product and reader.data.get("transpose_b") != "true"  # type: ignore[union-attr]
                found = _turned(found) if turned else found
                source = None if reader is None else self.maker(reader, 0)
                passed = source is not None and self.dequantized(source) is not None
                inputs[name] = _name(source) if source is not None and passed else None
            held[name] = found
        return Contents(held, inputs, metadata)

    def reader(self, layer: _Layer) -> _Layer | None:
        """The first layer that reads a value, past changes of its sizes."""
        found = next((self.layers[number] for number in layer.readers), None)
        return self.reader(found) if found is not None and found.type == "Reshape" else found

    def dequantized(self, layer: _Layer) -> Held | None:
        """What a product (codes - zero point) · scale says; None of another layer."""
        if layer.type != "Multiply":
            return None
        scale, inner = self.constant(self.maker(layer, 1)), self.maker(layer, 0)
        shifted = inner.type == "Subtract"
        zero = self.constant(self.maker(inner, 1)) if shifted else None
        inner = self.maker(inner, 0) if shifted else inner
        if scale is None or inner.type != "Convert" or (shifted and zero is None):
            return None
        coded = self.maker(inner, 0)
        kind = KINDS.get(coded.data.get("element_type" if coded.type == "Const" else "destination_type", ""))
        if kind is None:
            return None
        flat = np.zeros(scale.size, np.int32) if zero is None else zero.astype(np.int32).reshape(-1)
        found = Held(kind, scale.reshape(-1), flat)
        codes = self.constant(coded)
        if codes is None:
            return found._replace(wrong=self.contradiction(self.maker(coded, 0), found))
        wide = [axis for axis, size in enumerate(scale.shape) if size > 1]
        axis = wide[0] + codes.ndim - scale.ndim if wide else None
        return found._replace(codes=codes.astype(np.int32), axis=axis)

    def contradiction(self, layer: _Layer, found: Held) -> str:
        """What is wrong with the range of values that a FakeQuantize puts into codes."""
        if layer.type != "FakeQuantize":
            return "its codes are made by no FakeQuantize"
        ends = [self.constant(self.maker(layer, place)) for place in (1, 2, 3, 4)]
        if any(end is None for end in ends):
            return "its range is no constant"
        low, high, first, last = (np.asarray(end, np.float64).reshape(-1) for end in ends)
        bits, scale = int(found.kind.lstrip("uint")), found.scale.astype(np.float64)
        least = -(2 ** (bits - 1)) if found.kind.startswith("i") else 0
        step, wanted = (high - low) / (2**bits - 1), (least - found.zero_point) * scale
        fits = np.allclose(step, scale, rtol=1e-5, atol=0) and np.allclose(low, wanted, rtol=0, atol=1e-3 * scale.min())
        if fits and (first == least).all() and (last == least + 2**bits - 1).all():
            return ""
        return "the file quantizes and dequantizes it by different numbers"


def _name(layer: _Layer) -> str:
    return layer.name.removesuffix(".op").removesuffix(".value")


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def read_pt2(path: Path, activations: Sequence[str]) -> Contents:
    """activations: names of the edges whose quantizers the program calls by their number, in order. Raises
    BadWeightsError for a file that is damaged, or none of ours."""
    from quantlens.export.pt2 import open_program

    program, metadata = open_program(path)
    stored = {**program.constants, **program.state_dict}
    buffers = program.graph_signature.inputs_to_buffers

    def value(argument: Any) -> np.ndarray:
        tensor = stored[buffers[argument.name]].numpy() if hasattr(argument, "name") else np.asarray(argument)
        return tensor.reshape(-1).astype(np.float32 if tensor.dtype.kind == "f" else np.int32)

    held: dict[str, Held] = {}
    names: dict[Any, str] = {}
    for node in program.graph.nodes:
        if "quantized_decomposed.dequantize_per" not in str(node.target):
            continue
        source, (scale, zero, *axis, _, _, kind) = node.args[0], node.args[1:]
        found = Held(str(kind).removeprefix("torch."), value(scale), value(zero), axis=axis[0] if axis else None)
        if source.name in buffers:
            name = buffers[source.name].removeprefix("codes.").removesuffix(".codes")
            found = found._replace(codes=stored[buffers[source.name]].numpy().astype(np.int32))
        else:
            number = [*node.meta["nn_module_stack"].values()][-1][0].removeprefix("operators.")
            name = activations[int(number)] if number.isdigit() and int(number) < len(activations) else number
            if source.args[1:] != node.args[1:]:
                found = found._replace(wrong="the file quantizes and dequantizes it by different numbers")
        names[node], held[name] = name, found
    inputs = {}
    for node, name in names.items():
        reader = next(iter(node.users), None)
        if held[name].codes is not None and reader is not None:
            inputs[name] = names.get(reader.args[0])
    return Contents(held, inputs, metadata)
