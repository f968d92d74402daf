"""Exported files, run in their runtimes for real."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.data import load_images, open_source
from quantlens.errors import BadWeightsError, QuantlensError, UnknownNameError, UnsupportedError
from quantlens.export.export import export
from quantlens.export.exported import Artefact
from quantlens.export.guards import GUARDS, guard_metrics, looks_unknown
from quantlens.export.parity import parity
from quantlens.export.verify import verify
from quantlens.formats import GroupAffine, Uniform
from quantlens.metrics import METRICS
from quantlens.qmodel import float_model
from quantlens.qmodel.plan import TARGETS, target_named

onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")
ENDINGS = (".onnx", ".xml")
TARGET = "openvino-cpu"


def _sqnr(expected, got) -> float:
    noise = float((expected - got).square().sum())
    return float("inf") if noise == 0 else float(10 * np.log10(float(expected.square().sum()) / noise))


def _need(ending):
    if ending == ".xml":
        pytest.importorskip("openvino", reason="the deploy extra is not installed")


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_float_graph_is_the_model(ending, architecture, loaded, pictures, tmp_path):
    _need(ending)
    model = loaded[architecture]
    artefact = Artefact(export(model, tmp_path / f"m{ending}"), threads=1)
    for batch in (pictures, pictures[:1], pictures[:3]):
        assert _sqnr(model(batch), artefact(batch)) > 80


@pytest.mark.parametrize("ending", ENDINGS)
def test_integers_are_those_that_were_measured(ending, architecture, loaded, pictures, tmp_path):
    _need(ending)
    qmodel = ql.quantize(loaded[architecture], pictures, method="minmax", bits="W8A8", target=TARGET)
    artefact = Artefact(export(qmodel, tmp_path / f"m{ending}"), threads=1)
    found = verify(artefact.path, qmodel)
    assert found.ok, found.sentences()
    assert set(found.equal) == {key.rpartition(".")[0] for key in qmodel.plan.quantizers}
    assert _sqnr(qmodel(pictures), artefact(pictures)) > 35
    assert _sqnr(qmodel(pictures), artefact(pictures)) > _sqnr(loaded[architecture](pictures), artefact(pictures)) + 3


def test_openvino_quantizes_nothing_that_was_not_measured(loaded, pictures, tmp_path):
    """Before layers with integer weights and float inputs it would make 8-bit activations of its own."""
    openvino = pytest.importorskip("openvino", reason="the deploy extra is not installed")
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A32")
    path = export(qmodel, tmp_path / "m.xml")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = torch.from_numpy(compiled({"images": pictures.numpy()})["logits"])
    for found in (got, Artefact(path, threads=1)(pictures)):
        assert _sqnr(qmodel(pictures), found) > 70


def test_codes_scales_and_zero_points_are_in_the_file(loaded, pictures, tmp_path):
    """Every initializer named by an edge is the quantizer's own parameter, every stored weight its codes."""
    from onnx import numpy_helper

    for bits in ("W8A8", "W7A8", "W5A8", "W4A8"):
        qmodel = ql.quantize(loaded["swin"], pictures, method="minmax", bits=bits, target=TARGET)
        proto = onnx.load(export(qmodel, tmp_path / "m.onnx"))
        held = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        for key, quantizer in qmodel.plan.quantizers.items():
            assert np.array_equal(held[f"{key}.scale"], quantizer.scale.numpy())
            assert np.array_equal(held[f"{key}.zero_point"].astype(np.int32), quantizer.zero_point.numpy())
        for edge, quantizer in qmodel.weight_edges():
            codes = quantizer.encode(qmodel.graph.tensor(str(edge.value.target))).numpy()
            stored = held[f"{edge.key}.codes"].astype(np.int32)
            assert np.array_equal(stored if codes.ndim == 4 else stored.T, codes)
        kinds = [n.op_type for n in proto.graph.node]
        inputs = [k for k in qmodel.plan.quantizers if k.endswith(".input")]
        assert kinds.count("QuantizeLinear") <= len(inputs), "an activation is quantized once, however many read it"


