"""Adam with a learning rate per group, and what is trained of a unit."""

from __future__ import annotations

import math

import pytest
import torch

import quantlens as ql
from quantlens.formats import Uniform
from quantlens.reconstruction import AdaRound, Group, LearnedScale, Settings, find_units, train
from quantlens.reconstruction.trainer import Latent, Learners


def test_rates_fall_along_a_cosine_or_stay():
    """Adam's first steps are as long as its rate where the gradient does not change."""
    falling, staying = (torch.zeros((), requires_grad=True) for _ in range(2))
    seen, told = [], []

    def loss(share):
        seen.append((share, float(falling.detach()), float(staying.detach())))
        return falling + staying

    train([Group([falling], 0.5), Group([staying], 0.25, falling=False)], 4, loss, told.append)
    assert [share for share, *_ in seen] == [0, 0.25, 0.5, 0.75]
    assert told == [1, 2, 3, 4]
    rates = [0.5 * 0.5 * (1 + math.cos(math.pi * share)) for share, *_ in seen]
    assert float(falling.detach()) == pytest.approx(-sum(rates), rel=1e-4)
    assert float(staying.detach()) == pytest.approx(-1, rel=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_trains_too(mode):
    parameter, target = torch.zeros(3, requires_grad=True), torch.ones(3)
    with mode():
        train([Group([parameter], 0.1)], 5, lambda _: (parameter - target).square().sum())
        assert not torch.is_grad_enabled()
    assert bool((parameter > 0.1).all())


def test_no_steps_leave_everything():
    parameter = torch.zeros(3, requires_grad=True)
    train([Group([parameter], 0.1)], 0, lambda _: parameter.sum())
    assert not bool(parameter.any())


@pytest.fixture
def block(small, pictures):
    q = ql.quantize(small["vit"], pictures, method="minmax", bits="W4A8")
    return q.graph, q.plan.quantizers, next(u for u in find_units(q.graph) if u.name == "blocks.0")


def _kinds(found) -> dict[str, int]:
    kinds = [type(m).__name__ for m in found.modules()]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_learners_are_what_the_settings_name(block):
    graph, quantizers, unit = block
    weights = [e.key for e in unit.edges if e.is_weight]
    inputs = [e.key for e in unit.edges if not e.is_weight and e.key in quantizers]
    found = Learners.of(graph, quantizers, unit, Settings(("rounding", "scales")))
    assert {k for k, m in found.by_edge.items() if isinstance(m, AdaRound)} == set(weights)
    assert {k for k, m in found.by_edge.items() if isinstance(m, LearnedScale)} == set(inputs)
    assert not found.vectors
    assert _kinds(Learners.of(graph, quantizers, unit, Settings(("weights",)))) == {"Latent": len(weights)}
    vectors = Learners.of(graph, quantizers, unit, Settings(("vectors",))).vectors
    assert {str(node.target).split(".", 2)[2] for node in vectors} >= {"norm1.weight", "norm1.bias", "mlp.fc2.bias"}


def test_float_weights_are_trained_where_asked(block):
    graph, quantizers, unit = block
    inputs = {k: q for k, q in quantizers.items() if not k.endswith(".weight")}
    assert not Learners.of(graph, inputs, unit, Settings(("weights",))).by_edge
    found = Learners.of(graph, inputs, unit, Settings(("weights",), float_weights=True)).by_edge
    assert all(isinstance(m, Latent) and m.quantizer is None for m in found.values())
    assert found.keys() == {e.key for e in unit.edges if e.is_weight}


def test_a_scale_that_another_unit_shares_stays(block):
    graph, _, unit = block
    shared = Uniform(torch.tensor(0.5), torch.tensor(8), 4, signed=False)
    inside = {"blocks.0.attn.qkv.input": shared, "blocks.0.mlp.fc1.input": shared}
    found = Learners.of(graph, inside, unit, Settings(("scales",)))
    assert len(found.by_edge) == 2
    assert len(found.modules()) == 1
    across = {**inside, "blocks.1.mlp.fc1.input": shared}
    assert not Learners.of(graph, across, unit, Settings(("scales",))).by_edge


def test_state_and_restore(block):
    graph, quantizers, unit = block
    found = Learners.of(graph, quantizers, unit, Settings(("rounding", "scales")))
    state, start = found.state(), found.freeze(graph.sites.edges)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(1.0)
    changed = found.freeze(graph.sites.edges)
    assert any(not torch.equal(changed[0][name], value) for name, value in start[0].items())
    found.restore(state)
    again = found.freeze(graph.sites.edges)
    assert all(torch.equal(again[0][name], value) for name, value in start[0].items())
    assert all(torch.equal(again[1][key].scale, q.scale) for key, q in start[1].items())
