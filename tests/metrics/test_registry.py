"""What is said of every metric, and that every metric of a result is said something of."""

from __future__ import annotations

import numpy as np
import pytest

from quantlens.metrics import METRICS, Spread, classification_metrics, metric_of, names_of, ood_metrics
from quantlens.metrics.ood import COUNTS


def test_every_metric_of_arrays_is_in_the_registry() -> None:
    rng = np.random.default_rng(0)
    found = {
        **classification_metrics(rng.normal(size=(20, 3)), rng.integers(0, 3, 20)),
        **ood_metrics(rng.normal(size=20), rng.normal(size=9)),
    }
    numbers = {key for key, value in found.items() if isinstance(value, float)}
    assert numbers - COUNTS <= set(METRICS)
    assert set(names_of("classification")) <= numbers
    assert set(names_of("ood")) <= numbers
    assert set(names_of("ood", resampled=True)) < set(names_of("ood"))


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_says_what_it_is(name: str) -> None:
    metric = METRICS[name]
    assert (metric.name, bool(metric.title), bool(metric.family)) == (name, True, True)
    assert metric.direction in ("higher", "lower", None)
    assert metric.heading == f"{metric.label} {metric.arrow}".strip()
    assert {1: "↑", -1: "↓", 0: ""}[metric.sign] == metric.arrow


def test_how_values_and_changes_are_written() -> None:
    top1, nll = METRICS["top1"], METRICS["nll"]
    assert (top1.heading, nll.heading, METRICS["size_mb"].heading) == ("top-1 % ↑", "NLL ↓", "size MB ↓")
    assert (top1.text(0.9825), top1.text(-0.01, "+"), top1.text(0.01, "+")) == ("98.25", "-1.00", "+1.00")
    assert (nll.text(0.25), nll.text(None)) == ("0.250", "–")
    assert (top1.change_unit, nll.change_unit) == ("points", "nats")
    assert metric_of("ood_mean.far.msp.auroc") is METRICS["auroc"]
    assert metric_of("id.of another program").heading == "of another program"


def test_spread_over_seeds() -> None:
    values = [0.5, 0.6, 0.8]
    found = Spread.of([*values, None, float("nan"), True, "x"])
    assert found is not None
    assert (found.mean, found.std, found.n) == pytest.approx((np.mean(values), np.std(values, ddof=1), 3))
    assert found.scaled(-100) == Spread(-100 * found.mean, 100 * found.std, 3)
    assert Spread.of([1]) == Spread(1.0, None, 1)
    assert Spread.of([]) is None
