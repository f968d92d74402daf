"""What TensorRT and QNN ask of an ONNX file, by their documentation: neither runs here.

TensorRT (docs.nvidia.com, "Working with quantized types"): signed codes and no zero points, scales of 16 or 32 bits per
tensor or, of weights, per output channel; types as the file has them; Q/DQ on both inputs of a product, nothing between
it and its softmax. QNN (onnxruntime.ai, "QNN Execution Provider"): uint16 activations, signed symmetric weights, every
operator between DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.export.export import export
from quantlens.export.exported import Artefact
from quantlens.export.verify import verify
from quantlens.methods import registry
from quantlens.qmodel.in_float import said_in_float

onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")

TENSORRT = """Add Cast Clip Concat Conv DequantizeLinear Div Erf Exp Expand Gather Gelu Gemm Identity LayerNormalization
Log MatMul Max Min Mul Neg Pow QuantizeLinear ReduceLogSumExp ReduceMax ReduceMean ReduceSum Reshape Shape Sigmoid
Slice Softmax Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Unsqueeze Where"""
"""Of the operators that its parser has (onnx-tensorrt, operators.md), those of vision transformers."""

MOVES = {"Transpose", "Reshape", "Gather", "Split", "Slice", "Squeeze", "Unsqueeze", "Concat", "Expand", "Identity"}
FLOAT, HALF = 1, 10


class File:
    """A file's nodes, and who makes and reads its values."""

    def __init__(self, path):
        self.proto = onnx.load(path)
        onnx.checker.check_model(self.proto, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(self.proto, check_type=True, strict_mode=True, data_prop=True)
        self.types = {one.name: one.type.tensor_type.elem_type for one in inferred.graph.value_info}
        self.nodes = list(self.proto.graph.node)
        self.constants = {one.name: one for one in self.proto.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}

    def of(self, *kinds):
        return [node for node in self.nodes if node.op_type in kinds]

    def readers(self, name):
        return [node for node in self.nodes if name in node.input]

    def array(self, name):
        return onnx.numpy_helper.to_array(self.constants[name])

    def products(self):
        """Products of two values, none of them a weight."""
        return [n for n in self.of("MatMul") if not self.makers[n.input[1]].input[0].endswith("weight.codes")]

    def sources(self, name):
        """Kinds of operators that make a value, past those that only move it; of the file's inputs and constants ""."""
        node = self.makers.get(name)
        if node is None or node.op_type not in MOVES:
            return {"" if node is None else node.op_type}
        given = [one for one in node.input if one not in self.constants and not one.startswith("batch")]
        return set().union(*(self.sources(one) for one in given)) if given else {""}

    def ends(self, name):
        """Kinds of operators that read a value, past those that move it or add a bias."""
        found = set()
        for node in self.readers(name):
            biased = node.op_type == "Add" and any(one in self.constants for one in node.input)
            found |= self.ends(node.output[0]) if node.op_type in MOVES or biased else {node.op_type}
        return found


@pytest.fixture(scope="module")
def files(loaded, pictures, tmp_path_factory):
    """target -> (the quantized ViT, its file, the path)."""
    folder, found = tmp_path_factory.mktemp("consumers"), {}
    for target, bits in (("tensorrt", "W8A8"), ("qnn", "W8A16")):
        qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits=bits, target=target)
        path = export(qmodel, folder / f"{target}.onnx", half=target == "tensorrt")
        found[target] = qmodel, File(path), path
    return found


def sqnr(expected, got):
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))


def weights(file):
    return [n for n in file.of("DequantizeLinear") if n.input[0] in file.constants]


