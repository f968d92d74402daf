"""What other tools make of a float model, and how their files are run."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.errors import QuantlensWarning
from quantlens.export import exported, peers
from quantlens.export.export import export
from quantlens.export.exported import AS_FLOAT, PRECISE, SATURATE, Artefact, open_file
from quantlens.export.peers import TOOLS, peer_files
from quantlens.export.runtimes import openvino_settings


def _needed(tool):
    """Skips where the tool is not there, or cannot be imported beside this OpenVINO."""
    if peers.find_spec(tool.package) is None:
        pytest.skip(f"{tool.package} is not installed")
    if tool.package == "nncf":
        openvino = pytest.importorskip("openvino", reason="the deploy extra is not installed")
        if not hasattr(openvino.Type, "u2"):
            pytest.skip("nncf 3.4 needs a later OpenVINO than this")


@pytest.fixture(scope="module")
def small():
    """A float model of one attention-free block, with images."""
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package, reason="the deploy extra is not installed")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.LayerNorm(8)
            self.up, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

        def forward(self, images):
            tokens = self.norm(self.patch(images).flatten(2).transpose(1, 2))
            return self.head(torch.nn.functional.gelu(self.up(tokens)).mean(1))

    torch.manual_seed(0)
    return ql.load_model(Block(), input_size=(3, 8, 8), name="block"), torch.randn(4, 3, 8, 8).numpy()


def _near(path, model, images):
    """SQNR of a file's logits against the float model's, dB."""
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    noise = expected - Artefact(path, threads=1).run(images)[0]
    return 10 * np.log10((expected**2).sum() / (noise**2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_makes_a_file(small, name, monkeypatch, tmp_path):
    """It holds 8-bit weights, gives nearly the float model's logits, and says what made it of how many images; nothing
    of the tool is imported here."""
    tool, (model, images) = TOOLS[name], small
    _needed(tool)
    monkeypatch.setattr(peers, "TOOLS", {name: tool})
    export(model, tmp_path / tool.source)
    there = "nncf" in sys.modules
    found = peer_files(images, tmp_path)
    assert found == {tool.label: tmp_path / tool.target}
    assert ("nncf" in sys.modules) == there
    path = found[tool.label]
    assert 20 < _near(path, model, images) < 60, "quantized, and not broken"
    made = Artefact(path)
    assert (made.name, made.method, made.bits, made.calibration) == ("block", name, "W8A8", {"n": 4})
    assert made.info["checkpoint_sha256"] == model.checkpoint_sha256


def test_what_cannot_be_made_is_told(small, monkeypatch, tmp_path):
    model, images = small
    export(model, tmp_path / "fp32.onnx")
    tool = TOOLS["onnxruntime-static"]
    monkeypatch.setattr(peers, "TOOLS", {"onnxruntime-static": tool, "none": tool._replace(package="no_such_package")})
    monkeypatch.setattr(peers, "_run", lambda *_: "ValueError: odd")
    with pytest.warns(QuantlensWarning) as said:
        assert peer_files(images, tmp_path) == {}
    assert [str(one.message).partition("left out: ")[2] for one in said] == [
        "it ended with ValueError: odd",
        "no_such_package is not installed",
    ]


def test_a_tool_that_fails_says_why(small, tmp_path):
    (tmp_path / "fp32.onnx").write_text("no model")
    assert "Error" in peers._run("onnxruntime-static", tmp_path / "fp32.onnx", small[1], tmp_path / "out.onnx")


def _as_a_peer(path, target):
    """The same ONNX file as a peer's."""
    import onnx

    made = onnx.load(path)
    said = {p.key: p.value for p in made.metadata_props if p.key not in peers.OF_THE_FILE}
    onnx.helper.set_model_props(made, said | {"own_settings": "true"})
    onnx.save(made, target)
    return target


