"""GELU to ReLU: the refitted MLP puts out what it did, clipped too; nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from quantlens.calibration import Calibration
from quantlens.graph import graph_of
from quantlens.reconstruction.mlp import Fit, find_mlps, replace_gelu


def _replaced(model, images, fit, weights=None):
    graph = graph_of(model).clone()
    with torch.no_grad():
        errors = replace_gelu(graph, Calibration.of(images, model.preprocess), fit, weights or {})
    return graph, errors


def test_all_mlps_are_found(small, architecture):
    graph = graph_of(small[architecture])
    mlps = find_mlps(graph)
    assert len(mlps) == len(graph.sites.of_kind("gelu")) >= 2
    for mlp in mlps:
        assert mlp.second.node.args[0] is mlp.gelu.node
        assert mlp.gelu.node.args[0] is mlp.first.node


def test_the_model_comes_back_nearly(digits):
    """Divergence from the model with GELU, on images not seen: ReLU in its place, refitted, and trained too."""
    model, images = digits["model"], digits["images"]
    expected = model(images).log_softmax(-1)

    def distance(graph) -> float:
        return float((expected.exp() * (expected - graph(images).log_softmax(-1))).sum(-1).mean())

    bare = graph_of(model).clone()
    for gelu in bare.sites.of_kind("gelu"):
        gelu.node.target, gelu.node.kwargs = torch.ops.aten.relu.default, {}
    bare.invalidate()
    solved, _ = _replaced(model, digits["calibration"], Fit(0))
    trained, errors = _replaced(model, digits["calibration"], Fit(60))
    assert distance(solved) < 0.7 * distance(bare)
    assert distance(trained) < distance(solved)
    assert all(after < 0.6 * before for before, after in errors.values()), errors
    assert not trained.sites.of_kind("gelu")
    assert any(str(n.target) == "aten.relu.default" for n in trained.fx.nodes)


def test_errors_are_those_of_the_layers(small, pictures):
    model = small["vit"]
    graph, errors = _replaced(model, pictures, Fit(5))
    block, x = model.module.blocks[0].mlp, torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    seen = {}
    model.module.blocks[0].mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model.module(pictures)
    x = seen["x"]
    expected = block.fc2(functional.gelu(block.fc1(x)))
    old = block.fc2(block.fc1(x).relu())
    t = {n: graph.tensor(f"blocks.0.mlp.{n}") for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    hidden = functional.linear(x, t["fc1.weight"], t["fc1.bias"]).relu()
    new = functional.linear(hidden, t["fc2.weight"], t["fc2.bias"])
    size = expected.square().mean()
    got = errors["blocks.0.mlp.fc2"]
    assert got[0] == pytest.approx(float((old - expected).square().mean() / size), rel=1e-3)
    assert got[1] == pytest.approx(float((new - expected).square().mean() / size), rel=1e-3)
    assert got[1] < got[0]


def test_weights_say_what_counts(small, pictures):
    """With all weight on the first token, its error falls further than without."""
    model = small["vit"]
    first = torch.zeros(1, 17, 32)
    first[:, 0] = 17.0
    found = {}
    for name, weights in (("even", None), ("first", {"blocks.1.mlp.fc2": first})):
        graph, _ = _replaced(model, pictures, Fit(200), weights)
        mlp = model.module.blocks[1].mlp
        seen = {}
        handle = mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0]))
        model.module(pictures)
        handle.remove()
        t = {n: graph.tensor(f"blocks.1.mlp.{n}") for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
        x = seen["x"][:, 0]
        hidden = functional.linear(x, t["fc1.weight"], t["fc1.bias"]).relu()
        new = functional.linear(hidden, t["fc2.weight"], t["fc2.bias"])
        found[name] = float((new - mlp.fc2(functional.gelu(mlp.fc1(x)))).square().mean())
    assert found["first"] < found["even"]