@pytest.mark.parametrize(("target", "activations"), [("tensorrt", "INT8"), ("qnn", "UINT16")])
def test_codes_are_of_the_types_asked_for(target, activations, files):
    _, file, _ = files[target]
    kinds = {node.input[2]: "INT8" if node.input[0] in file.constants else activations for node in weights(file)}
    kinds |= {node.input[2]: activations for node in file.of("QuantizeLinear")}
    for name, kind in kinds.items():
        assert onnx.TensorProto.DataType.Name(file.constants[name].data_type) == kind
        assert kind != "INT8" or not file.array(name).any(), "no zero points"
    assert len(weights(file)) == 10


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_weights_have_a_scale_per_output_channel(target, files):
    _, file, _ = files[target]
    for node in weights(file):
        codes, reader = file.constants[node.input[0]].dims, file.readers(node.output[0])[0].op_type
        axis = next(one.i for one in node.attribute if one.name == "axis")
        assert axis == (1 if reader == "MatMul" else 0)
        assert file.array(node.input[1]).shape == (codes[axis],)
    for node in file.of("QuantizeLinear"):
        assert file.array(node.input[1]).shape == (), "one of an activation"


def test_attention_is_between_pairs_and_nothing_else_is(files):
    """Keys are transposed and queries scaled before they are quantized."""
    for target in ("tensorrt", "qnn"):
        _, file, _ = files[target]
        scored = 0
        for product in file.products():
            direct = [file.makers[name].op_type for name in product.input]
            assert direct == ["DequantizeLinear"] * 2 or target == "qnn"
            assert [file.sources(name) for name in product.input] == [{"DequantizeLinear"}] * 2
            after = file.ends(product.output[0])
            assert after in ({"Softmax"}, {"QuantizeLinear"})
            scored += file.readers(product.output[0])[0].op_type in ("Softmax", "QuantizeLinear")
        assert len(file.products()) == 4
        assert scored >= 2
        for softmax in file.of("Softmax"):
            assert file.ends(softmax.output[0]) == {"QuantizeLinear"}


def test_what_is_float_is_half_but_for_layernorm(files):
    qmodel, file, _ = files["tensorrt"]
    norms = file.of("LayerNormalization")
    for norm in norms:
        before, (after,) = file.makers[norm.input[0]], file.readers(norm.output[0])
        assert (before.op_type, before.attribute[0].i) == ("Cast", FLOAT)
        assert (after.op_type, after.attribute[0].i) == ("Cast", HALF)
        assert all(file.constants[name].data_type == FLOAT for name in norm.input[1:])
    assert len(norms) == 5
    own = {name for norm in norms for name in (*norm.input, *norm.output)}
    ends = {name for node in file.nodes for name in node.output if node.output[0] in ("logits", "score")}
    ends |= {file.makers[name].input[0] for name in ends}
    floats = {name for name, kind in file.types.items() if kind == FLOAT} - own - ends
    assert not floats
    assert {name for name, one in file.constants.items() if one.data_type == FLOAT} <= own
    for node in file.of("QuantizeLinear", "DequantizeLinear"):
        assert file.constants[node.input[1]].data_type == HALF
    for quantizer in qmodel.plan.quantizers.values():
        assert torch.equal(quantizer.scale.half().float(), quantizer.scale)
    assert {one.type.tensor_type.elem_type for one in (*file.proto.graph.input, *file.proto.graph.output)} == {FLOAT}


def test_operators_are_of_the_list(files):
    assert {node.op_type for node in files["tensorrt"][1].nodes} <= set(TENSORRT.split())
    assert all(not node.domain for _, file, _ in files.values() for node in file.nodes)


def test_every_operator_of_an_npu_is_between_pairs(files):
    qmodel, file, _ = files["qnn"]
    seen = 0
    for node in file.of("MatMul", "Conv", "LayerNormalization", "Gelu", "Softmax"):
        given = [name for name in node.input if name not in file.constants]
        assert all(file.sources(name) <= {"DequantizeLinear"} for name in given), node.name
        assert file.ends(node.output[0]) <= {"QuantizeLinear"}, node.name
        seen += 1
    assert seen == 10 + 4 + 5 + 2 + 2
    assert "layers" not in said_in_float(qmodel)
    sums = [n for n in file.of("Add") if not any(name in file.constants for name in n.input)]
    assert len(sums) == 4
    assert all(file.sources(name) == {"DequantizeLinear"} for node in sums for name in node.input)