def test_one_site_is_exact(loaded, pictures, tmp_path):
    """Integer arithmetic of one linear layer: the runtime's output equals the simulation's to float rounding."""
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target=TARGET)
    for key in [k for k in qmodel.plan.quantizers if not k.startswith("head.")]:
        del qmodel.plan.quantizers[key]
    qmodel = ql.QuantizedModel(qmodel.graph, qmodel.plan, preprocess=qmodel.preprocess)
    for ending in ENDINGS:
        _need(ending)
        artefact = Artefact(export(qmodel, tmp_path / f"m{ending}"), threads=1)
        # a value on the border between two codes may fall to either side: one such flip costs one step of one input
        assert _sqnr(qmodel(pictures), artefact(pictures)) > 55


def test_four_bit_weights_are_packed(loaded, pictures, tmp_path):
    """The 4-bit codes take half the room of the 8-bit ones."""
    sizes = {}
    for bits in ("W8A8", "W4A8"):
        qmodel = ql.quantize(ql.load_model("digits-vit"), _digits(8), method="minmax", bits=bits, target=TARGET)
        proto = onnx.load(export(qmodel, tmp_path / "m.onnx"))
        sizes[bits] = sum(len(t.raw_data) for t in proto.graph.initializer if t.name.endswith(".codes"))
        assert _sqnr(qmodel(_digits(4)), Artefact(export(qmodel, tmp_path / "m.onnx"), threads=1)(_digits(4))) > 35
    assert sizes["W4A8"] == pytest.approx(sizes["W8A8"] / 2, rel=1e-3)


def _digits(count):
    return _tensor(f"embedded:digits-calibration?n={count}&seed=0")


@cache
def _tensor(source):
    from quantlens.data import load_images, open_source

    model = ql.load_model("digits-vit")
    return load_images(open_source(source), model.preprocess, cache_dir=False).tensor()


