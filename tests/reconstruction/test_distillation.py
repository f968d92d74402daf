"""Distillation of the whole network: what it trains and what it leaves; the same after a kill. (What it is worth:
benchmarks/quality.)"""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError
from quantlens.methods.base import Run, Widths
from quantlens.methods.quantlens_fast import QuantlensFast, calibrate, rewrite
from quantlens.qmodel import Bits, Plan, QuantizedModel
from quantlens.reconstruction import Distillation, distil, distillation
from quantlens.reconstruction.distillation import near_code
from quantlens.reconstruction.latent import trained_vectors


def _start(model, images, bits="W3A4", method="minmax"):
    q = ql.quantize(model, images, method=method, bits=bits)
    return q.graph, q.plan, Calibration.of(images, model.preprocess), ql.quantize(model, images, bits="W32A32").graph


def _run(start, settings, **more):
    graph, plan, calibration, reference = start
    graph, plan = graph.clone(), Plan(dict(plan.quantizers))
    report = distil(graph, plan, calibration, settings, reference=reference, **more)
    return graph, plan, report


def _logits(model, graph, plan, images):
    with torch.inference_mode():
        return QuantizedModel(graph, plan, preprocess=model.preprocess)(images)


def _divergence(got, expected):
    got, expected = got.double().log_softmax(-1), expected.double().log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def test_every_architecture_stays_on_its_grid(small, architecture, pictures):
    model = small[architecture]
    start = _start(model, pictures)
    graph, plan, report = _run(start, Distillation(6, 8, lr_weights=0.01, lr_scales=0.005, plain=1.0, strange=0.0))
    assert report.accepted is (report.after < report.before)
    assert bool(torch.isfinite(_logits(model, graph, plan, pictures)).all())
    for edge, quantizer in ((e, plan.quantizers[e.key]) for e in graph.sites.edges.values() if e.is_weight):
        weight = graph.tensor(str(edge.value.target))
        changed = not torch.equal(weight, start[0].tensor(str(edge.value.target)))
        assert not changed or torch.equal(quantizer(weight), weight), "a changed weight must lie on its grid"


def test_it_trains_the_model_that_is_shipped(digits):
    """The loss in training is that of the quantized model, not of something near to it."""
    model = digits["model"]
    graph, plan, calibration, reference = _start(model, digits["calibration"], "W4A4", "repq-vit")
    _, _, report = _run(
        (graph, plan, calibration, reference), Distillation(iterations=0, features=0.0, plain=1.0, strange=0.0)
    )
    with torch.inference_mode():
        expected = model(digits["calibration"])
    assert report.before == pytest.approx(
        _divergence(_logits(model, graph, plan, digits["calibration"]), expected), rel=1e-3
    )


def test_weights_move_where_they_have_a_learning_rate(digits):
    """From float weights near to their codes, as quantlens-fast leaves them; a run is kept where its own loss fell."""
    model, images = digits["model"], digits["calibration"][:16]
    graph = ql.quantize(model, images, bits="W32A32").graph.clone()
    calibration, method = Calibration.of(images, model.preprocess), QuantlensFast()
    # a start that leaves much to do
    options = method.options({"softmax": "auto", "hidden": "none", "centre": "none", "activations": "tensor"})
    widths, run = Widths(Bits.parse("W3A3"), options), Run(options, 1)
    with torch.no_grad():
        plan = Plan({}, rewrite(graph, calibration, widths, run))
        reference = graph.clone()
        starts = calibrate(graph, calibration, widths, plan, run)
    for rate, steps in ((0.005, 40), (0.0, 8)):
        settings = Distillation(steps, 16, lr_weights=rate, plain=0.4)
        *found, report = _run((graph, plan, calibration, reference), settings, starts=starts)
        assert report.accepted is (report.after < report.before)
        moved = [not torch.equal(found[0].tensor(name), graph.tensor(name)) for name in starts]
        assert any(moved) is (report.accepted and rate > 0), (rate, report, sum(moved), len(moved))


def test_a_killed_run_goes_on_bit_equal(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "SAVED", 2)
    start = _start(digits["model"], digits["calibration"][:16], "W3A4")
    settings = Distillation(iterations=5, batch_size=8, lr_weights=0.003)
    whole = _run(start, settings, seed=3)

    def kill(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(start, settings, seed=3, checkpoint=tmp_path, progress=kill)
    seen = []
    again = _run(start, settings, seed=3, checkpoint=tmp_path, progress=lambda done, total: seen.append(done))
    assert seen == [3, 4, 5]
    assert all(torch.equal(v, again[0].tensors()[k]) for k, v in whole[0].tensors().items())
    for key, quantizer in whole[1].quantizers.items():
        assert all(torch.equal(v, again[1].quantizers[key].tensors()[n]) for n, v in quantizer.tensors().items())
    other = []
    _run(start, settings, seed=4, checkpoint=tmp_path, progress=lambda done, total: other.append(done))
    assert other == [1, 2, 3, 4, 5], "another run does not go on there"


def test_a_weight_starts_at_its_code_and_near_its_float_value(digits):
    q = ql.quantize(digits["model"], digits["calibration"], method="minmax", bits="W4A8")
    edge, quantizer = q.weight_edges()[1]
    weight = q.graph.tensor(str(edge.value.target))
    start = weight + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    near = near_code(quantizer, weight, start)
    assert torch.equal(quantizer(near), quantizer(weight))
    assert bool(((near - start).abs() <= (quantizer(weight) - start).abs() + 1e-7).all())
    assert torch.equal(near_code(quantizer, weight, None), quantizer(weight))


def test_weights_stay_without_a_learning_rate(digits):
    start = _start(digits["model"], digits["calibration"][:16], "W3A4")
    graph, plan, report = _run(start, Distillation(10, 8, lr_vectors=0.01))
    assert report.accepted
    assert report.after < report.before
    changed = {k for k, v in graph.tensors().items() if not torch.equal(v, start[0].tensor(k))}
    assert changed
    assert all(graph.tensor(name).dim() == 1 for name in changed)
    assert all(plan.quantizers[e.key] is start[1].quantizers[e.key] for e in graph.sites.edges.values() if e.is_weight)


def test_views_decide_and_not_images_learned_by_heart(digits):
    """The loss that is reported, and decides, is that on views: it is not the one on the images as they are."""
    start = _start(digits["model"], digits["calibration"], "W3A4")
    crops, plain = (
        _run(start, Distillation(0, plain=share, strange=0.0), seed=seed)[2].before
        for share, seed in ((0.0, 1), (1.0, 1))
    )
    again, other = (_run(start, Distillation(0, plain=0.0, strange=0.0), seed=seed)[2].before for seed in (1, 2))
    assert crops == again
    assert len({crops, plain, other}) == 3


def test_vectors_that_are_trained_are_biases_and_norms(digits):
    graph = ql.quantize(digits["model"], digits["calibration"], bits="W32A32").graph
    names = {str(node.target) for node in trained_vectors(graph)}
    assert names
    assert all(graph.tensor(name).dim() == 1 for name in names)


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"iterations": -1}, {"batch_size": 0}, {"strange": 0.7, "plain": 0.4}, {"features": -1.0}):
        with pytest.raises(QuantlensError):
            Distillation(**wrong)
