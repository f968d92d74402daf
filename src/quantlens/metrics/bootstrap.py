"""Metrics under resampling of the images, all resamples at once (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapters 13 and 16).

A resample draws as many images as a set has, with replacement. It is held as counts: a matrix [images, resamples] that
says how often each image was drawn. Means over images are matrix products with it. Metrics of a ranking (AUPR, AUROC,
FPR@95) come from the images sorted by score once, and running sums of the counts in that order; equal scores are one
threshold, as in `metrics.ood`.

The counts depend on the name and the size of a set, on the seed, and on nothing else: two models that are measured on
the same images are therefore resampled in the same way, which is what makes the comparison a paired one.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from quantlens.metrics.classification import equal_width_bins

Array = NDArray[Any]
Key = TypeVar("Key")

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

    def chunks(self, sizes: Mapping[str, int]) -> Iterator[tuple[slice, dict[str, Array]]]:
        """(which resamples, {set: float32 counts [images, resamples]}) for sets of these sizes, `ID` among them."""
        step = BLOCK * max(1, CHUNK_ELEMENTS // (BLOCK * max(sizes.values())))
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            places = range(start // BLOCK, -(-stop // BLOCK))
            counts = {}
            for name, n in sizes.items():
                blocks = [self._block(name, n, index) for index in places]
                counts[name] = np.concatenate(blocks, axis=1)[:, : stop - start].astype(np.float32)
            yield slice(start, stop), counts

    def _block(self, name: str, n: int, index: int) -> Array:
        """uint16 [n, BLOCK]"""
        key = (name, n, index)
        if key in self._kept:
            return self._kept[key]
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), n, index])
        drawn = rng.integers(0, n, size=(BLOCK, n)) + n * np.arange(BLOCK)[:, None]
        block = np.bincount(drawn.ravel(), minlength=n * BLOCK).reshape(BLOCK, n).T.astype(np.uint16)
        if sum(kept.nbytes for kept in self._kept.values()) + block.nbytes <= KEPT_BYTES:
            self._kept[key] = block
        return block


def classification(
    rank: Array, confidence: Array, nll: Array, brier: Array, drawn: Array, *, n_bins: int, wanted: Collection[str]
) -> dict[str, Array]:
    """{metric: [resamples]} of ID images, for counts `drawn` [N, resamples]; vectors [N] as `classification.PerImage`
    has them."""
    columns = {"top1": rank == 0, "top5": rank < 5, "nll": nll, "brier": brier}
    columns = {name: values for name, values in columns.items() if name in wanted}
    found: dict[str, Array] = {}
    if columns:
        table = np.array(list(columns.values()), dtype=drawn.dtype)
        found |= dict(zip(columns, table @ drawn / len(drawn), strict=True))
    if "ece" in wanted:
        gap = (rank == 0) - confidence
        gaps = np.where(equal_width_bins(confidence, n_bins) == np.arange(n_bins)[:, None], gap, 0.0)
        found["ece"] = np.abs(gaps.astype(drawn.dtype) @ drawn).sum(axis=0) / len(drawn)
    return found


def ranking(
    ids: Array, oods: Mapping[str, Array], counts: Mapping[str, Array], wanted: Collection[str]
) -> dict[str, dict[str, Array]]:
    """{set: {metric: [resamples]}} of one score of the ID images [N] and of those of every OOD set [M], for counts
    [images, resamples] of every set, `ID` among them. Scores are sorted once for all resamples."""
    order, ids, starts = sorted_scores(ids)
    taken = running_sums(counts[ID][order])
    n = len(ids)
    found = {}
    for name, values in oods.items():
        order, ranked, distinct = sorted_scores(values)
        drawn = np.add.reduceat(counts[name][order], distinct, axis=0)  # [U, R] for U distinct scores
        m, columns = len(ranked), np.arange(drawn.shape[1])
        caught = running_sums(drawn)
        below, upto = (np.searchsorted(ids, ranked[distinct], side) for side in ("left", "right"))
        metrics: dict[str, Array] = {}
        if "aupr_out" in wanted:
            precision = caught[1:] / np.maximum(caught[1:] + taken[upto], 1)
            metrics["aupr_out"] = np.einsum("ur,ur->r", drawn, precision) / m
        if "auroc" in wanted:
            above = n - (taken[below] + taken[upto]) / 2
            metrics["auroc"] = np.einsum("ur,ur->r", drawn, above) / (n * m)
        if "fpr95_id" in wanted:  # the highest threshold below which at most 5 % of the ID images are
            threshold = np.maximum(np.count_nonzero(taken[starts] <= n / 20, axis=0) - 1, 0)
            lower = np.searchsorted(ranked[distinct], ids[starts])
            metrics["fpr95_id"] = 1 - caught[lower[threshold], columns] / m
        if "fpr95_ood" in wanted:  # the lowest threshold up to which at least 95 % of the OOD images are
            last = np.maximum(np.count_nonzero(caught[:-1] < 19 * m / 20, axis=0) - 1, 0)
            metrics["fpr95_ood"] = taken[upto[last], columns] / n
        found[name] = metrics
    return found


def sorted_scores(values: Array) -> tuple[Array, Array, Array]:
    """The order of scores, the scores in it, and where each distinct one of them begins."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    return order, ranked, np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))


