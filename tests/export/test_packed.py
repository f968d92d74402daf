"""Codes of 2 and 4 bits, FP8, MX and NVFP4 in ONNX files: what is stored decodes to what was simulated."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.export.export import export
from quantlens.export.exported import Artefact
from quantlens.export.onnx_codes import OPSETS, packed, unpacked
from quantlens.export.told import weight_sizes
from quantlens.export.verify import verify

onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")
LATEST = min(onnx.defs.onnx_opset_version(), OPSETS[-1])

BITS = {"W2A8": 25, "FP8": 21, "FP8-E5M2": 21, "MXFP8": 24, "MXFP8-E5M2": 24, "MXFP4": 24, "NVFP4": 23}
"""What weights have -> the operator set that it needs."""

KEY = "blocks.0.mlp.fc2.weight"


def needs(opset):
    return pytest.mark.skipif(opset > LATEST, reason=f"onnx {onnx.__version__} has no operator set {opset}")


FORMATS = [pytest.param(bits, opset, marks=needs(opset)) for bits, opset in BITS.items()]


@pytest.fixture(scope="module")
def made(loaded, pictures):
    """name of the weights' format -> the small ViT with it; FP8 of activations too."""
    held = {}

    def of(name):
        if name not in held:
            bits = name if name.startswith(("W", "FP8")) else f"W{name}A8"
            held[name] = ql.quantize(loaded["vit"], pictures, method="minmax", bits=bits)
        return held[name]

    return of


def sqnr(expected, got):
    noise = float((expected - torch.as_tensor(got)).square().sum())
    return float("inf") if noise == 0 else float(10 * np.log10(float(expected.square().sum()) / noise))


