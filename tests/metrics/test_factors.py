"""Effects of factors: known ones are found, intervals cover, verdicts follow from intervals."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from quantlens.errors import QuantlensError
from quantlens.metrics.bootstrap import holm
from quantlens.metrics.factors import Effect, effects, factorial_effects, mediations, spread, verdict

CELLS = np.array(list(product([-1.0, 1.0], repeat=3)))
NAMES = ("data", "augment", "rate")


def runs(seeds: int, noise: float, rng: np.random.Generator, spread: float = 5.0, cell_noise=1.0) -> np.ndarray:
    """[seeds, 8] with main effects 4, 0, -1 and an interaction of the first and the third of 2; three-factor: 3."""
    a, b, c = CELLS.T
    truth = 50 + (4 * a + 0 * b - 1 * c + 2 * a * c + 3 * a * b * c) / 2
    return truth + rng.normal(0, spread, (seeds, 1)) + noise * cell_noise * rng.normal(size=(seeds, 8))


TRUTH = {"data": 4, "augment": 0, "rate": -1, "data x augment": 0, "data x rate": 2, "augment x rate": 0}


def test_known_effects_are_found_whatever_the_seeds_are():
    found = factorial_effects(runs(3, 0.0, np.random.default_rng(0)), CELLS, NAMES, bound=1.5)
    assert [e.name for e in found] == list(TRUTH)
    np.testing.assert_allclose([e.estimate for e in found], list(TRUTH.values()), atol=1e-9)
    assert [e.verdict for e in found] == ["effect", *["without effect"] * 3, "effect", "without effect"]


@pytest.mark.parametrize(("cell_noise", "off"), [(1.0, 0.02), (np.array([0.3, 2, 0.3, 2, 1, 1, 0.3, 2]), 0.03)])
def test_intervals_cover_what_they_say(cell_noise, off):
    rng, held, spreads = np.random.default_rng(1), [], []
    truth = np.array(list(TRUTH.values()))
    for _ in range(250):
        found = factorial_effects(runs(3, 1.0, rng, cell_noise=cell_noise), CELLS, NAMES, bound=1.0)
        low, high = np.array([(e.low, e.high) for e in found]).T
        held.append((low < truth) & (truth < high))
        spreads.append(found[0].spread ** 2)
    assert np.mean(held) == pytest.approx(0.95, abs=off), "a little less where cells differ in their noise"
    assert np.mean(spreads) == pytest.approx(np.mean(np.broadcast_to(cell_noise, 8) ** 2), rel=0.08)


def test_two_cells_are_a_paired_t_test():
    y = np.random.default_rng(2).normal([0.0, 0.8], size=(6, 2))
    (found,) = effects(y, {"second": [-1, 1]}, bound=1.0)
    expected = stats.ttest_rel(y[:, 1], y[:, 0])
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.size == pytest.approx(found.estimate / (np.std(y[:, 1] - y[:, 0], ddof=1) / np.sqrt(2)))


@pytest.mark.parametrize("with_covariate", [False, True])
def test_as_least_squares_with_seeds_and_cells(with_covariate):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 8)) + CELLS[:, 0]
    y = runs(4, 1.0, rng) + 2.0 * x
    seed, cell = (one.ravel() for one in np.indices(y.shape))
    matrix = np.column_stack([np.eye(4)[seed][:, 1:], np.eye(8)[cell], *([x.ravel()] if with_covariate else [])])
    beta, residual, *_ = np.linalg.lstsq(matrix, y.ravel(), rcond=None)
    freedom = y.size - matrix.shape[1]
    weights = np.concatenate([np.zeros(3), CELLS[:, 1] / 4, [0.0] * with_covariate])
    error = np.sqrt(residual[0] / freedom * weights @ np.linalg.inv(matrix.T @ matrix) @ weights)
    found = factorial_effects(y, CELLS, NAMES, bound=1.0, covariate=x if with_covariate else None)[1]
    assert found.estimate == pytest.approx(weights @ beta)
    assert found.high - found.estimate == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    assert found.spread == pytest.approx(np.sqrt(residual[0] / freedom))


def test_p_values_are_corrected_in_two_families():
    found = factorial_effects(runs(3, 2.0, np.random.default_rng(4)), CELLS, NAMES, bound=1.0)
    for family in (found[:3], found[3:]):
        smallest = sorted(e.p for e in family)
        by_hand = np.minimum(1, np.maximum.accumulate([smallest[0] * 3, smallest[1] * 2, smallest[2]]))
        assert sorted(e.p_holm for e in family) == pytest.approx(by_hand)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_a_verdict_needs_an_interval_inside_the_bound_to_deny_an_effect():
    assert verdict(-1.0, 1.0, 0.9, bound=3) == "without effect"
    assert verdict(0.5, 1.0, 0.001, bound=3) == "without effect", "there is one, smaller than what matters"
    assert verdict(-1.0, 4.0, 0.2, bound=3) == "not decided"
    assert verdict(0.5, 4.0, 0.01, bound=3) == "effect"
    assert verdict(0.5, 4.0, 0.06, bound=3) == "not decided", "corrected for the other factors"
    assert verdict(-4.0, -3.5, 0.01, bound=3) == "effect"


def test_wide_intervals_are_not_decided_and_no_noise_is_no_fault():
    wide = factorial_effects(runs(2, 20.0, np.random.default_rng(5)), CELLS, NAMES, bound=1.0)
    assert {e.verdict for e in wide} == {"not decided"}
    flat = effects(np.ones((3, 2)), {"none": [-1, 1]}, bound=1.0)
    assert flat[0].estimate == 0 == flat[0].high == flat[0].size
    assert (flat[0].p, flat[0].verdict) == (1.0, "without effect")
    assert Effect("a", 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, "effect").size == np.inf


def test_effects_that_a_fraction_confounds_are_told_as_one():
    half = np.array([[*row, np.prod(row)] for row in CELLS])  # resolution IV: D = ABC
    y = np.random.default_rng(7).normal(size=(3, 1)) + half[:, 0] + 0.5 * half[:, 0] * half[:, 1]
    found = {e.name: e.estimate for e in factorial_effects(np.asarray(y), half, tuple("ABCD"), bound=0.1)}
    assert list(found) == ["A", "B", "C", "D", "A x B = C x D", "A x C = B x D", "A x D = B x C"]
    assert list(found.values()) == pytest.approx([2, 0, 0, 0, 1, 0, 0])
    third = np.array([[a, b, -a * b] for a, b in product([-1.0, 1.0], repeat=2)])  # resolution III
    names = [e.name for e in factorial_effects(y[:, :4], third, tuple("ABC"), bound=0.1)]
    assert names == ["A = -B x C", "B = -A x C", "C = -A x B"]


# ---- mediation -------------------------------------------------------------------------------------------------------

CONTRASTS = {name: CELLS[:, i] / 4 for i, name in enumerate(NAMES)}


def mediated(seeds: int, rng: np.random.Generator, slope=2.0, moved=3.0, straight=0.0, noise=0.3):
    """(outcome, mediator) [seeds, 8]: "data" moves the mediator, which moves the outcome, as "data" does by itself."""
    x = moved * CELLS[:, 0] / 2 + rng.normal(0, 5, (seeds, 1)) + rng.normal(0, 1, (seeds, 8))
    y = slope * x + straight * CELLS[:, 0] / 2 + rng.normal(0, 5, (seeds, 1)) + rng.normal(0, noise, (seeds, 8))
    return y, x


def test_a_mediator_that_carries_all_is_found():
    y, x = mediated(3, np.random.default_rng(0))
    other = np.random.default_rng(1).normal(size=x.shape)
    found = mediations(y, {"it": x, "another": other, "none": CELLS[:, 0] + 0 * x}, CONTRASTS, bound=1.5)
    assert [(m.factor, m.mediator) for m in found] == [(f, m) for f in NAMES for m in ("it", "another")]
    it, another = found[:2]
    assert (it.slope, it.estimate) == (pytest.approx(2, abs=0.3), pytest.approx(it.total.estimate, abs=0.6))
    assert (it.total.verdict, it.direct.verdict, it.verdict) == ("effect", "without effect", "effect")
    assert it.low < 2.0 * 3.0 < it.high
    assert another.verdict == "without effect"
    assert found[2].verdict != "effect", "augment moves neither"
    for one in found:
        assert one.estimate == pytest.approx(one.total.estimate - one.direct.estimate)
        assert one.low < one.estimate < one.high
    assert it.p_holm == pytest.approx(min(1, 2 * it.p))


def test_what_only_goes_along_with_the_factor_carries_nothing():
    """Over all trainings outcome and mediator are correlated at 0.97; between seeds of a cell they are not."""
    y, x = mediated(3, np.random.default_rng(2), slope=0.0, moved=30.0, straight=10.0)
    within_blocks = [v - v.mean(axis=1, keepdims=True) for v in (y, x)]
    assert np.corrcoef(*(v.ravel() for v in within_blocks))[0, 1] > 0.97
    (found,) = mediations(y, {"it": x}, {"data": CONTRASTS["data"]}, bound=5.0)
    assert found.total.verdict == "effect"
    assert abs(found.slope) < 0.3
    assert found.low < 0 < found.high
    assert found.verdict != "effect"


@pytest.mark.parametrize(("slope", "moved", "most"), [(2.0, 3.0, 0.98), (0.0, 3.0, 0.98), (0.3, 0.5, 1.0)])
def test_intervals_of_what_is_carried_cover(slope, moved, most, monkeypatch):
    """(More than they say where neither slope is told from 0.)"""
    monkeypatch.setattr("quantlens.metrics.factors.DRAWS", 2000)
    rng, held = np.random.default_rng(3), []
    for _ in range(200):
        y, x = mediated(3, rng, slope, moved, straight=1.0, noise=1.0)
        (found,) = mediations(y, {"it": x}, {"data": CONTRASTS["data"]}, bound=1.0)
        held.append(found.low < slope * moved < found.high)
    assert 0.92 < np.mean(held) <= most


def test_the_spread_is_that_of_the_effects():
    y = runs(3, 1.0, np.random.default_rng(4))
    assert spread(y) == pytest.approx(factorial_effects(y, CELLS, NAMES, bound=1.0)[0].spread)
    assert spread(np.add.outer(np.arange(3.0), np.arange(4.0))) == pytest.approx(0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda y: factorial_effects(y, CELLS, NAMES[:2], 1.0), "of the 2 factors named"),
        (lambda y: factorial_effects(y, CELLS + 1, NAMES, 1.0), "must be -1 or 1"),
        (lambda y: factorial_effects(y[:, 1:], CELLS[1:], NAMES, 1.0), "not balanced"),
        (lambda y: effects(y[:1], {"a": CELLS[:, 0]}, 1.0), "two seeds"),
        (lambda y: effects(y, {"a": [1, -1]}, 1.0), "do not fit 8 cells"),
        (lambda y: effects(y, {"a": np.eye(8)[0]}, 1.0), "sum to 0"),
        (lambda y: effects(y, {"a": CELLS[:, 0]}, 0.0), "bound 0.0 must be positive"),
        (lambda y: effects(y, {"a": CELLS[:, 0]}, 1.0, covariate=y[:1]), "covariate"),
        (lambda y: effects(y, {"a": CELLS[:, 0]}, 1.0, covariate=np.ones_like(y)), "does not vary"),
        (lambda y: mediations(y, {"m": y[:1]}, {"a": CELLS[:, 0]}, 1.0), "covariate"),
    ],
)
def test_mistakes_are_told_in_a_sentence(call, said):
    with pytest.raises(QuantlensError, match=said):
        call(runs(3, 1.0, np.random.default_rng(8)))