# -- what has no integers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "bits", "why"), [("repq-vit", "W6A6", "6 bits"), ("quantlens-fast", "W4A4", "squared-rows")]
)
def test_other_formats_are_refused_or_simulated(loaded, pictures, tmp_path, method, bits, why):
    qmodel = ql.quantize(loaded["vit"], pictures, method=method, bits=bits)
    with pytest.raises(UnsupportedError, match=rf"{why}.*--target"):
        export(qmodel, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    artefact = Artefact(export(qmodel, tmp_path / "m.onnx", simulate=True), threads=1)
    assert _sqnr(qmodel(pictures), artefact(pictures)) > 60


@pytest.mark.parametrize("key", ["blocks.0.attn.scores.k", "blocks.1.mlp.fc2.input"])
def test_blocks_of_channels_are_simulated(loaded, pictures, tmp_path, key):
    """One at a time: at 3 bits the last bit of one sum moves codes all over a network that was never trained."""
    qmodel = ql.quantize(loaded["vit"], pictures, method="quantlens-fast", bits="W8A3")
    assert isinstance(qmodel.plan.quantizers[key], GroupAffine)
    for other in list(qmodel.plan.quantizers):
        if other != key:
            del qmodel.plan.quantizers[other]
    with pytest.raises(UnsupportedError, match="--target"):
        export(qmodel, tmp_path / "m.onnx")
    artefact = Artefact(export(qmodel, tmp_path / "m.onnx", simulate=True), threads=1)
    assert _sqnr(qmodel(pictures), artefact(pictures)) > 90


def test_targets_keep_methods_inside(loaded, pictures):
    qmodel = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W8A8", target=TARGET)
    target = target_named(TARGET)
    for key, quantizer in qmodel.plan.quantizers.items():
        site, edge = key.rsplit(".", 1)
        assert (qmodel.graph.sites[site].kind, edge) in target.edges
        assert type(quantizer) is Uniform
        assert quantizer.symmetric if edge == "weight" else quantizer.axis is None
        assert bool(((quantizer.zero_point >= quantizer.qmin) & (quantizer.zero_point <= quantizer.qmax)).all())
    with pytest.raises(UnsupportedError, match="8, 7, 6, 5 or 4"):
        ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W3A8", target=TARGET)
    with pytest.raises(UnsupportedError, match="activations"):
        ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W8A4", target=TARGET)
    with pytest.raises(UnknownNameError):
        target_named("npu")
    with pytest.raises(QuantlensError, match="openvino-cpu"):
        ql.quantize(loaded["vit"], pictures, method="repq-vit", target="npu")
    assert all(t.summary for t in TARGETS.values())


@pytest.mark.slow
def test_pytorch_runs_it_without_quantlens(loaded, pictures, tmp_path):
    """The .pt2 file, loaded in a process that never imports quantlens, gives the simulation's logits."""
    import subprocess
    import sys

    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target=TARGET)
    path = export(qmodel, tmp_path / "m.pt2")
    torch.save(pictures, tmp_path / "x.pt")
    code = (
        "import sys, torch, torch.ao.quantization.fx._decomposed\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "torch.save(model(torch.load(sys.argv[2])), sys.argv[3])\n"
        "assert 'quantlens' not in sys.modules\n"
    )
    files = [str(path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _sqnr(qmodel(pictures), torch.load(tmp_path / "y.pt")) > 40
    exported = ql.Artefact(path)
    logits, scores = exported.run(pictures.numpy())
    assert exported.num_classes == logits.shape[1]
    np.testing.assert_allclose(scores, qmodel(pictures).logsumexp(1).numpy(), rtol=1e-5)
    stored = torch.export.load(path).state_dict | dict(torch.export.load(path).constants)
    assert sum(t.dtype in (torch.int8, torch.uint8) for t in stored.values()) == len(qmodel.weight_edges())
    with pytest.raises(UnsupportedError, match="--simulate"):
        export(ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W6A6"), tmp_path / "n.pt2")
    simulated = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W6A6")
    program = torch.export.load(export(simulated, tmp_path / "n.pt2", simulate=True))
    assert _sqnr(simulated(pictures), program.module()(pictures)) > 40


# -- what the file says of itself --------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("guard", ["energy", "msp", "maxlogit"])
def test_the_guard(guard, ending, loaded, pictures, tmp_path):
    _need(ending)
    model = float_model(loaded["vit"])
    images = pictures.repeat(3, 1, 1, 1) * torch.linspace(0.5, 1.5, 24)[:, None, None, None]
    artefact = Artefact(export(model, tmp_path / f"m{ending}", guard=guard, guard_images=images, keep=0.75), threads=1)
    logits, scores = artefact.run(images.numpy())
    assert np.allclose(scores, GUARDS[guard](logits), atol=1e-4)
    expected = {
        "msp": torch.from_numpy(logits).softmax(1).amax(1),
        "energy": torch.from_numpy(logits).logsumexp(1),
        "maxlogit": torch.from_numpy(logits).amax(1),
    }[guard]
    assert np.allclose(scores, expected.numpy(), atol=1e-4)
    threshold = artefact.guard["threshold"]
    assert threshold["n"] == 24
    assert (scores >= threshold["value"] - 1e-5).mean() == 0.75


def test_how_often_the_guard_is_right():
    guard = {"score": "maxlogit", "keep": 0.75, "threshold": {"value": 2.0, "n": 9}}
    known = looks_unknown(guard, np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.5], [9.0, 0.0]]))
    other = looks_unknown(guard, np.array([[1.0, 0.0], [2.5, 2.0]]))
    assert known.tolist() == [False, False, True, False], "a score on the threshold is known"
    found = guard_metrics(guard, known, {"far": other})
    assert found["id"] == {"n": 4, "kept": 0.75}
    assert found["ood"]["far"] == {"n": 2, "flagged": 0.5, "balanced_accuracy": 0.625}
    assert found["threshold"] == guard["threshold"]
    bare = {**guard, "threshold": None}
    assert looks_unknown(bare, np.zeros((1, 2))) is None
    assert guard_metrics(bare, None, {}) is None
    assert looks_unknown(None, np.zeros((1, 2))) is None


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_file_is_measured_like_a_model(ending, tmp_path):
    _need(ending)
    model = ql.load_model("digits-vit")
    qmodel = ql.quantize(model, _digits(16), method="minmax", bits="W8A8", target=TARGET)
    artefact = Artefact(export(qmodel, tmp_path / f"m{ending}", guard_images=_digits(16)), threads=1)
    settings = {"id": "embedded:digits-test?n=100&seed=0", "ood": {"letters": "embedded:letters?n=60&seed=0"}}
    measured = ql.evaluate(artefact, **settings, cache_dir=False)
    shipped = measured.to_dict()
    simulated = ql.evaluate(qmodel, **settings, cache_dir=False).to_dict()
    labels = load_images(open_source(settings["id"]), model.preprocess, cache_dir=False).labels
    right = artefact.run(_tensor(settings["id"]).numpy())[0].argmax(1) == np.asarray(labels)
    assert shipped["id"]["top1"] == pytest.approx(float(right.mean())), "what the file's own logits say"
    assert shipped["ood"].keys() == simulated["ood"].keys()
    assert (shipped["method"], shipped["bits"], shipped["model"]) == ("minmax", "W8A8", "digits-vit")
    assert "knn" in shipped["scores_unavailable"]
    assert simulated["guard"] is None
    value = artefact.guard["threshold"]["value"]
    for source, what in (("embedded:digits-test?n=100&seed=0", "id"), ("embedded:letters?n=60&seed=0", "letters")):
        unknown = float((artefact.run(_tensor(source).numpy())[1] < value).mean())
        said = 1 - shipped["guard"]["id"]["kept"] if what == "id" else shipped["guard"]["ood"][what]["flagged"]
        assert said == pytest.approx(unknown), "what the file's own second output says"
    assert METRICS["flagged"].title in str(measured)
    found = parity(qmodel, artefact, _digits(12))
    assert found.n == 12
    expected, got = qmodel(_digits(12)), torch.as_tensor(artefact.run(_digits(12).numpy())[0])
    assert found.agreement == pytest.approx(float((expected.argmax(1) == got.argmax(1)).double().mean()))
    assert found.sqnr_db == pytest.approx(_sqnr(expected, got), rel=1e-3)
    assert "equal predictions" in found.sentence(artefact.runtime)