def decoded(proto, name):
    """A value of a file that depends on constants alone, by ONNX's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    makers = {out: node for node in proto.graph.node for out in node.output}
    nodes, wanted = [], [name]
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None:
            nodes.insert(0, node)
            wanted += node.input
    read = {value for node in nodes for value in node.input}
    constants = [one for one in proto.graph.initializer if one.name in read]
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "part", [], [value], constants)
    model = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    return ReferenceEvaluator(model).run(None, {})[0]


@pytest.mark.parametrize("kind", ["INT2", "UINT2", "INT4", "FLOAT4E2M1", "INT8"])
def test_codes_lie_as_onnx_reads_them(kind):
    if not hasattr(onnx.TensorProto, kind):
        pytest.skip(f"onnx {onnx.__version__} has no {kind}")
    width = {"2": 2, "4": 4, "8": 8}[kind.removesuffix("E2M1")[-1]]
    patterns = np.random.default_rng(0).integers(0, 1 << width, (3, 7), dtype=np.uint8)
    codes = patterns.astype(np.int32)
    if kind.startswith("INT"):
        codes -= (codes >= 1 << (width - 1)) * (1 << width)
    raw = packed(codes, kind)
    assert len(raw) == -(-21 * width // 8)
    assert np.array_equal(unpacked(raw, kind, (3, 7)), patterns)
    tensor = onnx.TensorProto(data_type=getattr(onnx.TensorProto, kind), dims=(3, 7), raw_data=raw)
    read = onnx.numpy_helper.to_array(tensor)
    if kind.startswith("FLOAT"):
        from quantlens.formats.elements import ELEMENTS

        codes = ELEMENTS["E2M1"].decode(torch.from_numpy(patterns)).numpy()
    assert np.array_equal(read.astype(np.float32), codes.astype(np.float32))


@pytest.mark.parametrize(("bits", "opset"), FORMATS)
def test_weights_decode_to_what_was_simulated(bits, opset, made, tmp_path):
    """Bit for bit; and the file has them no larger than they are."""
    qmodel = made(bits)
    proto = onnx.load(path := export(qmodel, tmp_path / "m.onnx", opset=opset))
    assert [one.version for one in proto.opset_import] == [opset]
    readers = {name: node for node in proto.graph.node for name in node.input}
    for edge, quantizer in qmodel.weight_edges():
        expected = quantizer(qmodel.graph.tensor(str(edge.value.target)))
        turned = readers[f"{edge.key}.value"].op_type == "MatMul"
        name = f"{edge.key}.value" if turned or quantizer.axis == 0 else readers[f"{edge.key}.value"].output[0]
        assert np.array_equal(decoded(proto, name), (expected.mT if turned else expected).numpy())
    found = verify(path, qmodel)
    assert found.ok, found.sentences()
    assert {key.rpartition(".")[0] for key in qmodel.plan.quantizers} == set(found.equal)
    keys = tuple(f"{edge.key}." for edge, _ in qmodel.weight_edges())
    stored = sum(len(one.raw_data) for one in proto.graph.initializer if one.name.startswith(keys))
    sizes = weight_sizes(qmodel, path, opset)
    (kind,) = sizes.keys() - {"float32"}
    assert sizes[kind].size == stored
    assert sizes[kind].values == sum(qmodel.graph.tensor(str(e.value.target)).numel() for e, _ in qmodel.weight_edges())


@pytest.mark.parametrize(("bits", "opset"), FORMATS)
def test_what_needs_a_later_operator_set_says_so(bits, opset, made, tmp_path):
    if opset > OPSETS[0]:
        with pytest.raises(UnsupportedError, match=f"operator set {opset} on.*--opset {opset}"):
            export(made(bits), tmp_path / "m.onnx", opset=opset - 1)
    held = export(made(bits), tmp_path / "m.onnx", opset=opset - 1 if opset > OPSETS[0] else None, simulate=True)
    assert verify(held, made(bits)).ok


@pytest.mark.parametrize("bits", ["W2A8", "FP8", "FP8-E5M2"])
def test_onnx_runtime_runs_them(bits, made, pictures, tmp_path):
    qmodel, opset = made(bits), max(BITS[bits], LATEST)
    if BITS[bits] > LATEST:
        pytest.skip(f"onnx {onnx.__version__} has no operator set {BITS[bits]}")
    artefact = Artefact(export(qmodel, tmp_path / "m.onnx", opset=opset), threads=1)
    for batch in (pictures, pictures[:1]):
        assert sqnr(qmodel(batch), artefact(batch)) > 35
    assert "disable_quant_qdq" in " ".join(artefact.advice())


@pytest.mark.parametrize("bits", [pytest.param("NVFP4", marks=needs(23))])
def test_openvino_reads_blocks_of_an_onnx_file(bits, made, pictures, tmp_path):
    openvino = pytest.importorskip("openvino", reason="the deploy extra is not installed")
    qmodel = made(bits)
    core = openvino.Core()
    model = core.read_model(export(qmodel, tmp_path / "m.onnx", opset=BITS[bits]))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert sqnr(qmodel(pictures), compiled({"images": pictures.numpy()})["logits"]) > 35


@pytest.mark.parametrize("opset", sorted({22, LATEST}))
def test_later_operator_sets_compute_the_same(opset, loaded, pictures, tmp_path):
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target="openvino-cpu")
    first, other = (export(qmodel, tmp_path / f"{n}.onnx", opset=n) for n in (None, opset))
    assert onnx.load(other).opset_import[0].version == opset
    assert torch.equal(Artefact(first, threads=1)(pictures), Artefact(other, threads=1)(pictures))


@pytest.mark.parametrize(
    ("ending", "opset", "words"),
    [
        (".onnx", OPSETS[0] - 1, "21 to 26"),
        (".onnx", OPSETS[-1] + 1, "21 to 26"),
        (".onnx", 21.0, "opset is 21.0"),
        (".xml", 21, "leave it out"),
        (".pt2", 25, "leave it out"),
    ],
)
def test_operator_sets_that_are_none(ending, opset, words, made, tmp_path):
    with pytest.raises(QuantlensError, match=words):
        export(made("W2A8"), tmp_path / f"m{ending}", opset=opset)
    assert not list(tmp_path.iterdir())


def test_an_older_onnx_is_named(made, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 22)
    with pytest.raises(QuantlensError, match="ends at operator set 22"):
        export(made("W2A8"), tmp_path / "m.onnx", opset=25)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ("WMXFP6A8", "MXFP6, which ONNX has no type for.*MXFP4"),
        ("WMXINT8A8", "MXINT8.*FP8"),
        ("MXFP4", "as the model runs"),
    ],
)
def test_what_onnx_has_no_type_for(bits, words, loaded, pictures, tmp_path):
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits=bits)
    with pytest.raises(UnsupportedError, match=words):
        export(qmodel, tmp_path / "m.onnx", opset=LATEST)


@pytest.mark.parametrize("bits", [pytest.param("FP8", marks=needs(21)), pytest.param("W2A8", marks=needs(25))])
def test_openvino_files_have_integers_of_eight_and_four_bits(bits, made, tmp_path):
    pytest.importorskip("openvino", reason="the deploy extra is not installed")
    with pytest.raises(UnsupportedError, match="OpenVINO"):
        export(made(bits), tmp_path / "m.xml")


@pytest.mark.parametrize(
    ("bits", "part", "words"),
    [
        pytest.param("NVFP4", "codes", r"code \[\d+, \d+\] is", marks=needs(23)),
        pytest.param("NVFP4", "block_scale", r"scale of a block \[0, 0\] is", marks=needs(23)),
        pytest.param("NVFP4", "scale", "scale is", marks=needs(23)),
        pytest.param("MXFP4", "block_scale", r"scale of a block \[0, 0\] is", marks=needs(24)),
        pytest.param("W2A8", "codes", r"code \[\d+, \d+\] is", marks=needs(25)),
        ("FP8", "codes", r"code \[\d+, \d+\] is"),
        ("FP8", "scale", r"scale \[0\] is"),
    ],
)
def test_a_changed_bit_is_found(bits, part, words, made, tmp_path):
    qmodel = made(bits)
    proto = onnx.load(export(qmodel, tmp_path / "m.onnx", opset=BITS[bits]))
    held = next(one for one in proto.graph.initializer if one.name == f"{KEY}.{part}")
    held.raw_data = bytes([held.raw_data[0] ^ 1]) + held.raw_data[1:]
    onnx.save(proto, tmp_path / "changed.onnx")
    (first,) = verify(tmp_path / "changed.onnx", qmodel).different
    assert first.edge == KEY
    assert re.search(words, first.what), first.what


def test_another_block_size_is_found(made, tmp_path):
    qmodel = made("NVFP4")
    proto = onnx.load(export(qmodel, tmp_path / "m.onnx", opset=23))
    node = next(node for node in proto.graph.node if node.output[0] == f"{KEY}.value")
    next(one for one in node.attribute if one.name == "block_size").i = 32
    onnx.save(proto, tmp_path / "changed.onnx")
    (first,) = verify(tmp_path / "changed.onnx", qmodel).different
    assert "blocks of 16 there, the file of 32" in first.what


def test_a_threshold_needs_a_runtime(made, pictures, tmp_path):
    """Where none runs the file, that is said, and nothing is left behind."""
    images = pictures.repeat(3, 1, 1, 1)
    try:
        Artefact(export(made("NVFP4"), tmp_path / "m.onnx", opset=23))
    except QuantlensError:
        (tmp_path / "m.onnx").unlink()
    else:
        pytest.skip("this ONNX Runtime runs NVFP4")
    with pytest.raises(UnsupportedError, match=r"set by running the file.*ONNX Runtime.*leave them out"):
        export(made("NVFP4"), tmp_path / "m.onnx", opset=23, guard_images=images)
    assert not list(tmp_path.iterdir())
