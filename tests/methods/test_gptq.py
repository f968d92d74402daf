from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.formats import Uniform
from quantlens.graph import graph_of
from quantlens.methods import registry
from quantlens.methods.base import Run, Widths
from quantlens.methods.composition import Fitted, fit_layers
from quantlens.qmodel import Bits, Plan


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


def _inputs(qmodel, images, site):
    """Float inputs [m, in] of a layer."""
    seen = []
    graph = qmodel.graph

    def hook(key, value):
        if key == f"{site}.input":
            seen.append(value.flatten(0, -2))
        return value

    calls = [n for n in graph.fx.nodes if n.op == "call_function"]
    graph.run(calls, {graph.input: images}, hook=hook, keep=[graph.output])
    return torch.cat(seen)


@pytest.mark.parametrize("site", ["blocks.0.attn.proj", "blocks.1.mlp.fc2"])
def test_it_beats_rounding_to_nearest_in_the_layers_output(site, model, pictures):
    """On the inputs that it was fitted on, the same float inputs for both, at the same ranges."""
    float_weight = graph_of(model).tensor(f"{site}.weight")
    inputs = _inputs(ql.quantize(model, pictures, bits="FP32"), pictures, site)
    nearest = ql.quantize(model, pictures, method="repq-vit", bits="W3A32")
    fitted = ql.quantize(model, pictures, method="gptq", bits="W3A32")
    key = f"{site}.weight"
    errors = [
        float((inputs @ (q.plan.quantizers[key](q.graph.tensor(key)) - float_weight).T).square().sum())
        for q in (nearest, fitted)
    ]
    assert torch.equal(nearest.plan.quantizers[key].scale, fitted.plan.quantizers[key].scale)
    assert errors[1] < errors[0]


def test_its_weights_are_on_the_grid(model, pictures):
    qmodel = ql.quantize(model, pictures, method="gptq", bits="W4A8")
    for edge, quantizer in qmodel.weight_edges():
        weight = qmodel.graph.tensor(str(edge.value.target))
        assert isinstance(quantizer, Uniform)
        torch.testing.assert_close(quantizer(weight), weight, rtol=1e-6, atol=1e-7)


def test_only_the_weights_differ_from_repq_where_inputs_do_not(model, pictures):
    """Activations keep repq-vit's quantizers."""
    a, b = (ql.quantize(model, pictures, method=name, bits="W4A4") for name in ("repq-vit", "gptq"))
    for key, quantizer in a.plan.quantizers.items():
        twin = b.plan.quantizers[key]
        if not key.endswith(".weight"):
            assert all(torch.equal(quantizer.tensors()[n], t) for n, t in twin.tensors().items())
    assert a.plan.rewrites == b.plan.rewrites[:-1]


@pytest.mark.parametrize(
    "options",
    [{"act_order": True}, {"variant": "paper"}, {"damping": 1.0}],
)
def test_options_change_the_weights(options, model, pictures):
    a = ql.quantize(model, pictures, method="gptq", bits="W3A8")
    b = ql.quantize(model, pictures, method="gptq", bits="W3A8", **options)
    assert not torch.equal(a(pictures), b(pictures))
    assert bool(torch.isfinite(b(pictures)).all())


def test_a_layer_sees_quantized_inputs_of_a_quantized_network(model, pictures):
    """network: x is what the layer before makes; else the float network's through the layer's own quantizer."""
    calibration = Calibration.of(pictures, model.preprocess)
    means = {}
    plan = ql.quantize(model, pictures, method="minmax", bits="W2A2").plan
    some = {"default": "W32A32", "blocks.0.mlp.fc1": "W2A2", "blocks.1.mlp.fc1": "W2A2"}
    bits = Widths(Bits.parse(some), {"head_bits": None, "patch_bits": 32, "target": None})
    for network in (False, True):
        graph = graph_of(model).clone()
        seen = []

        def fit(layer, seen=seen, network=network):
            seen.append(layer.moments(network=network))
            return Fitted(plan.quantizers[f"{layer.site.name}.weight"], layer.weight)

        own = Plan({k: q for k, q in plan.quantizers.items() if ".fc1." in k})
        count = fit_layers(graph, calibration, bits, own, fit, Run({}, 0), sequential=network)
        assert count == len(seen) == 2
        means[network] = seen
    first, second = means[False]
    assert not torch.allclose(first.mean, first.float_mean, atol=1e-3), "x̄ is quantized, x is not"
    torch.testing.assert_close(means[True][0].mean, first.mean)
    torch.testing.assert_close(means[True][0].mean, means[True][0].float_mean)
    assert not torch.allclose(means[True][1].mean, second.mean, atol=1e-4), "the second block reads what the first made"


def test_it_is_found():
    assert registry.get("GPTQ").info.venue == "ICLR"