def test_peers_run_as_their_users_run_them(small, monkeypatch, tmp_path):
    """Where sums saturate, ours avoid it (in OpenVINO in float) and a peer's do not; which is told. Float files and
    7-bit weights have nothing to tell."""
    model, images = small
    files = {}
    for bits in ("W8A8", "W7A8"):
        qmodel = ql.quantize(model, images, method="minmax", bits=bits, target="openvino-cpu")
        files[bits] = export(qmodel, tmp_path / f"{bits}.onnx")
        files[bits, "xml"] = export(qmodel, tmp_path / f"{bits}.xml")
    files["FP32", "xml"] = export(model, tmp_path / "fp32.xml")
    peer = {bits: _as_a_peer(files[bits], tmp_path / f"peer-{bits}.onnx") for bits in ("W8A8", "W7A8")}
    assert [Artefact(path).integers for path in peer.values()] == [None, None] or exported.saturates()
    monkeypatch.setattr(exported, "saturates", lambda: True)
    assert (open_file(peer["W8A8"]).entry, Artefact(peer["W8A8"]).integers) == ("", SATURATE)
    assert (open_file(files["W8A8"]).entry, Artefact(files["W8A8"]).integers) == (PRECISE, None)
    assert Artefact(peer["W7A8"]).integers is None
    assert Artefact(files["W8A8", "xml"]).integers == AS_FLOAT
    assert Artefact(files["FP32", "xml"]).integers is None
    assert Artefact(peer["W8A8"]).facts()["integers"] == SATURATE
    assert openvino_settings(2, True, True) == {"INFERENCE_NUM_THREADS": 2}
    assert openvino_settings(None, False, True)["LP_TRANSFORMS_MODE"] is False
    assert "LP_TRANSFORMS_MODE" not in openvino_settings(None, False, False)


def test_a_peers_openvino_file_saturates(small, monkeypatch, tmp_path):
    import openvino

    model, images = small
    path = export(ql.quantize(model, images, method="minmax", bits="W8A8", target="openvino-cpu"), tmp_path / "m.xml")
    made = openvino.Core().read_model(path)
    for key, value in {"own_settings": "true", "sha256": "", "plan_sha256": ""}.items():
        made.set_rt_info(value, ["quantlens", key])
    openvino.save_model(made, tmp_path / "peer.xml", compress_to_fp16=False)
    given = []
    monkeypatch.setattr(exported, "openvino_settings", lambda *how: given.append(how) or openvino_settings(*how))
    monkeypatch.setattr(exported, "saturates", lambda: True)
    assert Artefact(tmp_path / "peer.xml", threads=1).integers == SATURATE
    assert given == [(1, True, True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_the_shipped_model(name, monkeypatch, tmp_path):
    tool = TOOLS[name]
    _needed(tool)
    monkeypatch.setattr(peers, "TOOLS", {name: tool})
    model = ql.load_model("digits-vit")
    images = ql.data.load_images(ql.data.open_source("embedded:digits-calibration[0:16]"), model.preprocess)
    images = images.tensor().numpy()
    export(model, tmp_path / tool.source)
    path = peer_files(images, tmp_path)[tool.label]
    assert _near(path, model, images) > 25
    assert json.loads(open_file(path).metadata["plan"])["calibration"] == {"n": 16}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_nncf_on_real_models(model_name, monkeypatch, shared_data, tmp_path):
    tool = TOOLS["nncf-transformer"]
    _needed(tool)
    monkeypatch.setattr(peers, "TOOLS", {"nncf-transformer": tool})
    model = ql.load_model(model_name, weights=str(shared_data / "weights" / f"{model_name}.safetensors"))
    source = ql.data.open_source(f"imagenet:{shared_data}/imagenet[1::2]?n=8&seed=0")
    images = ql.data.load_images(source, model.preprocess).tensor().numpy()
    export(model, tmp_path / tool.source)
    path = peer_files(images, tmp_path)[tool.label]
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    assert (expected.argmax(1) == Artefact(path).run(images)[0].argmax(1)).mean() >= 0.75
