"""Metrics under resampling of the images, all resamples at once (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapters 13 and 16).

A resample draws as many images as a set has, with replacement. It is held as counts: a matrix [images, resamples] that
says how often each image was drawn. Means over images are matrix products with it. Metrics of a ranking (AUPR, AUROC,
FPR@95) come from the images sorted by score once, and running sums of the counts in that order; equal scores are one
threshold, as in `metrics.ood`.

The counts depend on the name and the size of a set, on the seed, and on nothing else: two models that are measured on
the same images are therefore resampled in the same way, which is what makes the comparison a paired one.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from quantlens.metrics.classification import equal_width_bins

Array = NDArray[Any]

ID = ""
"""The name of the ID images among the sets."""

BLOCK = 100
"""Resamples that are drawn together; part of what the counts depend on."""

CHUNK_ELEMENTS = 1 << 18
"""Counts of one set that are worked on together (1 MB: they are walked over many times, so they stay in the cache)."""

KEPT_BYTES = 1 << 28
"""Counts that are kept for the next model; the others are drawn again."""


class Resamples:
    """`count` resamples of any number of image sets, the same for everyone who asks with the same seed."""

    def __init__(self, count: int, seed: int = 0):
        self.count, self.seed = count, seed
        self._kept: dict[tuple[str, int, int], Array] = {}
        self._bytes = 0

    def chunks(self, sizes: Mapping[str, int]) -> Iterator[tuple[slice, dict[str, Array]]]:
        """(which resamples, {set: float32 counts [images, resamples]}) for sets of these sizes, `ID` among them."""
        step = BLOCK * max(1, CHUNK_ELEMENTS // (BLOCK * max(sizes.values())))
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            yield slice(start, stop), {name: self._counts(name, n, start, stop) for name, n in sizes.items()}

    def _counts(self, name: str, n: int, start: int, stop: int) -> Array:
        blocks = [self._block(name, n, at // BLOCK) for at in range(start, stop, BLOCK)]
        return np.concatenate(blocks, axis=1)[:, : stop - start].astype(np.float32)

    def _block(self, name: str, n: int, index: int) -> Array:
        """uint16 [n, BLOCK]"""
        key = (name, n, index)
        if key not in self._kept:
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), n, index])
            drawn = rng.integers(0, n, size=(BLOCK, n)) + n * np.arange(BLOCK)[:, None]
            block = np.bincount(drawn.ravel(), minlength=n * BLOCK).reshape(BLOCK, n).T.astype(np.uint16)
            if self._bytes + block.nbytes > KEPT_BYTES:
                return block
            self._kept[key] = block
            self._bytes += block.nbytes
        return self._kept[key]

    def of_seeds(self, n: int) -> Array:
        """Shares [n, count] of `n` seeds drawn with replacement; every column sums to 1."""
        rng = np.random.default_rng([self.seed, zlib.crc32(b"seeds"), n])
        return rng.multinomial(n, np.full(n, 1 / n), size=self.count).T / n


class Classification:
    """One model's predictions on the ID images, for all resamples: vectors [N] as `classification.PerImage` has
    them (for each image how many classes stand before the true one, the confidence, the NLL and the Brier score)."""

    def __init__(
        self, rank: Array, confidence: Array, nll: Array, brier: Array, *, n_bins: int, wanted: Collection[str]
    ):
        columns = {"top1": rank == 0, "top5": rank < 5, "nll": nll, "brier": brier}
        self.means = {name: values for name, values in columns.items() if name in wanted}
        self.gaps: Array | None = None
        if "ece" in wanted:
            gap = (rank == 0) - confidence
            self.gaps = np.where(equal_width_bins(confidence, n_bins) == np.arange(n_bins)[:, None], gap, 0.0)

    def of(self, drawn: Array) -> dict[str, Array]:
        """{metric: [resamples]} for counts [N, resamples]."""
        found: dict[str, Array] = {}
        if self.means:
            table = np.array(list(self.means.values()), dtype=drawn.dtype)
            found |= dict(zip(self.means, table @ drawn / len(drawn), strict=True))
        if self.gaps is not None:
            found["ece"] = np.abs(self.gaps.astype(drawn.dtype) @ drawn).sum(axis=0) / len(drawn)
        return found


@dataclass(frozen=True)
class _Places:
    """Where the U distinct scores of an OOD set, and the G distinct ones of the ID images, stand among each other."""

    order: Array
    starts: Array
    below: Array
    """[U] ID images with a lower score"""
    upto: Array
    """[U] ID images with a lower or the same score"""
    ood_below: Array
    """[G] distinct OOD scores that are lower"""


class Ranking:
    """One score on the ID images [N] and on those of every OOD set [M], sorted once for all resamples."""

    def __init__(self, ids: Array, oods: Mapping[str, Array]):
        self.order, ids = _sorted(ids)
        self.starts = _starts(ids)
        self.places = {}
        for name, values in oods.items():
            order, ranked = _sorted(values)
            starts = _starts(ranked)
            distinct = ranked[starts]
            below, upto = (np.searchsorted(ids, distinct, side) for side in ("left", "right"))
            self.places[name] = _Places(order, starts, below, upto, np.searchsorted(distinct, ids[self.starts]))

    def of(self, counts: Mapping[str, Array], wanted: Collection[str]) -> dict[str, dict[str, Array]]:
        """{set: {metric: [resamples]}} for counts [images, resamples] of every set, `ID` among them."""
        taken = _running(counts[ID][self.order])
        n = counts[ID].shape[0]
        threshold = _last(taken, self.starts, n / 20, inclusive=True) if "fpr95_id" in wanted else None
        found = {}
        for name, places in self.places.items():
            drawn = counts[name][places.order]
            m = drawn.shape[0]
            if places.starts.size < m:
                drawn = np.add.reduceat(drawn, places.starts, axis=0)
            caught = _running(drawn)
            metrics: dict[str, Array] = {}
            if "aupr_out" in wanted:
                true = caught[1:]
                precision = true / np.maximum(true + taken[places.upto], 1)
                metrics["aupr_out"] = np.einsum("ur,ur->r", drawn, precision) / m
            if "auroc" in wanted:
                above = n - (taken[places.below] + taken[places.upto]) / 2
                metrics["auroc"] = np.einsum("ur,ur->r", drawn, above) / (n * m)
            columns = np.arange(drawn.shape[1])
            if threshold is not None:
                metrics["fpr95_id"] = 1 - caught[places.ood_below[threshold], columns] / m
            if "fpr95_ood" in wanted:
                last = _last(caught, np.arange(len(caught) - 1), 19 * m / 20, inclusive=False)
                metrics["fpr95_ood"] = taken[places.upto[last], columns] / n
            found[name] = metrics
        return found


def _sorted(values: Array) -> tuple[Array, Array]:
    order = np.argsort(values, kind="stable")
    return order, values[order]


def _starts(ranked: Array) -> Array:
    """Where each distinct value of sorted values begins."""
    return np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))


def _running(counts: Array, block: int = 32) -> Array:
    """Running sums [n + 1, R] down the rows of counts [n, R], from a row of zeros.

    Sums within blocks of rows are a product with a triangle of ones, which is five times as fast as numpy's cumsum down
    columns. Counts are whole numbers below 2^24, so that float32 sums are exact in any order.
    """
    n, r = counts.shape
    padded = -(-n // block) * block
    rows = counts
    if padded > n:
        rows = np.zeros((padded, r), counts.dtype)
        rows[:n] = counts
    sums = np.empty((padded + 1, r), counts.dtype)
    sums[0] = 0
    body = sums[1:].reshape(-1, block, r)
    np.matmul(np.tri(block, dtype=counts.dtype), rows.reshape(-1, block, r), out=body)
    body[1:] += np.cumsum(body[:-1, -1], axis=0)[:, None]
    return sums[: n + 1]


def _last(sums: Array, rows: Array, limit: float, *, inclusive: bool) -> Array:
    """For every column of rising sums [., R]: the last of `rows` at which the sum is still below `limit` (or equal to
    it, if inclusive), by bisection. The first of `rows` counts always. int64 [R], positions in `rows`."""
    columns = np.arange(sums.shape[1])
    low = np.zeros(columns.size, np.int64)
    high = np.full(columns.size, rows.size)
    while (open_ := high - low > 1).any():
        middle = (low + high) // 2
        value = sums[rows[np.minimum(middle, rows.size - 1)], columns]
        below = value <= limit if inclusive else value < limit
        low, high = np.where(open_ & below, middle, low), np.where(open_ & ~below, middle, high)
    return low


# ---- differences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A percentile interval and a two-sided p-value of "the difference is 0"."""

    low: float
    high: float
    p: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def differences(pairs: Sequence[tuple[Array, Array]], resamples: Resamples) -> Array:
    """The mean over seeds of second less first, on every resample [R].

    `pairs` holds a metric's resamples ([R], [R]) for every seed. With several of them the seeds are drawn with
    replacement too, beside the images and independently of them, as seeds and images are crossed (every seed sees the
    same images: the pigeonhole bootstrap of Owen, Annals of Applied Statistics 1(2), 2007).
    """
    rows = np.stack([second - first for first, second in pairs])
    if len(pairs) == 1:
        return rows[0]
    return np.einsum("pr,pr->r", rows, resamples.of_seeds(len(pairs)))


