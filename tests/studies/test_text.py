"""Numbers and names as text."""

from __future__ import annotations

import math
import statistics

import pytest

from quantlens.studies.text import (
    Stat,
    count,
    duration,
    fixed,
    join_words,
    mean_std,
    number,
    parse_bits,
    percent,
    precision_order,
    score_order,
)


def test_stat_is_mean_and_sample_deviation():
    values = [0.61, 0.655, 0.64]
    stat = Stat.of(values)
    assert stat is not None
    assert stat.mean == pytest.approx(statistics.fmean(values))
    assert stat.std == pytest.approx(statistics.stdev(values))
    assert stat.n == 3


def test_stat_passes_over_what_is_no_number():
    assert Stat.of([None, math.nan, math.inf, "0.5", True]) is None
    assert Stat.of([None, 0.5]) == Stat(0.5, None, 1)


@pytest.mark.parametrize("value", [None, math.nan, -math.inf, "1", True, [1]])
def test_number_refuses(value):
    assert number(value) is None


def test_fixed_signs():
    assert fixed(-1.25, 1) == "−1.2"
    assert fixed(-0.001, 1) == "0.0"
    assert fixed(0.5, 1, sign=True) == "+0.5"
    assert fixed(None, 2) == "–"
    assert percent(0.62034) == "62.0"


def test_mean_std():
    assert mean_std(Stat(62.0, 0.41, 3), 1) == "62.0 ± 0.4"
    assert mean_std(Stat(-0.62, None, 1), 2) == "−0.62"
    assert mean_std(None, 2) == "–"


def test_precisions_in_the_papers_order():
    shuffled = ["W4A4", "W8A4", "FP32", "mixed", "W6A6", "W4A8", "W8A8", "W2A2"]
    expected = ["FP32", "W8A8", "W6A6", "W4A8", "W8A4", "W4A4", "W2A2", "mixed"]
    assert sorted(shuffled, key=precision_order) == expected


def test_parse_bits():
    assert parse_bits("W4A10") == (4, 10)
    assert parse_bits("FP32") is None
    assert parse_bits("W4") is None


def test_scores_start_with_msp():
    assert sorted(["zeta", "knn", "energy", "msp"], key=score_order) == ["msp", "energy", "knn", "zeta"]


def test_words():
    assert join_words(["a", "b", "c"]) == "a, b and c"
    assert join_words(list("abcdef"), limit=3) == "a, b and 4 more"
    assert join_words([]) == ""
    assert count(1, "seed") == "1 seed"
    assert [duration(s) for s in (4.21, 185, 200, 7500)] == ["4.2 s", "3 min 05 s", "3 min 20 s", "2 h 05 min"]
