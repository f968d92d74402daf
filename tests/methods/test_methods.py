from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantlens as ql
from plugin_state import forget
from quantlens.calibration import Calibration, CalibrationPass
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.formats import Uniform
from quantlens.methods import registry
from quantlens.methods.base import MATMUL_OPERANDS, Widths, matmul_operand_edges
from quantlens.methods.repq_vit import reparameterize
from quantlens.qmodel import Bits, float_model

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(registry.available())
QUICK = {name: {"iterations": 4} for name in ("qdrop", "fima-q", "i-and-s-vit", "quantlens-best")}
QUICK["aphq-vit"] = {"iterations": 4, "mlp_iterations": 10}
QUICK["aocq"] = {"scale_iterations": 4}
QUICK["vt-ptq"] = {"rounds": 2}
"""Fewer steps for methods that train or search: what is tested here does not need them."""
SLOW = ("adalog", *QUICK)
"""Methods that take seconds where others take tenths: tested on the hardest architecture, and at the least widths on a
small one; the outermost widths of the hardest are slow tests."""
ARCHITECTURES = ("vit", "deit-distilled", "deit3", "swin", "torchvision", "plain")
WIDTHS = ("W2A2", "W2A10", "W10A2", "W3A5", "W10A10", "W4A32", "W32A4")


def _holds_what_its_plan_says(model, qmodel, images) -> None:
    """Operands of products have quantizers (that everything has: test_fully_quantized), weights no more levels than
    their bits, and codes give the values back."""
    if registry.get(qmodel.method).info.quantizes == MATMUL_OPERANDS:
        missing = {e.key for e in matmul_operand_edges(qmodel.graph)} - qmodel.plan.quantizers.keys()
        assert {qmodel.graph.sites.edges[key].site for key in missing} <= {s.name for s in qmodel.graph.sites.head}
    for edge, quantizer in qmodel.weight_edges():
        weight = qmodel.graph.tensor(str(edge.value.target))
        codes = quantizer.encode(weight)
        assert torch.equal(quantizer.decode(codes), quantizer(weight)), edge.key
        assert all(len(row.unique()) <= 2**quantizer.bits for row in codes.flatten(1)[:4]), edge.key
    logits = qmodel(images)
    assert bool(torch.isfinite(logits).all())
    assert not torch.equal(logits, model(images))


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        pytest.param(m, a, marks=() if a == "swin" else pytest.mark.slow)
        for m in METHODS
        for a in ARCHITECTURES
        if a == "swin" or (m not in SLOW and a != "vit")
    ],
)
def test_every_method_holds_what_its_plan_says(method, architecture, loaded, pictures):
    model = loaded[architecture]
    qmodel = ql.quantize(model, pictures, method=method, bits="W4A4", **QUICK.get(method, {}))
    _holds_what_its_plan_says(model, qmodel, pictures)


def _default(method: str, bits: str, architecture: str) -> bool:
    """Whether the outermost widths of a method belong to the tests that always run."""
    return architecture == "vit" if method in SLOW else bits == "W2A2"


@pytest.mark.parametrize(
    ("method", "bits", "architecture"),
    [
        pytest.param(m, b, a, marks=() if _default(m, b, a) else pytest.mark.slow)
        for m in METHODS
        for b in WIDTHS
        for a in ("vit", "swin")
        if (a == "swin" and (m not in SLOW or b in ("W2A2", "W10A10"))) or (a == "vit" and m in SLOW and b == "W2A2")
    ],
)
def test_every_width_is_finite(method, bits, architecture, loaded, pictures):
    model = loaded[architecture]
    logits = ql.quantize(model, pictures, method=method, bits=bits, **QUICK.get(method, {}))(pictures)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in METHODS])
def test_same_seed_same_model(method, loaded, pictures):
    options = QUICK.get(method, {})
    a, b = (ql.quantize(loaded["vit"], pictures, method=method, bits="W4A4", seed=3, **options) for _ in range(2))
    assert torch.equal(a(pictures), b(pictures))
    _holds_what_its_plan_says(loaded["vit"], a, pictures)