def running_sums(counts: Array, block: int = 32) -> Array:
    """Running sums [n + 1, R] down the rows of counts [n, R], from a row of zeros.

    Sums within blocks of rows are a product with a triangle of ones, which is several times as fast as numpy's cumsum
    down columns. Counts are whole numbers below 2^24, so that float32 sums are exact in any order.
    """
    n, r = counts.shape
    rows = np.pad(counts, ((0, -n % block), (0, 0))).reshape(-1, block, r)
    sums = np.zeros((rows.shape[0] * block + 1, r), counts.dtype)
    blocks = sums[1:].reshape(rows.shape)
    np.matmul(np.tri(block, dtype=counts.dtype), rows, out=blocks)
    blocks[1:] += np.cumsum(blocks[:-1, -1], axis=0)[:, None]
    return sums[: n + 1]


# ---- differences -----------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
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
    n = len(rows)
    if n == 1:
        return rows[0]
    rng = np.random.default_rng([resamples.seed, zlib.crc32(b"seeds"), n])
    shares = rng.multinomial(n, np.full(n, 1 / n), size=resamples.count).T / n
    return np.einsum("pr,pr->r", rows, shares)


def interval(drawn: Array, level: float = 0.95) -> Interval:
    """The central share `level` of resampled differences [R], and p = 2 min(P(d <= 0), P(d >= 0)), at most 1, where
    both shares count one more resample than was drawn, so that p is never 0. Resamples that have no difference (NaN: a
    metric of a rare label, no image of which was drawn) are left out."""
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return Interval(float(low), float(high), min(1.0, 2 * (tail + 1) / (drawn.size + 1)))


def simultaneous_intervals(values: Array, drawn: Array, n: int, level: float = 0.95) -> Array:
    """Intervals [K, 2] that hold the true values of K metrics at once with probability `level`, from what was measured
    on n images [K] and on resamples of them [R, K].

    The largest studentized deviation of a resample decides their width (Efron and Tibshirani, 1993, chapter 12; Romano
    and Wolf, Econometrica 73, 2005, for many columns). A column without spread is taken to have one odd image, and
    resamples that lack a metric (NaN) are left out.
    """
    drawn = drawn[~np.isnan(drawn).any(axis=1)]
    spread = drawn.std(axis=0)
    error = np.where(spread > 0, spread, 1 / n)
    largest = np.quantile(np.abs((drawn - values) / error).max(axis=1), level)
    width = max(largest, norm.ppf((1 + level) / 2)) * error
    return np.stack([values - width, values + width], axis=1)


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """p-values corrected for their number: the step-down of Holm, Scandinavian Journal of Statistics 6, 1979."""
    ordered = sorted(p, key=lambda name: p[name])
    raised = np.maximum.accumulate([p[name] * (len(p) - i) for i, name in enumerate(ordered)])
    return {name: min(1.0, float(value)) for name, value in zip(ordered, raised, strict=True)}
