"""The association of two metrics over the cells of a study."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from quantlens.metrics.correlation import associate


def test_association_is_scipys():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    found = associate(x, y, list(range(40)), ["a"] * 40)
    assert found.pearson == pytest.approx(pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(spearmanr(x, y).statistic)
    assert found.within == pytest.approx(found.spearman)
    assert found.low < found.spearman < found.high
    assert (found.n, found.conditions) == (40, 40)


def test_copies_of_a_condition_are_no_new_evidence():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 12))
    alone = associate(x, y, list(range(12)), ["a"] * 12)
    copied = associate(np.repeat(x, 5), np.repeat(y, 5), [i // 5 for i in range(60)], ["a"] * 60)
    width = alone.high - alone.low
    assert copied.high - copied.low == pytest.approx(width, rel=0.15)
    naive = associate(np.repeat(x, 5), np.repeat(y, 5), list(range(60)), ["a"] * 60)
    assert naive.high - naive.low < 0.6 * width


def test_within_precisions_takes_the_bits_out():
    """Drift and loss that share nothing but the bits correlate, yet not within a precision."""
    rng = np.random.default_rng(2)
    bits = np.repeat(np.arange(6), 20)
    x, y = bits + 0.3 * rng.normal(size=(2, 120))
    found = associate(x, y, list(range(120)), bits.tolist())
    assert found.spearman > 0.9
    assert abs(found.within) < 0.3


def test_association_of_little_is_none():
    assert associate([1, 2, 3], [1, 2, 3], [1, 2, 3], "aaa").spearman is None
    constant = associate([1.0] * 6, range(6), range(6), "aaabbb")
    assert constant.spearman is constant.pearson is constant.low is constant.within is None
