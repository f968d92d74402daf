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


def test_every_gelu_becomes_a_relu_and_the_rest_stays(digits):
    """Without steps the second layer alone is solved for; with some, both layers are trained, and each MLP is nearer to
    what it put out than before."""
    model, images = digits["model"], digits["calibration"][:8]
    start = graph_of(model).tensors()
    for steps, kinds in ((0, {"fc1", "fc2"}), (10, {"fc1", "fc2"})):
        graph, errors = _replaced(model, images, Fit(steps))
        assert all(after < before for before, after in errors.values()), errors
        assert not graph.sites.of_kind("gelu")
        assert any(str(n.target) == "aten.relu.default" for n in graph.fx.nodes)
        changed = {name for name, value in graph.tensors().items() if not torch.equal(value, start[name])}
        assert {name.split(".")[-2] for name in changed} <= kinds
        assert len(errors) == len(model.module.blocks)


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
    """The error that is reported, and fitted, is the weighted one: with all weight on the first token, its own."""
    model = small["vit"]
    first = torch.zeros(1, 17, 32)
    first[:, 0] = 17.0
    graph, errors = _replaced(model, pictures, Fit(20), {"blocks.1.mlp.fc2": first})
    mlp, seen = model.module.blocks[1].mlp, {}
    handle = mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0]))
    model.module(pictures)
    handle.remove()
    t = {n: graph.tensor(f"blocks.1.mlp.{n}") for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    x = seen["x"][:, 0]
    hidden = functional.linear(x, t["fc1.weight"], t["fc1.bias"]).relu()
    new = functional.linear(hidden, t["fc2.weight"], t["fc2.bias"])
    expected = mlp.fc2(functional.gelu(mlp.fc1(x)))
    old = mlp.fc2(mlp.fc1(x).relu())
    share = [float((y - expected).square().mean() / expected.square().mean()) for y in (old, new)]
    assert errors["blocks.1.mlp.fc2"] == pytest.approx(share, rel=1e-3)
    assert share[1] < share[0]
