"""qdrop, i-and-s-vit, fima-q, aphq-vit: what makes each of them (what it is worth: benchmarks/quality)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.formats import ShiftedLog
from quantlens.graph import graph_of
from quantlens.methods import registry
from quantlens.reconstruction import find_units, perturbation_metrics

DROPPING = ("qdrop", "fima-q", "aphq-vit")
METHODS = (*DROPPING, "i-and-s-vit")


@pytest.fixture(scope="module")
def vit(loaded):
    return loaded["vit"]


# -- reconstruction helps ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_block_is_kept_where_its_loss_fell(method, vit, pictures):
    """On the very images that it was trained on; the others keep their start."""
    q = ql.quantize(vit, pictures, method=method, bits="W3A4", iterations=16)
    reports = q.plan.info["reconstruction"]
    units = reports["quantized"] if isinstance(reports, dict) else reports
    assert any(u["accepted"] for u in units)
    for u in units:
        assert u["after"] < u["before"] if u["accepted"] else u["after"] == u["before"]
        assert u["after"] == min(u["before"], *u["rounds"])


# -- what each one is --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", DROPPING)
def test_starts_are_equal(method, vit, pictures):
    q = ql.quantize(vit, pictures, method=method, bits="W4A4", iterations=0)
    plan = q.plan.quantizers
    assert plan["blocks.0.attn.scores.q"].granularity == "head"
    assert len(plan["blocks.0.attn.scores.q"].scale) == 2
    assert any("reparameterized" in line for line in q.plan.rewrites)


def test_the_papers_qdrop(vit, pictures, monkeypatch):
    """One scale per tensor, no rewriting, a head of 8 bits; soft rounding at the paper's rate, and kept in any case."""
    from quantlens.methods import _reconstruction as module

    seen, real = [], module.reconstruct
    monkeypatch.setattr(module, "reconstruct", lambda *a, **k: (seen.append(a[3]), real(*a, **k))[1])
    q = ql.quantize(vit, pictures, method="qdrop", bits="W4A4", variant="paper", iterations=2)
    plan = q.plan.quantizers
    assert all(x.axis is None for k, x in plan.items() if not k.endswith(".weight"))
    assert not any("reparameterized" in line for line in q.plan.rewrites)
    assert plan["head.weight"].bits == plan["head.input"].bits == 8
    (settings,) = seen
    assert (settings.iterations, settings.batch_size, settings.lr_rounding) == (2, 32, 0.001)
    assert not settings.straight_through
    assert not settings.guarded
    assert all(u["accepted"] for u in q.plan.info["reconstruction"] if u["trained"])
    assert registry.get("qdrop").options({"variant": "paper"})["iterations"] == 20_000


@pytest.mark.parametrize("method", ["qdrop", "fima-q"])
def test_the_float_model_stays_the_function_it_was(method, vit, pictures):
    q = ql.quantize(vit, pictures, method=method, bits="W4A4", iterations=0)
    torch.testing.assert_close(q.graph(pictures), vit(pictures), rtol=1e-3, atol=1e-3)


def test_softmax_of_i_and_s_vit(vit, pictures):
    plan = ql.quantize(vit, pictures, method="i&s-vit", bits="W4A4", iterations=0).plan.quantizers
    assert isinstance(plan["blocks.0.attn.probs.output"], ShiftedLog)
    assert plan["blocks.0.attn.scores.q"].granularity == "tensor"


def test_the_three_stages(vit, pictures):
    """Stage 1 trains float weights on channel-wise activations; what ships is layer-wise, on the grid of the weights,
    and aims at the model as it was given."""
    q = ql.quantize(vit, pictures, method="i-and-s-vit", bits="W4A4", iterations=16)
    reports = q.plan.info["reconstruction"]
    assert set(reports) == {"smooth", "quantized"}
    assert any(u["accepted"] for u in reports["smooth"])
    assert q.plan.quantizers["blocks.0.attn.qkv.input"].axis is None
    for edge, quantizer in q.weight_edges():
        weight = q.graph.tensor(str(edge.value.target))
        report = next(u for u in reports["quantized"] if edge.key.startswith(u["unit"]) or "…" in u["unit"])
        assert not report["accepted"] or torch.equal(quantizer(weight), weight) or "…" in report["unit"]