@pytest.mark.parametrize(("target", "least"), [("tensorrt", 18), ("qnn", 40)])
def test_they_run_on_a_cpu_and_are_the_checkpoints(target, least, files, pictures):
    qmodel, _, path = files[target]
    found = verify(path, qmodel)
    assert found.ok, found.sentences()
    assert sqnr(qmodel(pictures), Artefact(path, threads=1)(pictures)) > least


def test_half_precision_alone_changes_little(loaded, pictures, tmp_path):
    """Logits and the score are float32; a Mahalanobis score reads features that are, too."""
    model, images = loaded["vit"], pictures.repeat(5, 1, 1, 1)
    file = export(model, tmp_path / "m.onnx", half=True, guard="mahalanobis", guard_images=images)
    plain = export(model, tmp_path / "f.onnx", guard="mahalanobis", guard_images=images)
    (logits, scores), (expected, wanted) = (Artefact(path, threads=1).run(pictures.numpy()) for path in (file, plain))
    assert sqnr(torch.from_numpy(expected), torch.from_numpy(logits)) > 50
    np.testing.assert_allclose(scores, wanted, rtol=0.05, atol=0.05)


def test_a_file_says_that_it_is_untried(files, loaded, pictures, tmp_path):
    for target, machine in (("tensorrt", "TensorRT"), ("qnn", "an NPU")):
        said = {one.key: one.value for one in files[target][1].proto.metadata_props}
        assert said["untried"].startswith(f"never run on {machine};")
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target="openvino-cpu")
    assert "untried" not in {one.key for one in onnx.load(export(qmodel, tmp_path / "m.onnx")).metadata_props}


@pytest.mark.parametrize("method", ["quantlens-fast", "repq-vit"])
def test_softmax_is_uniform_for_tensorrt_unless_one_asks_for_more(method):
    made = registry.get(method)
    assert made.options({"target": "tensorrt"})["softmax"] == "uniform"
    assert made.options({})["softmax"] != "uniform"
    asked = made.options({})["softmax"]
    assert made.options({"target": "tensorrt", "softmax": asked})["softmax"] == asked


def test_sums_of_16_bit_activations_do_not_saturate(files):
    said = {target: {one.key: one.value for one in files[target][1].proto.metadata_props} for target in files}
    assert (said["tensorrt"]["saturating"], said["qnn"]["saturating"]) == ("true", "false")


def test_scales_of_another_target_are_none_of_float16(loaded, pictures, tmp_path):
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target="openvino-cpu")
    with pytest.raises(UnsupportedError, match=r"that float16 does not have.*--target tensorrt"):
        export(qmodel, tmp_path / "m.onnx", half=True)
    with pytest.raises(QuantlensError, match=r"half is for \.onnx files"):
        export(qmodel, tmp_path / "m.xml", half=True)
    with pytest.raises(UnsupportedError, match=r"8-bit activations: choose 16 \(for example W8A16\)"):
        ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target="qnn")


def test_a_residual_beyond_float16_survives_layernorm(tmp_path):
    """Squares of 300 are more than float16 holds; the LayerNorm between casts gives what float32 gives."""
    norm = torch.nn.LayerNorm(48)
    model = ql.load_model(torch.nn.Sequential(torch.nn.Flatten(), norm), input_size=(3, 4, 4), name="norm")
    images = 300 * torch.linspace(-1, 1, 2 * 48).sin().reshape(2, 3, 4, 4)
    artefact = Artefact(export(model, tmp_path / "m.onnx", half=True), threads=1)
    torch.testing.assert_close(
        torch.as_tensor(artefact.run(images.numpy())[0]), norm(images.flatten(1)).detach(), rtol=4e-3, atol=4e-3
    )