def test_fp32_is_the_model_itself(loaded, pictures):
    model = loaded["vit"]
    same = ql.quantize(model, pictures, bits="FP32")
    assert same.plan.quantizers == {}
    torch.testing.assert_close(same(pictures), model(pictures), rtol=1e-5, atol=1e-5)
    assert same.size_ratio == pytest.approx(1.0)


def test_all_matmul_operands_are_quantized(architecture, loaded, pictures):
    qmodel = ql.quantize(loaded[architecture], pictures, method="repq-vit", bits="W4A4")
    keys = set(qmodel.plan.quantizers)
    for site in qmodel.graph.sites:
        if site.kind in ("linear", "conv"):
            assert {f"{site.name}.input", f"{site.name}.weight"} <= keys
        elif site.kind == "scores":
            assert {f"{site.name}.q", f"{site.name}.k"} <= keys
        elif site.kind == "context":
            assert f"{site.name}.v" in keys
        elif site.kind == "probs":
            assert qmodel.plan.quantizers[f"{site.name}.output"].kind == "log"
    conv = qmodel.graph.sites.of_kind("conv")[0].name
    assert qmodel.plan.quantizers[f"{conv}.input"].bits == 8
    assert qmodel.plan.quantizers[f"{conv}.weight"].bits == 4


def test_head_and_patch_widths_are_options(loaded, pictures):
    q = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W4A4", head_bits=8, patch_bits=32).plan.quantizers
    assert q["head.weight"].bits == q["head.input"].bits == 8
    assert "patch_embed.proj.input" not in q
    assert q["blocks.0.mlp.fc1.weight"].bits == 4


def test_weights_hold_no_more_levels_than_their_bits(loaded, pictures):
    qmodel = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W3A8")
    for edge, quantizer in qmodel.weight_edges():
        weight = quantizer(qmodel.graph.tensor(str(edge.value.target)))
        for row in weight.flatten(1)[:4]:
            assert len(row.unique()) <= 8


# -- the pass ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_many_chunks_and_files_give_what_one_chunk_gives(memory, loaded, pictures, monkeypatch):
    """Calibration in pieces, with every waiting activation in a file, equals calibration in one piece."""
    from quantlens.calibration import cache, images as chunks

    images = pictures.repeat(2, 1, 1, 1) * torch.linspace(0.5, 1.5, 16)[:, None, None, None]
    whole = ql.quantize(loaded["swin"], images, method="repq-vit", bits="W4A4")
    monkeypatch.setattr(chunks, "CHUNK", 5)
    monkeypatch.setattr(cache, "MEMORY", memory)
    pieces = ql.quantize(loaded["swin"], images, method="repq-vit", bits="W4A4")
    torch.testing.assert_close(pieces(images), whole(images), rtol=1e-3, atol=1e-3)


def test_sequential_shows_quantized_activations(loaded, pictures):
    """With 2-bit inputs forced on the first linear, a sequential pass sees another second block than a float pass."""
    graph = float_model(loaded["vit"]).graph
    edges = [graph.sites.edges[k] for k in ("blocks.0.attn.qkv.input", "blocks.1.attn.qkv.input")]
    lows = {}
    for sequential in (False, True):
        seen = []

        def on_edge(edge, view, seen=seen):
            seen.append(view())
            return torch.zeros_like

        CalibrationPass(graph, Calibration.of(pictures, loaded["vit"].preprocess), sequential=sequential).run(
            edges, on_edge
        )
        lows[sequential] = [o.low for o in seen]
    assert torch.equal(lows[True][0], lows[False][0])
    assert not torch.equal(lows[True][1], lows[False][1])


