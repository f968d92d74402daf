"""Metrics of the damage that an error at a block's output does: against explicit matrices and exact derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jvp

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.graph import graph_of
from quantlens.qmodel import Plan
from quantlens.reconstruction import (
    Context,
    Metric,
    MetricLoss,
    Settings,
    find_units,
    fisher_metrics,
    mse,
    perturbation_metrics,
    reconstruct,
)
from quantlens.reconstruction.block_metrics import _Probe, low_rank
from quantlens.reconstruction.units import frozen_hook, run_unit


def _context(unit="u", logits=False):
    return Context(unit, logits, torch.arange(2), 1.0)


# -- the forms -----------------------------------------------------------------------------------------------------
def test_a_metric_is_its_matrix():
    generator = torch.Generator().manual_seed(0)
    diagonal, factors = torch.rand(1, 3, 4, generator=generator), torch.randn(2, 12, generator=generator)
    difference = torch.randn(5, 3, 4, generator=generator)
    matrix = torch.diag(diagonal.flatten()) + factors.T @ factors
    rows = difference.abs().flatten(1)
    expected = sum(float(r @ matrix @ r) for r in rows) / 5
    assert float(Metric(diagonal, factors)(difference)) == pytest.approx(expected, rel=1e-5)
    plain = sum(float(r @ torch.diag(diagonal.flatten()) @ r) for r in difference.flatten(1)) / 5
    assert float(Metric(diagonal)(difference)) == pytest.approx(plain, rel=1e-5)


def test_the_loss_knows_its_units_and_the_logits():
    generator = torch.Generator().manual_seed(1)
    got, expected = torch.randn(2, 6, generator=generator), torch.randn(2, 6, generator=generator)
    metric = Metric(torch.rand(1, 6, generator=generator))
    loss = MetricLoss({"u": metric})
    assert torch.equal(loss(got, expected, _context()), metric(got - expected))
    assert torch.equal(loss(got, expected, _context("other")), mse(got, expected, _context()))
    p, q = expected.softmax(-1), got.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(loss(got, expected, _context("u", logits=True)), by_hand)


@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_low_rank_is_the_explicit_matrix(damping):
    """Gᵀ(D·Dᵀ + λI)⁻¹G up to one factor, which makes its mean on D's rows 1."""
    generator = torch.Generator().manual_seed(2)
    g, d = (torch.rand(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    metric = low_rank(g, d, damping)
    rows, errors = g.flatten(1), d.flatten(1)
    inner = errors @ errors.T
    inner = inner + damping * inner.diagonal().mean() * torch.eye(3)
    matrix = rows.T @ inner.inverse() @ rows
    matrix = matrix / torch.stack([e @ matrix @ e for e in errors]).mean()
    torch.testing.assert_close((metric.factors.T @ metric.factors).double(), matrix, rtol=1e-4, atol=1e-6)
    diagonal = rows.mean(0)
    diagonal = diagonal / torch.stack([(e**2 * diagonal).sum() for e in errors]).mean()
    torch.testing.assert_close(metric.diagonal.double().flatten(), diagonal, rtol=1e-4, atol=1e-6)
    assert float(metric(d.float())) == pytest.approx(2.0, rel=1e-4), "both parts weigh the same at the start"


def test_equal_rows_do_no_harm():
    row = torch.rand(1, 8, generator=torch.Generator().manual_seed(3))
    one, many = low_rank(row, row), low_rank(row.expand(5, 8), row.expand(5, 8))
    assert bool(torch.isfinite(many.factors).all())
    x = torch.rand(4, 8)
    assert float(many(x)) == pytest.approx(float(one(x)), rel=1e-3)
    assert low_rank(row * 0, row) is None
    assert low_rank(row, row * 0) is None


# -- gradients through the rest of the network -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def probe(small):
    return _Probe(graph_of(small["vit"]), 20.0)


def _damage(probe, batch, index):
    """KL at temperature 20 as a function of measured unit number ``index``'s output."""
    later = probe.units[probe.units.index(probe.measured[index]) + 1 :]

    def damage(value):
        values = {**batch, probe.measured[index].results[0]: value}
        for unit in later:
            sources = {n: values[n] for n in unit.sources}
            values.update(zip(unit.results, run_unit(probe.graph, unit, sources, len(value)), strict=True))
        p, q = ((v / 20).softmax(-1) for v in (batch[probe.graph.output], values[probe.graph.output]))
        return (p * (p / q).log()).sum()

    return damage


def test_gradients_are_those_of_the_divergence(probe, small, pictures):
    batch = next(probe.batches(Calibration.of(pictures, small["vit"].preprocess)))
    for index, unit in enumerate(probe.measured):
        value = batch[unit.results[0]]
        changed = value + 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
        expected = grad(_damage(probe, batch, index))(changed)
        torch.testing.assert_close(probe.gradient(batch, index, changed), expected, rtol=1e-3, atol=1e-7)


def test_the_difference_of_gradients_is_the_hessian(small, pictures):
    """By finite differences in float32 as by exact forward-over-reverse differentiation: |F·v| of random signs v."""
    model, one = small["vit"], pictures[:1]
    graph, calibration = graph_of(model), Calibration.of(one, model.preprocess)
    found = perturbation_metrics(graph, calibration, seed=5)
    probe, generator = _Probe(graph, 20.0), torch.Generator().manual_seed(5)
    batch = next(probe.batches(calibration))
    for index, unit in enumerate(probe.measured):
        value = batch[unit.results[0]]
        signs = (torch.rand(value.shape, generator=generator) < 0.5).float() * 2 - 1
        exact = jvp(grad(_damage(probe, batch, index)), (value,), (signs,))[1].abs()
        got = found[unit.name].diagonal * exact.sum()
        assert float((got - exact).norm() / exact.norm()) < 0.15
        assert float(found[unit.name].diagonal.sum()) == pytest.approx(1.0, rel=1e-4)


def test_one_number_for_all_channels_changes_nothing(probe, small, pictures):
    """Why the perturbation has random signs: LayerNorm takes a constant away, and its direction has no curvature."""
    batch = next(probe.batches(Calibration.of(pictures[:1], small["vit"].preprocess)))
    index = next(i for i, u in enumerate(probe.measured) if u.name == "blocks.0")
    value = batch[probe.measured[index].results[0]]
    generator = torch.Generator().manual_seed(0)
    signs = (torch.rand(value.shape, generator=generator) < 0.5).float() * 2 - 1
    derivative = grad(_damage(probe, batch, index))
    same, random = (jvp(derivative, (value,), (v,))[1].norm() for v in (torch.ones_like(value), signs))
    assert float(same) < 1e-3 * float(random)


def test_the_matrix_is_the_fisher_matrix_where_errors_are_small():
    """At the float model the Hessian of the divergence at the logits is (diag(p) − p·pᵀ)/T²."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = (logits / 20).softmax(-1)
    matrix = hessian(lambda z: (p * (p.log() - (z / 20).log_softmax(-1))).sum())(logits)
    torch.testing.assert_close(matrix, (torch.diag(p) - torch.outer(p, p)) / 400, rtol=1e-6, atol=1e-9)


def test_fisher_metrics_use_every_unit_quantized_alone(small, pictures):
    model = small["vit"]
    q = ql.quantize(model, pictures, method="minmax", bits="W3A4")
    found = fisher_metrics(q.graph, q.plan.quantizers, Calibration.of(pictures, model.preprocess), rank=2)
    probe = _Probe(q.graph, 20.0)
    assert set(found) == {u.name for u in probe.measured}
    rows = []
    for half in (pictures[:4], pictures[4:]):
        batch = next(probe.batches(Calibration.of(half, model.preprocess)))
        unit = probe.measured[1]
        sources = {n: batch[n] for n in unit.sources}
        changed = run_unit(q.graph, unit, sources, 4, frozen_hook(q.graph, unit, q.plan.quantizers))[0]
        gradient = grad(_damage(probe, batch, 1))(changed)
        rows.append((gradient.abs().mean(0), (changed - batch[unit.results[0]]).abs().mean(0)))
    by_hand = low_rank(*(torch.stack(r) for r in zip(*rows, strict=True)))
    got = found[probe.measured[1].name]
    torch.testing.assert_close(got.diagonal, by_hand.diagonal, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got.factors.T @ got.factors, by_hand.factors.T @ by_hand.factors, rtol=1e-2, atol=1e-5)


def test_every_architecture_has_metrics(small, architecture, pictures):
    model = small[architecture]
    q = ql.quantize(model, pictures, method="minmax", bits="W4A4")
    calibration = Calibration.of(pictures, model.preprocess)
    for found in (
        fisher_metrics(q.graph, q.plan.quantizers, calibration),
        perturbation_metrics(graph_of(model), calibration),
    ):
        assert {b.name for b in q.graph.sites.blocks} <= set(found)
        for metric in found.values():
            assert bool(torch.isfinite(metric.diagonal).all())
            assert bool((metric.diagonal >= 0).all())


# -- in reconstruction -----------------------------------------------------------------------------------------------
def test_a_metric_counts_for_the_checkpoint(small, pictures, tmp_path):
    model = small["vit"]
    q = ql.quantize(model, pictures, method="minmax", bits="W3A8")
    calibration = Calibration.of(pictures, model.preprocess)

    def run(weight):
        metrics = {u.name: Metric(torch.tensor(weight)) for u in find_units(q.graph)}
        settings = Settings(("rounding",), MetricLoss(metrics), iterations=2, straight_through=True)
        plan = Plan(dict(q.plan.quantizers))
        return reconstruct(q.graph.clone(), plan, calibration, settings, checkpoint=tmp_path).resumed

    assert run(1.0) == 0
    assert run(1.0) > 0
    assert run(2.0) == 0
