"""What thresholds do once they are fixed: coverage and selective accuracy of a confidence cut, false alarms and misses
of an OOD threshold.

An image is *answered* when the model's confidence (largest softmax probability) reaches the cut; *coverage* is the
share of ID images that are, *selective accuracy* the share of them that are right (El-Yaniv and Wiener, JMLR 11, 2010).
An image is *flagged* as OOD when its score is below the threshold; *false alarms* are the share of ID images flagged,
*misses* the share of OOD images not flagged.

As in `metrics.bootstrap` everything is computed on all resamples at once. A threshold is set anew on every resample, as
in FPR@95: that is what makes an interval hold the chance in the threshold, too.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quantlens.errors import QuantlensError
from quantlens.metrics.bootstrap import Array, running_sums, sorted_scores
from quantlens.metrics.ood import least_kept

COVERAGE, KEEP = 0.9, 0.95


@dataclass(frozen=True)
class Promise:
    """What thresholds are set to, on the images that set them.

    coverage: share of the ID images that the confidence cut answers, at least (the highest such cut; 0.9 unless
    `accuracy` is given). accuracy: in its place, share of the answered images that are right, at least (the lowest such
    cut). keep: share of the ID images that an OOD threshold keeps, at least (the highest such threshold).
    """

    coverage: float | None = None
    accuracy: float | None = None
    keep: float = KEEP

    def __post_init__(self) -> None:
        if self.coverage is not None and self.accuracy is not None:
            raise QuantlensError("a confidence cut promises a coverage or an accuracy, not both; leave one out")
        if self.accuracy is None and self.coverage is None:
            object.__setattr__(self, "coverage", COVERAGE)
        for name, value in asdict(self).items():
            if value is not None and not 0 < value <= 1:
                raise QuantlensError(f"{name} is {value!r}; give a share above 0 and at most 1, such as {KEEP}")

    def __str__(self) -> str:
        cut = (
            f"answers at least {self.coverage * 100:g} % of the ID images"
            if self.coverage is not None
            else f"is right on at least {(self.accuracy or 0) * 100:g} % of what it answers"
        )
        return f"a confidence cut that {cut}, OOD thresholds that keep at least {self.keep * 100:g} % of the ID images"


class Reached:
    """The images of one set by a score [N] on every resample (counts `drawn` [N, R]): how many reach a threshold, and
    with `right` [N] how many of those are right. Thresholds are [R], one for each resample."""

    def __init__(self, scores: Array, drawn: Array, right: Array | None = None):
        order, self.scores, self.starts = sorted_scores(scores)
        self.n, self.columns = len(scores), np.arange(drawn.shape[1])
        drawn = drawn[order]
        self.upwards = self.n - running_sums(drawn)  # [N + 1, R]: images from the k-th lowest score upwards
        if right is not None:
            sums = running_sums(drawn * right[order, None].astype(drawn.dtype))
            self.right_upwards = sums[-1] - sums

    def share(self, thresholds: Array) -> Array:
        """Share of the images that reach the threshold [R]."""
        return self._at(self.upwards, thresholds) / self.n

    def accuracy(self, thresholds: Array) -> Array:
        """Share of those that are right [R]; NaN where no image reaches it."""
        reached, right = self._at(self.upwards, thresholds), self._at(self.right_upwards, thresholds)
        return np.where(reached > 0, right / np.maximum(reached, 1), np.nan)

    def _at(self, upwards: Array, thresholds: Array) -> Array:
        places = np.searchsorted(self.scores, thresholds)
        return upwards[places, self.columns].astype(np.float64)

    def keeping(self, share: float) -> Array:
        """The highest threshold that at least this share reaches [R], as `threshold_keeping` sets it."""
        enough = self.upwards[self.starts] >= least_kept(self.n, share)
        return self.scores[self.starts][np.count_nonzero(enough, axis=0) - 1]

    def accurate(self, share: float) -> Array:
        """The lowest threshold at which at least this share of those that reach it is right [R]; infinity where none
        is."""
        reached, right = (sums[self.starts].astype(np.float64) for sums in (self.upwards, self.right_upwards))
        drawn = reached > np.concatenate([reached[1:], np.zeros((1, reached.shape[1]))])
        enough = drawn & (right / np.maximum(reached, 1) >= share)
        return np.where(enough.any(axis=0), self.scores[self.starts][enough.argmax(axis=0)], np.inf)

    def cut(self, promise: Promise) -> Array:
        """The confidence cut of a promise [R]."""
        if promise.coverage is not None:
            return self.keeping(promise.coverage)
        return self.accurate(promise.accuracy or 1.0)


# ---- flips and classes -----------------------------------------------------------------------------------------------

KINDS = ("right_to_wrong", "wrong_to_right", "wrong_to_wrong")
"""How an answer flips, in the order in which flips are listed."""
FEW = 20
"""Images of a class below which it says little."""


def flip_kinds(labels: Array, first: Array, second: Array) -> Array:
    """For answers [N] of two models: which of KINDS a flip is, -1 where the answer is the same."""
    kind = np.where(first == labels, 0, np.where(second == labels, 1, 2))
    return np.where(first == second, -1, kind)


def class_losses(labels: Array, first: Array, second: Array) -> dict[str, Array]:
    """What each class with images loses between two models that are right on images [N] (0 or 1, or the mean over
    seeds): {"class", "n", "a", "b", "difference", "low", "high"}, each [classes].

    The 95 % interval is that of Agresti and Min for matched pairs (Statistics in Medicine 24, 2005): Wald's with half
    an image added to each of the four outcomes. Unlike a bootstrap it claims no certainty where a class has one image.
    """
    classes, place, n = np.unique(labels, return_inverse=True, return_counts=True)
    first, second = (np.asarray(side, dtype=np.float64) for side in (first, second))
    change = second - first
    sums = [np.bincount(place, values, len(classes)) for values in (first, second, change, change**2)]
    mean = sums[2] / (n + 2)
    error = np.sqrt(((sums[3] + 1) / (n + 2) - mean**2) / (n + 2))
    low, high = (np.clip(mean + side * 1.959964 * error, -1, 1) for side in (-1, 1))
    found = {"class": classes, "n": n, "a": sums[0] / n, "b": sums[1] / n, "difference": sums[2] / n}
    return {**found, "low": low, "high": high}


def flip_counts(labels: Array, first: Array, second: Array) -> dict[str, Any]:
    """How many images flip, by kind, and of how many: {"n", *KINDS}."""
    kinds = flip_kinds(labels, first, second)
    return {"n": len(labels), **{name: int((kinds == k).sum()) for k, name in enumerate(KINDS)}}