def interval(drawn: Array, level: float = 0.95) -> Interval:
    """The central share `level` of resampled differences [R], and p = 2 min(P(d <= 0), P(d >= 0)), at most 1, where
    both shares count one more resample than was drawn, so that p is never 0."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return Interval(float(low), float(high), min(1.0, 2 * (tail + 1) / (drawn.size + 1)))


def simultaneous_intervals(values: Array, seed: int = 0, level: float = 0.95, resamples: int = 2000) -> Array:
    """Intervals [K, 2] that hold the true means of all columns of values [N, K] at once with probability `level`.

    The largest studentized deviation of a resample decides their width (Efron and Tibshirani, 1993, chapter 12; Romano
    and Wolf, Econometrica 73, 2005, for many columns). A column without spread is taken to have one odd image.
    """
    n = len(values)
    mean, error = values.mean(axis=0), np.maximum(values.std(axis=0) / np.sqrt(n), 1 / n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) @ values / n
    largest = np.quantile(np.abs((drawn - mean) / error).max(axis=1), level)
    width = max(largest, norm.ppf((1 + level) / 2)) * error
    return np.stack([mean - width, mean + width], axis=1)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number: the step-down of Holm, Scandinavian Journal of Statistics 6, 1979."""
    ordered = sorted(p, key=lambda name: p[name])
    raised = np.maximum.accumulate([p[name] * (len(p) - i) for i, name in enumerate(ordered)])
    return {name: min(1.0, float(value)) for name, value in zip(ordered, raised, strict=True)}
