"""Divergence and noise against scipy and the formulas; their sums are those that block reconstruction trains on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from quantlens.metrics.divergence import damage, kl_divergence, kl_of_logits, outputs_of, sqnr_db


def test_kl_of_logits_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = [entropy(p, q) for p, q in zip(softmax(a.numpy(), 1), softmax(b.numpy(), 1), strict=True)]
    np.testing.assert_allclose(kl_of_logits(a, b).numpy(), expected, rtol=1e-12)
    assert kl_of_logits(a, b, "sum").item() == pytest.approx(sum(expected))
    assert kl_of_logits(a, b, "mean").item() == pytest.approx(np.mean(expected))
    assert (kl_of_logits(a, a) == 0).all()
    same = kl_divergence(a.log_softmax(-1), b.log_softmax(-1))
    assert torch.equal(same, kl_of_logits(a, b))


def test_the_bits_are_those_of_the_formulas_that_methods_were_written_with() -> None:
    generator = torch.Generator().manual_seed(1)
    expected, got = (torch.randn(32, 10, generator=generator) for _ in range(2))
    logs = got.log_softmax(-1), expected.log_softmax(-1)
    for ours, theirs in (("mean", "batchmean"), ("sum", "sum")):
        assert torch.equal(
            kl_of_logits(expected, got, ours), torch.nn.functional.kl_div(*logs, reduction=theirs, log_target=True)
        )
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    rows = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    assert torch.equal(kl_of_logits(expected.double(), got.double()), rows)


def test_signal_over_noise() -> None:
    x = np.array([3.0, -4.0])
    noise = np.array([0.03, 0.04])
    assert sqnr_db(float((x**2).sum()), float((noise**2).sum())) == pytest.approx(40)
    assert sqnr_db(1.0, 0.0) is None
    assert sqnr_db(0.0, 1.0) is None


def test_damage_is_of_what_the_model_gives() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (2 * torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (torch.sigmoid(x).numpy() for x in (a, b))
    by_label = entropy([p, 1 - p], [q, 1 - q], axis=0)
    assert float(damage(a, b, "sigmoid", "sum")) == pytest.approx(by_label.sum())
    assert float(damage(a, b, "sigmoid")) == pytest.approx(by_label.sum(1).mean())
    assert float(damage(a, b, "values")) == pytest.approx(np.square(a.numpy() - b.numpy()).mean())
    assert float(damage(a, b, "values", "sum")) == pytest.approx(np.square(a.numpy() - b.numpy()).sum() / 3)
    assert float(damage(a, b, "softmax", "sum")) == pytest.approx(float(kl_of_logits(a, b, "sum")))
    assert float(damage(a[:, :1], b[:, :1], "sigmoid")) > 0  # of one logit the softmax says nothing


def test_what_a_model_gives_follows_from_its_task_and_head() -> None:
    def given(task: str, scoring: str = "") -> str:
        return outputs_of(SimpleNamespace(task=task, detection_head=SimpleNamespace(scoring=scoring)))

    tasks = ("classify", "binary", "multilabel", "features", "zero-shot", "detect")
    assert [given(task) for task in tasks] == ["softmax", "sigmoid", "sigmoid", "values", "values", "softmax"]
    assert given("detect", "sigmoid") == "sigmoid"
    assert outputs_of(object()) == "softmax"
