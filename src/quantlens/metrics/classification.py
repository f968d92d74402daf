"""How well a classifier does on in-distribution images: accuracy, likelihood, calibration.

All metrics are fractions (not percent) except NLL, which is in nats. Ties between logits, which quantized
models give, go to the lower class number everywhere, as `argmax` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import softmax

from quantlens.errors import QuantlensError
from quantlens.metrics._arrays import Float, Int, as_labels, as_matrix, as_vector, log_softmax, per_row, row_blocks


@dataclass(frozen=True)
class PerImage:
    """What the metrics need of each image; every field is a vector [N]."""

    predicted: Int
    """the class of the largest logit"""
    rank: Int
    """how many classes stand before the true one (0: the prediction is right)"""
    confidence: Float
    """largest softmax probability"""
    nll: Float
    """-log p of the true class, nats"""
    brier: Float
    """sum over classes of (p_k - [k is the true class])^2, 0 to 2"""


def per_image(logits: ArrayLike, labels: ArrayLike) -> PerImage:
    """Reduce logits [N, K] and labels [N] to vectors [N], in float64, a block of rows at a time.

    Raises QuantlensError: no image, logits that are not finite, labels outside 0..K-1 or of another length.
    """
    f = as_matrix(logits, "logits")
    n, k = f.shape
    if n == 0:
        raise QuantlensError("there are no images to evaluate: the logits have 0 rows")
    y = as_labels(labels, n, k)
    classes = np.arange(k)

    def reduced(rows: slice) -> tuple[np.ndarray, ...]:
        block, true = f[rows], y[rows, None]
        own = np.take_along_axis(block, true, axis=1)
        before = (block > own) | ((block == own) & (classes < true))
        log_p = log_softmax(block)
        log_p_true = np.take_along_axis(log_p, true, axis=1)
        p = np.exp(log_p)
        confidence = p.max(axis=1)
        error = -np.expm1(log_p_true)  # 1 - p_true, exact where p_true is near 1
        np.put_along_axis(p, true, error, axis=1)
        brier = np.einsum("nk,nk->n", p, p)
        return block.argmax(axis=1), before.sum(axis=1), confidence, -log_p_true[:, 0], brier

    blocks = [reduced(rows) for rows in row_blocks(n, k)]
    return PerImage(*(np.concatenate(vectors) for vectors in zip(*blocks, strict=True)))


def equal_width_bins(confidence: Float, n_bins: int) -> Int:
    """Bin of each confidence [N]: bin i holds (i/n_bins, (i+1)/n_bins], as in Guo et al., ICML 2017."""
    inner_edges = np.linspace(0.0, 1.0, n_bins + 1)[1:-1]
    return np.searchsorted(inner_edges, confidence, side="left").astype(np.int64)


def equal_mass_bins(confidence: Float, n_bins: int) -> Int:
    """Bin of each confidence [N] so that bins hold equally many images; equal confidences share a bin.

    An image at mid-rank r (0 < r < N, the mean over its ties) goes to bin floor(n_bins * r / N). Without ties
    the bins differ by at most one image; with ties the outcome does not depend on the order of the images,
    which cutting a sorted list into equal pieces would.
    """
    _, group, count = np.unique(confidence, return_inverse=True, return_counts=True)
    end = np.cumsum(count)
    twice_mid_rank = 2 * end - count
    return (n_bins * twice_mid_rank // (2 * confidence.size)).astype(np.int64)[group]


def calibration_error(confidence: ArrayLike, correct: ArrayLike, *, n_bins: int = 15, adaptive: bool = False) -> float:
    """Expected calibration error: sum over bins of n_b / N * |accuracy_b - mean confidence_b|.

    `confidence` [N] in 0..1, `correct` [N] 0 or 1. With `adaptive` the bins hold equally many images (Nguyen
    and O'Connor, EMNLP 2015; Mukhoti et al., NeurIPS 2020), else they are equally wide (Naeini et al., AAAI
    2015; Guo et al., ICML 2017). Raises QuantlensError: no image, values out of range, fewer than one bin.
    """
    c, hit = _checked_confidence(confidence, correct, n_bins)
    bins = equal_mass_bins(c, n_bins) if adaptive else equal_width_bins(c, n_bins)
    return float(np.abs(np.bincount(bins, hit - c, n_bins)).sum() / c.size)


def reliability(confidence: ArrayLike, correct: ArrayLike, *, n_bins: int = 15) -> dict[str, list[Any]]:
    """Data of a reliability diagram with equal-width bins: `edges` [n_bins + 1], `count`, `confidence` and
    `accuracy` [n_bins]; the last two are None in an empty bin. Raises as `calibration_error`.
    """
    c, hit = _checked_confidence(confidence, correct, n_bins)
    bins = equal_width_bins(c, n_bins)
    count = np.bincount(bins, minlength=n_bins)
    filled = np.maximum(count, 1)
    mean_confidence = np.bincount(bins, c, n_bins) / filled
    accuracy = np.bincount(bins, hit, n_bins) / filled
    return {
        "edges": np.linspace(0.0, 1.0, n_bins + 1).tolist(),
        "count": count.tolist(),
        "confidence": [v if n else None for v, n in zip(mean_confidence.tolist(), count, strict=True)],
        "accuracy": [v if n else None for v, n in zip(accuracy.tolist(), count, strict=True)],
    }


MOST_BINS = 1_000_000


def _checked_confidence(confidence: ArrayLike, correct: ArrayLike, n_bins: int) -> tuple[Float, Float]:
    if isinstance(n_bins, bool) or not isinstance(n_bins, int | np.integer) or not 1 <= n_bins <= MOST_BINS:
        raise QuantlensError(f"n_bins is {n_bins!r}, but must be a whole number from 1 to {MOST_BINS}")
    c = as_vector(confidence, "confidences")
    hit = as_vector(np.asarray(correct, dtype=np.float64), "correctness flags")
    if hit.shape != c.shape:
        raise QuantlensError(f"there are {hit.size} correctness flags for {c.size} confidences")
    if c.min() < 0 or c.max() > 1:
        raise QuantlensError(f"confidences must lie in 0..1, but reach from {c.min():g} to {c.max():g}")
    return c, hit


TEMPERATURES = 0.01, 100.0
"""Between which a temperature is looked for: without a wrong answer among the fit images the best one is 0."""


def temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The T that gives softmax(f / T) the least negative log-likelihood of the labels. logits [N, K], labels [N].

    Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017. The likelihood is convex in
    1 / T; its slope is brought to 0 between :data:`TEMPERATURES`, whose nearer end is taken where it has no zero.
    Without labels there is nothing to fit: the predicted classes for labels would have T = 0, the softmax T = 1.
    """
    f = as_matrix(logits, "logits")
    true = np.take_along_axis(f, as_labels(labels, *f.shape)[:, None], axis=1)[:, 0].astype(np.float64)
    true -= f.max(axis=1)

    def slope(log_t: float) -> float:
        def expected(block: Float) -> Float:
            block -= block.max(axis=1, keepdims=True)
            return np.einsum("nk,nk->n", softmax(block / np.exp(log_t), axis=1), block)

        return float((per_row(f, expected) - true).mean())

    ends = np.log(TEMPERATURES)
    cold, warm = map(slope, ends)  # it falls with the temperature
    if cold <= 0 or warm >= 0:
        return TEMPERATURES[0 if cold <= 0 else 1]
    return float(np.exp(brentq(slope, *ends, xtol=1e-9)))


