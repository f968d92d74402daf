"""Thresholds that are fixed: against counting by hand, and on resamples against the images drawn one by one."""

from __future__ import annotations

import numpy as np
import pytest

from quantlens.errors import QuantlensError
from quantlens.metrics import threshold_keeping
from quantlens.metrics.operating import KINDS, Promise, Reached, class_losses, flip_counts, flip_kinds

RNG = np.random.default_rng(0)
SCORES = np.round(RNG.random(83), 1)  # many ties
RIGHT = RNG.random(83) < SCORES
DRAWN = RNG.multinomial(83, np.full(83, 1 / 83), size=9).T.astype(np.float32)


def drawn_images(r: int) -> np.ndarray:
    return np.repeat(np.arange(83), DRAWN[:, r].astype(int))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.95, 1.0])
def test_thresholds_of_resamples_are_those_of_the_images_drawn(share: float) -> None:
    reached = Reached(SCORES, DRAWN, RIGHT)
    other = Reached(1 - SCORES, DRAWN, RIGHT)
    cuts, accurate = reached.keeping(share), reached.accurate(share)
    for r in range(9):
        values, right = SCORES[drawn_images(r)], RIGHT[drawn_images(r)]
        assert cuts[r] == threshold_keeping(values, share)
        assert reached.share(cuts)[r] == (values >= cuts[r]).mean() >= share
        assert other.share(cuts)[r] == (1 - values >= cuts[r]).mean()
        assert reached.accuracy(cuts)[r] == right[values >= cuts[r]].mean()
        possible = [t for t in np.unique(values) if right[values >= t].mean() >= share]
        assert accurate[r] == (possible[0] if possible else np.inf)


def test_a_cut_that_nothing_reaches_has_no_accuracy() -> None:
    reached = Reached(np.array([0.2, 0.4]), np.ones((2, 1)), np.array([False, False]))
    assert reached.accurate(0.5).tolist() == [np.inf]
    assert reached.share(np.array([np.inf])).tolist() == [0]
    assert np.isnan(reached.accuracy(np.array([np.inf]))).all()


def test_a_promise_is_a_share_and_one_of_two() -> None:
    assert (Promise().coverage, Promise().accuracy) == (0.9, None)
    assert Promise(accuracy=0.99).coverage is None
    assert "right on at least 99 % of what it answers" in str(Promise(accuracy=0.99))
    for wrong in ({"coverage": 0.0}, {"accuracy": 1.5}, {"keep": float("nan")}, {"coverage": 0.5, "accuracy": 0.5}):
        with pytest.raises(QuantlensError):
            Promise(**wrong)


def test_flips_are_of_three_kinds() -> None:
    labels, first, second = np.array([0, 0, 0, 0, 0]), np.array([0, 0, 1, 1, 1]), np.array([0, 2, 0, 2, 1])
    assert flip_kinds(labels, first, second).tolist() == [-1, 0, 1, 2, -1]
    assert flip_counts(labels, first, second) == {"n": 5, **dict.fromkeys(KINDS, 1)}


def test_losses_of_classes_are_agresti_and_min() -> None:
    """Half an image is added to each cell of (right, wrong) x (right, wrong); 3 lost, 1 gained of 10, by hand."""
    labels = np.array([4] * 10 + [7])
    first = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1])
    second = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1])
    found = class_losses(labels, first, second)
    lost, gained, n = 3.5, 1.5, 12
    middle = (gained - lost) / n
    width = 1.959964 * np.sqrt(((lost + gained) / n - middle**2) / n)
    assert found["class"].tolist() == [4, 7]
    assert found["n"].tolist() == [10, 1]
    assert found["difference"].tolist() == [-0.2, 0]
    assert found["low"][0] == pytest.approx(middle - width)
    assert found["high"][0] == pytest.approx(middle + width)
    assert found["low"][1] < -0.5 < 0.5 < found["high"][1], "one image proves nothing"
