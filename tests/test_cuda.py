"""The same on a CUDA GPU as on the processor. Skipped where there is none; `QUANTLENS_TEST_DEVICE=cpu` runs these tests
against the processor itself, which checks the tests."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.methods import registry

DEVICE = os.environ.get("QUANTLENS_TEST_DEVICE", "cuda")

METHODS = sorted(registry.available())
QUICK = {name: {"iterations": 20} for name in ("qdrop", "fima-q", "i-and-s-vit", "quantlens-best")}
QUICK["aphq-vit"] = {"iterations": 20, "mlp_iterations": 40}
QUICK["aocq"] = {"scale_iterations": 10}
QUICK["vt-ptq"] = {"rounds": 3}
"""Methods that at 4 bits turn on single codes: at W4A4 fq-ptq's NLL here is 0.29 on an H200 and 0.19 on a processor."""


@pytest.fixture(scope="module", autouse=True)
def device() -> str:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return DEVICE


@pytest.fixture(scope="module")
def there(device):
    """The shipped model on the GPU."""
    return ql.load_model("digits-vit", device=device)


@pytest.fixture(scope="module")
def sources():
    from quantlens import zoo

    found = zoo.available()["digits-vit"].sources
    return {"id": found.id, "ood": {n: s.source for n, s in found.ood.items()}, "fit": found.fit}


def _kind(value) -> str:
    return torch.device(value).type


def _same_plan(got, here) -> None:
    """Everything is on the device, in the same formats of the same shapes as on the processor."""
    assert {_kind(t.device) for t in got.graph.tensors().values()} == {_kind(DEVICE)}
    assert got.plan.quantizers.keys() == here.plan.quantizers.keys()
    assert got.plan.operators.keys() == here.plan.operators.keys()
    for key, quantizer in here.plan.quantizers.items():
        twin = got.plan.quantizers[key]
        assert twin.config() == quantizer.config(), key
        for name, tensor in quantizer.tensors().items():
            assert _kind(twin.tensors()[name].device) == _kind(DEVICE), key
            assert twin.tensors()[name].shape == tensor.shape, key