# -- RepQ-ViT ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_reparameterized_codes_are_the_channelwise_ones(bits):
    """Layer-wise quantization of LN/r − t is channel-wise quantization of LN, re-scaled: the codes differ by an
    offset."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(500, 24, generator=generator) * torch.rand(24, generator=generator).mul(5)
        + torch.randn(24, generator=generator) * 4
    )
    x[:, 5], x[:, 6] = 2.5, 0.0  # dead channels
    repar = reparameterize(x.amin(0), x.amax(0), bits)
    rewritten = (x.double() / repar.scale - repar.shift).float()
    back = (repar.layer(rewritten) + repar.shift) * repar.scale
    torch.testing.assert_close(back, repar.channel(x), rtol=1e-3, atol=2e-3)
    assert torch.equal(back[:, 5:7], x[:, 5:7])
    assert 0 <= int(repar.layer.zero_point) <= 2**bits - 1
    assert bool((repar.scale > 0).all())


def test_rewriting_does_not_change_the_float_model(architecture, loaded, pictures):
    qmodel = ql.quantize(loaded[architecture], pictures, method="repq-vit", bits="W4A4")
    torch.testing.assert_close(qmodel.graph(pictures), loaded[architecture](pictures), rtol=1e-3, atol=1e-3)
    assert any("reparameterized" in line for line in qmodel.plan.rewrites)


def test_reparameterization_evens_out_channels(small_models, pictures):
    """Channels of very different size behind every LayerNorm: one scale is bad for them, unless the rewrite makes them
    span the same range, which the layer behind undoes."""
    import copy

    network = copy.deepcopy(small_models["vit"])
    generator = torch.Generator().manual_seed(2)
    for block in network.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            factor = torch.exp(1.5 * torch.randn(32, generator=generator))
            norm.weight.data *= factor
            norm.bias.data *= factor
            linear.weight.data /= factor
    model = ql.load_model(network, input_size=(3, 32, 32))
    for how in ("tensor", "reparameterized"):
        graph = ql.quantize(model, pictures, method="repq-vit", bits="W8A4", layernorm=how).graph
        seen = {}
        graph.run(
            [node for node in graph.fx.nodes if node.op == "call_function"],
            {graph.input: pictures},
            hook=lambda key, value, seen=seen: seen.setdefault(key, value),
            keep=[graph.output],
        )
        for key in ("blocks.0.attn.qkv.input", "blocks.1.mlp.fc1.input"):
            values = seen[key].flatten(0, -2)
            spans = values.amax(0) - values.amin(0)
            spread = float(spans.max() / spans.median())
            assert spread < 2 if how == "reparameterized" else spread > 4, (how, key, spread)


def test_log_sqrt2_softmax_is_finer_than_log2(loaded, pictures):
    graph_probs = []
    for softmax in ("log-sqrt2", "log2"):
        q = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W8A8", softmax=softmax)
        graph_probs.append(q.plan.quantizers["blocks.0.attn.probs.output"])
    assert [p.steps for p in graph_probs] == [2, 1]
    assert isinstance(
        ql.quantize(loaded["vit"], pictures, method="repq-vit", softmax="uniform").plan.quantizers[
            "blocks.0.attn.probs.output"
        ],
        Uniform,
    )


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in METHODS])
def test_a_dead_layernorm_channel_survives(method, small_models, pictures):
    import copy

    network = copy.deepcopy(small_models["vit"])
    network.blocks[0].norm1.weight.data[[2, 9]] = 0.0
    network.blocks[0].norm1.bias.data[9] = 0.0
    network.blocks[1].mlp.fc1.weight.data[:, 4] = 0.0
    model = ql.load_model(network, input_size=(3, 32, 32))
    q = ql.quantize(model, pictures, method=method, bits="W8A8", **QUICK.get(method, {}))
    assert bool(torch.isfinite(q(pictures)).all())
    assert all(bool(torch.isfinite(t).all()) for t in q.graph.tensors().values() if t.is_floating_point())


# -- the registry and the options ------------------------------------------------------------------------------------
def test_names_and_aliases():
    assert type(registry.get("RepQ_ViT")) is type(registry.get("repq"))
    for info in registry.available().values():
        assert info.paper
        assert 2010 < info.year < 2030
        assert info.url.startswith("https://") or (info.venue == "quantlens" and Path(ROOT, info.url).is_file())
    with pytest.raises(UnknownNameError, match="repq-vit"):
        registry.get("repq-vitt")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3, 32, 32), "no calibration images"),
        ([], "no calibration images"),
        (torch.zeros(4, 3, 64, 64), r"\[N, 3, 32, 32\]"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "float"),
        (torch.full((4, 3, 32, 32), float("nan")), "NaN"),
    ],
)
def test_wrong_calibration_images_are_named(images, message, loaded):
    with pytest.raises(QuantlensError, match=message):
        ql.quantize(loaded["vit"], images, method="repq-vit")


def test_calibration_takes_batches_and_labels(loaded, pictures):
    whole = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W4A4")
    batches = ql.quantize(
        loaded["vit"], [(pictures[:3], torch.zeros(3)), (pictures[3:], torch.zeros(5))], method="repq-vit", bits="W4A4"
    )
    assert torch.equal(whole(pictures), batches(pictures))
    assert whole.calibration["n"] == batches.calibration["n"] == 8


def test_a_method_in_one_file(loaded, pictures):
    """What the README promises: a class with its paper and one verb is a method."""
    from quantlens.calibration import Observation
    from quantlens.calibration.ranges import minmax, symmetric
    from quantlens.graph import Graph
    from quantlens.methods import MATMUL_OPERANDS, Method, MethodInfo
    from quantlens.qmodel import Plan

    class WeightsOnly(Method):
        info = MethodInfo("test-weights-only", "t", "p", "v", 2026, "https://example.org", MATMUL_OPERANDS, "s")

        def build(self, graph: Graph, calibration: Calibration, bits: Widths, run) -> Plan:
            plan = Plan()
            for site in graph.sites.of_kind("linear"):
                seen = Observation.of(graph.tensor(site.weight))
                plan.quantizers[f"{site.name}.weight"] = symmetric(
                    *minmax(seen), bits.of(graph, site.edges["weight"]), granularity="channel", axis=0
                )
            return plan

    registry.register(WeightsOnly)
    try:
        qmodel = ql.quantize(loaded["vit"], pictures, method="test-weights-only", bits=Bits(8, 32))
        assert not torch.equal(qmodel(pictures), loaded["vit"](pictures))
        assert all(k.endswith(".weight") for k in qmodel.plan.quantizers)
    finally:
        forget()


def test_features_and_classifier_make_the_logits(architecture, loaded, pictures):
    qmodel = float_model(loaded[architecture])
    logits, features = qmodel.outputs(pictures)[:2]
    if architecture == "plain":
        assert features is not None
    weight, bias = qmodel.classifier()
    torch.testing.assert_close(features @ weight.T + bias, logits, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_images(loaded, pictures):
    """Every image has some; how near they are to the float model's: benchmarks/quality."""
    qmodel = ql.quantize(loaded["vit"], pictures, method="repq-vit", bits="W6A6")
    x = pictures.clone().requires_grad_(True)
    qmodel(x).square().sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert bool((x.grad.flatten(1).abs().amax(1) > 0).all())


def test_the_symmetric_percentile_is_the_coarser_one(loaded, pictures):
    """vt-ptq's paper compares with a percentile of its own format: one symmetric scale per tensor, whose range covers
    the asymmetric one."""
    asymmetric = ql.quantize(loaded["vit"], pictures, method="percentile", bits="W6A6").plan.quantizers
    symmetric = ql.quantize(loaded["vit"], pictures, method="percentile", bits="W6A6", format="symmetric")
    assert all(q.symmetric and q.axis is None for q in symmetric.plan.quantizers.values())
    compared = [k for k, q in asymmetric.items() if q.axis is None and q.signed == symmetric.plan.quantizers[k].signed]
    for key in compared:
        assert float(symmetric.plan.quantizers[key].scale) >= float(asymmetric[key].scale) * (1 - 1e-5), key