def test_stage_one_leaves_no_codes(vit, pictures, monkeypatch):
    """In stage 1 weights are float: no weight has a quantizer, and they change."""
    from quantlens.methods import _reconstruction as module

    seen = []

    def spy(graph, plan, calibration, settings, **more):
        seen.append(
            (settings, dict(plan.quantizers), graph.tensor("blocks.0.mlp.fc1.weight").clone(), more["reference"])
        )
        return module_reconstruct(graph, plan, calibration, settings, **more)

    module_reconstruct = module.reconstruct
    monkeypatch.setattr(module, "reconstruct", spy)
    ql.quantize(vit, pictures, method="i-and-s-vit", bits="W4A4", iterations=16)
    (first, start, before, reference), (second, end, after, same) = seen
    assert not any(k.endswith(".weight") for k in start)
    assert start["blocks.0.attn.qkv.input"].axis == -1
    assert end["blocks.0.attn.qkv.input"].axis is None
    assert any(k.endswith(".weight") for k in end)
    assert (first.inputs, second.inputs) == ("float", "quantized")
    assert not torch.allclose(before, after)
    assert reference is same
    torch.testing.assert_close(reference(pictures), vit(pictures))


def test_relu_takes_the_place_of_gelu(vit, pictures):
    q = ql.quantize(vit, pictures, method="aphq-vit", bits="W4A4", iterations=2, mlp_iterations=40)
    assert not q.graph.sites.of_kind("gelu")
    assert all(after < before for before, after in q.plan.info["mlp"].values())
    assert any("ReLU" in line for line in q.plan.rewrites)
    quantizer = q.plan.quantizers["blocks.0.mlp.fc2.input"]
    assert int(quantizer.zero_point) == 0, "one sign"


def test_blocks_of_aphq_aim_at_the_model_with_gelu(vit, pictures, monkeypatch):
    from quantlens.methods import _reconstruction as module

    seen = {}
    real = module.reconstruct
    monkeypatch.setattr(module, "reconstruct", lambda *a, **k: (seen.update(k), real(*a, **k))[1])
    ql.quantize(vit, pictures, method="aphq-vit", bits="W4A4", iterations=1, mlp_iterations=3)
    torch.testing.assert_close(seen["reference"](pictures), vit(pictures))


def test_block_weights_are_those_of_the_block(vit, pictures):
    from quantlens.methods.aphq_vit import block_weights
    from quantlens.reconstruction import perturbation_metrics

    graph = graph_of(vit)
    metrics = perturbation_metrics(graph, Calibration.of(pictures, vit.preprocess))
    weights = block_weights(graph, metrics)
    assert set(weights) == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    found = weights["blocks.1.mlp.fc2"]
    assert float(found.mean()) == pytest.approx(1.0, rel=1e-4)
    assert float(found[:, 1:].max()) < 1e-3 * float(found[:, 0].mean()), "the class token alone is read behind block 1"


# -- names, options, kills -------------------------------------------------------------------------------------------
def test_names():
    for alias, name in (
        ("i&s-vit", "i-and-s-vit"),
        ("IAS_ViT", "i-and-s-vit"),
        ("fimaq", "fima-q"),
        ("aphq", "aphq-vit"),
    ):
        assert registry.get(alias).info.name == name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on(method, vit, pictures, tmp_path):
    short = {"iterations": 8} | ({"mlp_iterations": 4} if method == "aphq-vit" else {})

    def run(**more):
        return ql.quantize(vit, pictures, method=method, bits="W4A4", **short, **more)

    whole = run()

    def kill(done, total):
        if done > 0.85 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=str(tmp_path), progress=kill)
    assert list(tmp_path.rglob("*.safetensors"))
    assert torch.equal(run(checkpoint=str(tmp_path))(pictures), whole(pictures))


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_read_back(method, vit, pictures, tmp_path):
    q = ql.quantize(vit, pictures, method=method, bits="W3A4", iterations=2)
    again = ql.load(q.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), q(pictures))


@pytest.mark.parametrize(
    ("task", "logits", "outputs"),
    [("binary", 1, "sigmoid"), pytest.param("features", 10, "values", marks=pytest.mark.slow)],
)
def test_blocks_are_trained_towards_what_the_model_gives(task, logits, outputs, vit, pictures):
    """A softmax of one logit has neither a gradient nor a loss, one of features is taken by nobody."""
    module = nn.Sequential(vit.module, nn.Linear(10, logits))
    model = ql.load_model(module, input_size=(3, 32, 32), task=task)
    images = Calibration.of(pictures, model.preprocess)
    graph = graph_of(model)
    measured = {unit.name for unit in find_units(graph)[:-1]}
    assert measured <= set(perturbation_metrics(graph, images, outputs=outputs))
    assert not perturbation_metrics(graph, images) or logits > 1
    for method in ("fima-q", "aphq-vit", "quantlens-best"):
        q = ql.quantize(model, pictures, method=method, bits="W3A3", iterations=2)
        told = q.plan.info["reconstruction"]
        last = (told["quantized"] if isinstance(told, dict) else told)[-1]
        assert last["before"] > 0, method
