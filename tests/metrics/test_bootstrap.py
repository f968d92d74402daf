"""Intervals and p-values of resampled differences; resampled metrics are in tests/evaluation/test_bootstrap.py."""

from __future__ import annotations

import numpy as np
import pytest

from quantlens.metrics.bootstrap import Resamples, differences, holm, interval, simultaneous_intervals


def test_seeds_widen_the_interval():
    """Seeds that differ by a known amount: the standard deviation is that of the mean over drawn seeds."""
    resamples = Resamples(20000)
    still = np.zeros(20000)
    effects = np.array([0.0, 0.3, 0.6])
    drawn = differences([(still, still + effect) for effect in effects], resamples)
    assert drawn.mean() == pytest.approx(0.3, abs=0.01)
    assert drawn.std() == pytest.approx(effects.std() / np.sqrt(3), rel=0.03)
    one_way = interval(differences([(still, still + 0.3)] * 3, resamples))
    assert (one_way.low, one_way.high) == pytest.approx((0.3, 0.3))
    assert one_way.p == pytest.approx(2 / 20001)


def test_holm_against_its_definition():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}
    assert holm(p) == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_simultaneous_intervals_hold_all_means_at_once() -> None:
    rng = np.random.default_rng(0)
    means = np.array([-0.02, -0.05, 0.0, -0.1])
    held = 0
    for seed in range(200):
        values = rng.normal(means, 0.3, size=(300, 4))
        drawn = np.random.default_rng(seed).multinomial(300, np.full(300, 1 / 300), size=400) @ values / 300
        intervals = simultaneous_intervals(values.mean(axis=0), drawn, 300)
        held += bool(((intervals[:, 0] <= means) & (means <= intervals[:, 1])).all())
    assert 0.9 <= held / 200 <= 0.995


def test_a_column_without_spread_has_an_interval_all_the_same() -> None:
    ((low, high),) = simultaneous_intervals(np.zeros(1), np.zeros((200, 1)), 100)
    assert low == pytest.approx(-0.0196, abs=1e-4)
    assert high == pytest.approx(0.0196, abs=1e-4)
