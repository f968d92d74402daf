from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.calibration import Calibration, CalibrationPass
from quantlens.formats import Operator, Uniform
from quantlens.graph import graph_of
from quantlens.qmodel import QuantizedModel
from quantlens.reconstruction.bias import (
    correct_biases,
    corrected_layers,
    mean_output,
    output_means,
    subtract_from_biases,
)
from quantlens.transforms.layers import ensure_bias


def _quantized_means(qmodel: QuantizedModel, calibration: Calibration) -> dict[str, torch.Tensor]:
    """Mean outputs of all layers in the quantized network, by a pass of their own."""
    graph, quantizers, found = qmodel.graph, qmodel.plan.quantizers, {}

    def on_edge(edge, view):
        if edge.name == "output" and edge.site in sites:
            channels = 1 if graph.sites[edge.site].kind == "conv" else -1
            found[edge.site] = torch.cat([p.movedim(channels, -1).flatten(0, -2) for p in view.tensors()]).mean(0)
        return quantizers.get(edge.key)

    sites = {s.name for s in graph.sites.of_kind("linear", "conv")}
    edges = [e for k, e in graph.sites.edges.items() if k in quantizers or (e.name == "output" and e.site in sites)]
    CalibrationPass(graph, calibration, sequential=True).run(edges, on_edge)
    return found


# -- layer-local ---------------------------------------------------------------------------------------------------
def test_mean_output_of_convolutions_and_linear_layers(architecture, loaded, pictures):
    """In pieces and through the mean image, it is what the layer itself gives."""
    graph = graph_of(loaded[architecture])
    means = output_means(graph, Calibration.of(pictures, loaded[architecture].preprocess))
    biases = {s.name: graph.tensor(s.bias) if s.bias is not None else 0.0 for s in graph.sites}
    seen = {}

    def note(edge, view):
        site = graph.sites[edge.site]
        pieces = [half for piece in view.tensors() for half in piece.split(3)]
        seen[site.name] = mean_output(site, pieces, graph.tensor(site.weight)) + biases[site.name]

    edges = [s.edges["input"] for s in graph.sites.of_kind("linear", "conv")]
    CalibrationPass(graph, Calibration.of(pictures, loaded[architecture].preprocess), sequential=False).run(edges, note)
    assert seen.keys() == means.keys()
    for name, mean in means.items():
        torch.testing.assert_close(seen[name], mean, rtol=1e-4, atol=1e-5)


# -- network -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pieces", [32, 3])
def test_means_are_those_of_the_float_network(pieces, architecture, loaded, pictures, monkeypatch):
    from quantlens.calibration import images as chunks

    monkeypatch.setattr(chunks, "CHUNK", pieces)
    model = loaded[architecture]
    calibration = Calibration.of(pictures, model.preprocess)
    qmodel = ql.quantize(model, pictures, method="minmax", bits="W3A4")
    expected = output_means(qmodel.graph, calibration)
    before = _quantized_means(qmodel, calibration)
    shifts = correct_biases(qmodel.graph, qmodel.plan.quantizers, calibration)
    after = _quantized_means(qmodel, calibration)
    assert shifts.keys() == expected.keys()
    for name, mean in expected.items():
        size = float(mean.abs().max()) + 1
        torch.testing.assert_close(after[name].double(), mean, rtol=0, atol=2e-5 * size)
    assert max(float((before[n].double() - m).abs().max()) for n, m in expected.items()) > 0.01


def test_a_missing_bias_is_made_and_the_rest_stays(loaded, pictures):
    model = loaded["plain"]
    qmodel = ql.quantize(model, pictures, method="minmax", bits="W3A4")
    graph = qmodel.graph
    lacking = [s.name for s in graph.sites.of_kind("linear") if s.bias is None]
    assert lacking
    before = {n: t.clone() for n, t in graph.tensors().items()}
    shifts = correct_biases(graph, qmodel.plan.quantizers, Calibration.of(pictures, model.preprocess))
    assert all(graph.sites[name].bias is not None for name in lacking)
    biases = {graph.sites[name].bias: name for name in shifts}
    for name, value in graph.tensors().items():
        if name in biases:
            torch.testing.assert_close(value, before.get(name, 0.0) - shifts[biases[name]].float())
        else:
            assert torch.equal(value, before[name])
    assert bool(torch.isfinite(QuantizedModel(graph, qmodel.plan, preprocess=model.preprocess)(pictures)).all())


def test_layers_that_share_a_bias_are_left_alone(loaded, pictures):
    graph = graph_of(loaded["vit"]).clone()
    first, second = graph.sites["blocks.0.attn.proj"], graph.sites["blocks.1.attn.proj"]
    node = next(n for n in graph.fx.nodes if n.op == "get_attr" and n.target == first.bias)
    second.node.args = (*second.node.args[:2], node)
    graph.invalidate()
    names = {site.name for site in corrected_layers(graph)}
    assert names.isdisjoint({"blocks.0.attn.proj", "blocks.1.attn.proj"})
    assert "blocks.0.attn.qkv" in names


def test_operators_take_part(loaded, pictures):
    """An operator that shifts a LayerNorm's output shifts the layers behind it; the correction takes it back."""

    class Shifted(Operator):
        def forward(self, x, *rest):
            return torch.ops.aten.layer_norm.default(x, *rest) + 0.5

        @classmethod
        def restore(cls, config, tensors):
            raise NotImplementedError

    model = loaded["vit"]
    graph = graph_of(model).clone()
    calibration = Calibration.of(pictures, model.preprocess)
    weight = graph.tensor("blocks.1.mlp.fc1.weight")
    shifts = correct_biases(
        graph, {}, calibration, operators={"blocks.1.norm2": Shifted(Uniform(torch.ones(()), None, 8))}
    )
    torch.testing.assert_close(shifts["blocks.1.mlp.fc1"].float(), 0.5 * weight.sum(1), rtol=1e-4, atol=1e-5)
    assert float(shifts["blocks.0.mlp.fc2"].abs().max()) < 1e-5


def test_subtracting_twice_adds_up(loaded):
    graph = graph_of(loaded["plain"]).clone()
    name = next(s.name for s in graph.sites.of_kind("linear") if s.bias is None)
    shift = torch.linspace(-1, 1, graph.tensor(graph.sites[name].weight).shape[0])
    for _ in range(2):
        subtract_from_biases(graph, {name: shift})
    torch.testing.assert_close(graph.tensor(ensure_bias(graph, graph.sites[name])), -2 * shift)
