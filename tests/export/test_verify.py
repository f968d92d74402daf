"""Exported files against the checkpoint that they were made from: what differs is found and named."""

from __future__ import annotations

import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.errors import BadWeightsError
from quantlens.export.export import export
from quantlens.export.verify import verify
from quantlens.qmodel.checkpoint import plan_digest

onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
KEY = "blocks.0.mlp.fc1.weight"
EDGES = (KEY, "blocks.1.attn.qkv.input", "blocks.0.attn.scores.k", "blocks.0.attn.probs.output")


@pytest.fixture(scope="module")
def made(loaded, tmp_path_factory):
    """A checkpoint of the small ViT, and a folder for its files."""
    folder = tmp_path_factory.mktemp("verify")
    images = torch.linspace(-1, 1, 4 * 3 * 32 * 32).sin().reshape(4, 3, 32, 32)
    qmodel = ql.quantize(loaded["vit"], images, method="minmax", bits="W8A8", target="tensorrt")
    qmodel.save(folder / "q.safetensors")
    export(qmodel, folder / "m.onnx")
    return folder, ql.load(folder / "q.safetensors")


def _changed(made, tmp_path, change):
    """The .onnx with something changed in its graph."""
    proto = onnx.load(made[0] / "m.onnx")
    change({tensor.name: tensor for tensor in proto.graph.initializer}, proto.graph.node)
    onnx.save(proto, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def _one_more(tensor, place):
    """One integer, or number, of a constant, changed by one (in its last place)."""
    values = onnx.numpy_helper.to_array(tensor).copy()
    flat = values.reshape(-1)
    flat[place] = flat[place] + 1 if values.dtype.kind in "iu" else np.nextafter(flat[place], np.float32(9))
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def test_all_sites_agree(made):
    folder, qmodel = made
    found = verify(folder / "m.onnx", folder / "q.safetensors")
    assert found.ok, found.sentences()
    sites = {key.rpartition(".")[0] for key in qmodel.plan.quantizers}
    assert set(found.equal) == sites
    assert set(found.in_float) == {site.name for site in qmodel.graph.sites} - sites
    assert (found.intact, found.digest["file"]) == (True, plan_digest(qmodel))
    text = " ".join(found.sentences())
    assert f"{len(sites)} of {len(sites)} sites" in text
    assert "blocks.0.norm1" in text, "which stays in float"
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True


@pytest.mark.parametrize("place", [0, 77, -1])
def test_one_integer_of_one_weight(made, tmp_path, place):
    qmodel = made[1]
    weight = qmodel.graph.tensor(qmodel.graph.sites["blocks.0.mlp.fc1"].weight)
    row, column = np.unravel_index(place % weight.numel(), weight.T.shape)  # the file holds the transposed weight
    changed = _changed(made, tmp_path, lambda held, _: _one_more(held[f"{KEY}.codes"], place))
    found = verify(changed, qmodel)
    assert not found.ok
    (first,) = found.different
    assert first.edge == KEY
    assert f"code [{column}, {row}] is" in first.what
    assert f"1 of {weight.numel()} differ" in first.what
    assert found.intact is False


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("what", ["scale", "zero_point"])
def test_a_scale_or_a_zero_point(made, tmp_path, edge, what):
    changed = _changed(made, tmp_path, lambda held, _: _one_more(held[f"{edge}.{what}"], 0))
    (first,) = verify(changed, made[1]).different
    assert (first.edge, first.what.startswith(what.replace("_", " "))) == (edge, True)


def _quantize_by_another_scale(held, nodes):
    node = next(n for n in nodes if n.op_type == "QuantizeLinear" and n.output[0] == "blocks.0.mlp.fc2.input.codes")
    node.input[1] = "blocks.0.attn.qkv.input.scale"


def _read_another_weight(held, nodes):
    node = next(n for n in nodes if n.output[0] == f"{KEY}.value")
    node.input[0] = "blocks.1.mlp.fc1.weight.codes"


def _swap_inputs(held, nodes):
    node = next(n for n in nodes if f"{KEY}.value" in n.input)
    node.input[0] = "blocks.0.attn.qkv.input.value"


def _compute_in_float(held, nodes):
    node = next(n for n in nodes if n.op_type == "DequantizeLinear" and n.output[0] == f"{KEY}.value")
    node.op_type, node.input[:] = "Identity", [f"{KEY}.scale"]


@pytest.mark.parametrize(
    ("change", "edge", "words"),
    [
        (_quantize_by_another_scale, "blocks.0.mlp.fc2.input", "by different numbers"),
        (_read_another_weight, KEY, "differ"),
        (_swap_inputs, "blocks.0.mlp.fc1.input", "scale is"),
        (_compute_in_float, KEY, "in float"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_operations_use_counts(made, tmp_path, change, edge, words):
    """Right constants under the right names are not enough."""
    found = verify(_changed(made, tmp_path, change), made[1])
    named = {one.edge: one.what for one in found.different}
    assert re.search(words, named[edge]), named


def test_integers_that_the_checkpoint_has_not(made, loaded):
    folder, qmodel = made
    fewer = ql.QuantizedModel(
        qmodel.graph,
        ql.qmodel.Plan({k: q for k, q in qmodel.plan.quantizers.items() if not k.startswith("blocks.0.mlp")}),
        preprocess=qmodel.preprocess,
    )
    found = verify(folder / "m.onnx", fewer)
    assert any("the checkpoint has none" in one.what for one in found.different)
    assert found.another
    found = verify(folder / "m.onnx", loaded["vit"])
    assert not found.ok
    assert not found.equal


def test_another_checkpoint_is_named_as_such(made, loaded, tmp_path):
    folder, _ = made
    images = torch.linspace(-1, 1, 4 * 3 * 32 * 32).cos().reshape(4, 3, 32, 32)
    other = ql.quantize(loaded["vit"], images, method="minmax", bits="W8A8", target="tensorrt")
    other.save(tmp_path / "other.safetensors")
    found = verify(folder / "m.onnx", tmp_path / "other.safetensors")
    first = found.sentences()[0]
    assert not found.ok
    assert "from another checkpoint than" in first
    assert "other.safetensors" in first
    bare = onnx.load(folder / "m.onnx")
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    found = verify(tmp_path / "bare.onnx", folder / "q.safetensors")
    assert (found.ok, found.intact, found.digest["file"]) == (True, None, None), "the integers speak for themselves"
    assert "no digest" in found.sentences()[-1]


def test_openvino(loaded, pictures, tmp_path):
    """(With zero points that differ: those that are 0, of a symmetric plan, OpenVINO stores once for all.)"""
    pytest.importorskip("openvino", reason="the deploy extra is not installed")
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target="openvino-cpu")
    path = export(qmodel, tmp_path / "m.xml")
    found = verify(path, qmodel)
    assert found.ok, found.sentences()
    assert found.equal == verify(export(qmodel, tmp_path / "m.onnx"), qmodel).equal
    text, weights = path.read_text(), bytearray(path.with_suffix(".bin").read_bytes())
    for name, words in (
        (f"{KEY}.codes", r"code \[0, 0\] is"),
        ("blocks.0.attn.qkv.input.zero_point", "by different num"),
    ):
        start = int(re.search(rf'name="{re.escape(name)}".*?offset="(\d+)"', text, re.DOTALL)[1])
        changed = bytearray(weights)
        changed[start] ^= 1
        path.with_suffix(".bin").write_bytes(changed)
        found = verify(path, qmodel)
        (first,) = found.different
        assert name.startswith(first.edge), first
        assert re.search(words, first.what), first
        assert found.intact is False
    path.with_suffix(".bin").write_bytes(weights[:2000])
    with pytest.raises(BadWeightsError, match="are no pair, or one is damaged"):
        verify(path, qmodel)
    os.remove(path.with_suffix(".bin"))
    with pytest.raises(BadWeightsError, match=r"m\.bin"):
        verify(path, qmodel)


@pytest.mark.slow
def test_pytorch(made, tmp_path):
    qmodel = made[1]
    path = export(qmodel, tmp_path / "m.pt2")
    found = verify(path, qmodel)
    assert found.ok, found.sentences()
    assert found.equal == verify(made[0] / "m.onnx", qmodel).equal
    codes = qmodel.plan.quantizers[KEY].encode(qmodel.graph.tensor("blocks.0.mlp.fc1.weight")).numpy()
    changed = codes.copy()
    changed[3, 2] ^= 1
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "changed.pt2", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, changed.tobytes() if data == codes.tobytes() else data)
    (first,) = verify(tmp_path / "changed.pt2", qmodel).different
    assert (first.edge, "code [3, 2] is" in first.what) == (KEY, True)


def test_layers_that_read_one_value(loaded, pictures, tmp_path):
    """Their quantizers are written once, and found at each of them."""
    qmodel = ql.quantize(loaded["plain"], pictures, method="minmax", bits="W4A8", target="openvino-cpu")
    found = verify(export(qmodel, tmp_path / "m.onnx"), qmodel)
    assert found.ok, found.sentences()
    assert {"layers.0.attention.query", "layers.0.attention.value"} <= set(found.equal)


def test_formats_without_integers_are_named(loaded, pictures, tmp_path):
    qmodel = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W6A6")
    found = verify(export(qmodel, tmp_path / "m.onnx", simulate=True), qmodel)
    assert found.ok, found.sentences()
    assert "blocks.0.attn.qkv" in found.simulated
    assert "float operations" in " ".join(found.sentences())


def test_files_that_cannot_be_compared(made, tmp_path):
    folder, qmodel = made
    content = (folder / "m.onnx").read_bytes()
    foreign = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    for name, data, words in (
        ("cut.onnx", content[: len(content) // 2], "cut off"),
        ("text.onnx", b"not a model", "it is text"),
        ("foreign.onnx", foreign.SerializeToString(), "not written by"),
        ("m.tflite", content, r"end in \.onnx"),
        ("m.pt2", content, "cannot be run by PyTorch"),
        ("absent.onnx", None, "no exported model"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(BadWeightsError, match=words):
            verify(tmp_path / name, qmodel)
    with pytest.raises(BadWeightsError, match="no quantized checkpoint"):
        verify(folder / "m.onnx", tmp_path / "absent.safetensors")