def temperature_metrics(logits: ArrayLike, labels: ArrayLike, t: float, n_bins: int = 15) -> dict[str, float]:
    """`temperature`, that `t` which was fitted on other images, and `ece_temperature`, the `calibration_error` of the
    logits divided by it."""
    f = as_matrix(logits, "logits")
    confidence = per_row(f, lambda block: np.exp(log_softmax(block / t).max(axis=1)))
    correct = f.argmax(axis=1) == as_labels(labels, *f.shape)
    return {"temperature": t, "ece_temperature": calibration_error(confidence, correct, n_bins=n_bins)}


def classification_metrics(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    n_bins: int = 15,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All classification metrics of logits [N, K] against labels [N] (class numbers 0..K-1), as plain Python
    values.

    Keys:
    - `n`; `top1`, `top5` (share of images whose true class is among the 1, 5 largest logits; `top5` is 1 if K
      <= 5);
    - `nll`: mean -log softmax of the true class, nats;
    - `ece`, `ece_adaptive`: `calibration_error` of the top-1 confidence with `n_bins` bins;
    - `brier`: mean over images of the sum over classes of (p_k - y_k)^2 (Brier, 1950; 0 to 2, not halved);
    - `per_class`: [{"class", "name", "n", "top1"}] of the classes that have images, in order of class number;
      `name` is None without `class_names` (a sequence of K names);
    - `reliability`: see `reliability`.

    Raises QuantlensError: no image, logits not finite, labels outside 0..K-1 or of another length than the
    logits, K names expected and another number given.
    """
    images = per_image(logits, labels)
    y = np.asarray(labels).astype(np.int64)
    k = np.shape(logits)[1]
    if class_names is not None and len(class_names) != k:
        raise QuantlensError(f"there are {len(class_names)} class names for {k} classes: give one per class, or none")
    correct = images.rank == 0
    count = np.bincount(y, minlength=k)
    hits = np.bincount(y[correct], minlength=k)
    present = np.flatnonzero(count)
    return {
        "n": int(y.size),
        "top1": float(correct.mean()),
        "top5": float((images.rank < 5).mean()),
        "nll": float(images.nll.mean()),
        "ece": calibration_error(images.confidence, correct, n_bins=n_bins),
        "ece_adaptive": calibration_error(images.confidence, correct, n_bins=n_bins, adaptive=True),
        "brier": float(images.brier.mean()),
        "per_class": [
            {
                "class": c,
                "name": None if class_names is None else str(class_names[c]),
                "n": int(count[c]),
                "top1": float(hits[c] / count[c]),
            }
            for c in present.tolist()
        ],
        "reliability": reliability(images.confidence, correct, n_bins=n_bins),
    }