def test_the_float_model(digits, there):
    with torch.inference_mode():
        logits = there(digits["images"].to(DEVICE))
    torch.testing.assert_close(logits.cpu(), digits["expected"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, digits, there):
    """Quantized on the GPU: the plan that the processor makes, all tensors there. Not bit-equal: sums have another
    order, and a code at the middle between two may become the other one (as good as here: benchmarks/quality, gpu)."""
    options = {"method": method, "bits": "W4A4", **QUICK.get(method, {})}
    here = ql.quantize(digits["model"], digits["calibration"], **options)
    got = ql.quantize(there, digits["calibration"], **options)
    _same_plan(got, here)
    with torch.inference_mode():
        logits = got(digits["images"].to(DEVICE))
    assert logits.device.type == _kind(DEVICE)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("architecture", ["swin", "deit-distilled", "deit3", "torchvision", "plain"])
@pytest.mark.parametrize("method", ["minmax", "repq-vit", "fq-ptq", "quantlens-fast", "aocq"])
def test_every_architecture(method, architecture, small_models, pictures):
    model = ql.load_model(small_models[architecture], input_size=(3, 32, 32), name=architecture)
    options = {"method": method, "bits": "W8A8", **QUICK.get(method, {})}
    here = ql.quantize(model, pictures, **options)
    got = ql.quantize(model.to(DEVICE), pictures, **options)
    _same_plan(got, here)
    assert bool(torch.isfinite(got(pictures.to(DEVICE))).all())
    model.to("cpu")


def test_a_module_stays_where_it_is(pictures):
    """BatchNorm as well: torch chooses its kernel on a GPU by the size of the batch."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(7200, 5))
    model = ql.load_model(layers.eval().to(DEVICE), input_size=(3, 32, 32))
    assert _kind(model.device) == _kind(DEVICE)
    got = ql.quantize(model, pictures, method="minmax", bits="W8A8")(pictures.to(DEVICE))
    here = ql.quantize(layers.cpu(), pictures, method="minmax", bits="W8A8")(pictures)
    torch.testing.assert_close(got.cpu(), here, rtol=0.02, atol=0.02)


def test_the_gpu_does_the_same_twice(digits, there):
    options = {"method": "quantlens-best", "bits": "W4A4", "seed": 3, **QUICK["quantlens-best"]}
    first, second = (ql.quantize(there, digits["calibration"], **options) for _ in range(2))
    images = digits["images"].to(DEVICE)
    torch.testing.assert_close(first(images), second(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activations", ["tensor", "group"])
def test_saved_there_read_here(activations, digits, there, tmp_path):
    options = {"method": "quantlens-fast", "bits": "W4A4", "activation_granularity": activations}
    qmodel = ql.quantize(there, digits["calibration"], **options)
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    with torch.inference_mode():
        here, got = again(digits["images"]), qmodel(digits["images"].to(DEVICE)).cpu()
        moved = again.to(DEVICE)(digits["images"].to(DEVICE)).cpu()
    assert torch.equal(moved, got)
    assert bool(torch.isfinite(here).all())
    for name, tensor in qmodel.graph.tensors().items():
        assert torch.equal(again.graph.tensor(name).cpu(), tensor.cpu()), name


def test_exported_from_there(digits, there, tmp_path):
    pytest.importorskip("onnxruntime")
    qmodel = ql.quantize(there, digits["calibration"], method="quantlens-fast", bits="W8A8", target="onnxruntime-cpu")
    images = digits["images"][:64]
    got = ql.Artefact(ql.export(qmodel, tmp_path / "model.onnx")).outputs(images)[0]
    assert bool(torch.isfinite(torch.as_tensor(got)).all())
    assert tuple(got.shape) == (64, 8)


def test_evaluated_there(digits, there, sources, tmp_path):
    """All figures, all scores."""
    qmodel = ql.quantize(there, digits["calibration"], method="quantlens-fast", bits="W4A4")
    got = ql.evaluate(qmodel, **sources, cache_dir=tmp_path).to_dict()
    expected = ql.evaluate(qmodel.to("cpu"), **sources, reference=digits["model"], cache_dir=tmp_path).to_dict()
    qmodel.to(DEVICE)
    assert not got["scores_unavailable"]
    for name in ("top1", "nll", "ece"):
        assert got["id"][name] == pytest.approx(expected["id"][name], abs=1.0 if name != "nll" else 0.03), name
    for there_, here in zip(_aupr(got), _aupr(expected), strict=True):
        assert there_ == pytest.approx(here, abs=2.0)


def _aupr(found) -> list[float]:
    """Every AUPR-out of a result."""
    values: list[float] = []

    def walk(node) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "aupr_out" and isinstance(value, float):
                    values.append(value)
                else:
                    walk(value)

    walk(found["ood"])
    assert values
    return values


def test_a_study_there(tmp_path):
    from quantlens.studies.config import StudyConfig
    from quantlens.studies.runner import run_study
    from quantlens.studies.store import Store

    study = StudyConfig.model_validate({
        "name": "gpu", "models": ["digits-vit"], "methods": ["repq-vit"], "bits": ["FP32", "W4A4"], "seeds": [0],
        "id": "embedded:digits-test?n=100",
        "calibration": {"source": "embedded:digits-calibration", "n": 16}, "device": DEVICE, "inspect": True,
    })  # fmt: skip
    run_study(study, tmp_path / "out", progress=False)
    with Store(tmp_path / "out") as store:
        cells = [*store.cells(everything=True), *store.inspections(everything=True)]
    assert len(cells) == 3
    assert all(cell.done for cell in cells)


def test_commands_there(tmp_path):
    from quantlens.cli import main

    def run(*arguments: str) -> None:
        assert main.run([*arguments, "--device", DEVICE]) == 0

    out, found = tmp_path / "q.safetensors", tmp_path / "found.json"
    run("quantize", "digits-vit", "--bits", "W4A4", "--calibration", "embedded:digits-calibration", "--n", "16",
        "--out", str(out), "--quiet")  # fmt: skip
    run("inspect", "digits-vit", "--n", "8", "--bits", "W4A4", "--json", str(found))
    assert json.loads(found.read_text())["sites"]
    run("allocate", "digits-vit", "--target", "W6A6", "--calibration", "embedded:digits-calibration", "--n", "8",
        "--out", str(tmp_path / "a.json"))  # fmt: skip


def test_sensitivities_and_attention_there(digits, there):
    here = digits["model"]
    for sensitivity in ("nuclear-norm", "hessian", "kl"):
        got = ql.allocate(there, digits["calibration"][:8], "MP6", sensitivity=sensitivity)
        assert got.bits
    from quantlens.attention.drift import measure

    drift = []
    for model in (there, here):
        qmodel = ql.quantize(model, digits["calibration"], method="minmax", bits="W4A4")
        place = DEVICE if model is there else "cpu"
        drift.append(measure(model, {"q": qmodel}, [digits["images"][:16].to(place)])["q"].summary())
    for name in ("row_cosine", "rollout_spearman", "output_kl"):
        assert drift[0][name] == pytest.approx(drift[1][name], abs=0.05), name


def test_batches_are_the_same_on_every_device(device):
    from quantlens.data import load_images

    images = load_images("embedded:digits-test", ql.load_model("digits-vit").preprocess)
    for (here, labels), (there, same) in zip(images.batches(48), images.batches(48, device), strict=True):
        assert there.device.type == same.device.type == torch.device(device).type
        assert torch.equal(here, there.cpu())
        assert torch.equal(labels, same.cpu())