def test_predictions_of_pictures(tmp_path):
    from PIL import Image

    model = ql.load_model("digits-vit")
    artefact = Artefact(export(model, tmp_path / "m.onnx", guard_images=_digits(64)), threads=1)
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    first, second = artefact.predict([noise, tmp_path / "noise.png"])
    assert first == second
    exif = Image.Exif()
    exif[0x0112] = 8
    noise.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "lying.png", exif=exif)
    with Image.open(tmp_path / "lying.png") as lying:
        assert artefact.predict([lying, tmp_path / "lying.png"]) == [first, first]
    assert 0 < first.probability <= 1
    assert first.unknown == (first.score < artefact.guard["threshold"]["value"])
    if artefact.class_names:
        assert first.name == artefact.class_names[first.label]


def test_wrong_files_are_named(loaded, tmp_path):
    with pytest.raises(UnsupportedError, match=r"\.onnx or \.xml"):
        export(loaded["vit"], tmp_path / "m.tflite")
    with pytest.raises(UnknownNameError, match="energy"):
        export(loaded["vit"], tmp_path / "m.onnx", guard="energie")
    with pytest.raises(QuantlensError, match=r"0\.95"):
        export(loaded["vit"], tmp_path / "m.onnx", keep=95)
    with pytest.raises(BadWeightsError, match="no exported model"):
        Artefact(tmp_path / "absent.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"not a model")
    with pytest.raises(BadWeightsError, match="it is text, which begins with"):
        Artefact(tmp_path / "damaged.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"\x08\x0a\xff\x00\xfe\x01")
    with pytest.raises(BadWeightsError, match="cannot be run"):
        Artefact(tmp_path / "damaged.onnx")
    path = export(loaded["vit"], tmp_path / "foreign.onnx")
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    with pytest.raises(BadWeightsError, match="not written by"):
        Artefact(path)


def test_the_record_travels(loaded, pictures, tmp_path):
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8", target=TARGET, seed=3)
    artefact = Artefact(export(qmodel, tmp_path / "m.onnx"), threads=1)
    assert artefact.info["seed"] == 3
    assert artefact.calibration["n"] == 8
    assert artefact.preprocess == qmodel.preprocess
    assert json.dumps(artefact.options)
    assert artefact.guard["threshold"] is None
    openvino = Artefact(export(qmodel, tmp_path / "m.xml"), threads=1)
    assert "INFERENCE_PRECISION_HINT" in " ".join(openvino.advice())
    assert openvino.fingerprint != artefact.fingerprint == Artefact(tmp_path / "m.onnx").fingerprint
    assert artefact.size_mb == pytest.approx((tmp_path / "m.onnx").stat().st_size / 1e6)
