"""How well a model with a sigmoid per output does: binary classifiers (one output) and multi-label classifiers.

Logits z and labels y in {0, 1} are [N, L], one column per label; p = 1 / (1 + exp(-z)). A label is predicted where
p > 0.5. Metrics are fractions except NLL, which is in nats. Every metric here is computed for counts that say how often
each image was drawn, so that the bootstrap and the metric itself are one computation.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from quantlens.errors import QuantlensError
from quantlens.metrics._arrays import Float, as_matrix
from quantlens.metrics.bootstrap import Array
from quantlens.metrics.classification import calibration_error, equal_width_bins, reliability

BINARY = ("accuracy", "f1", "auroc", "average_precision", "nll", "ece", "brier")
MULTI_LABEL = ("accuracy", "exact_match", "f1", "f1_micro", "auroc", "map", "nll", "ece", "brier")
RANKED = {"auroc": "auroc", "average_precision": "average_precision", "map": "average_precision"}
"""Metrics of the order of the images: the mean over labels of which one of `label_ranking`."""


def multi_hot(labels: ArrayLike, n_images: int, n_labels: int, what: str = "labels") -> np.ndarray:
    """`labels` as bool [N, L]; 0, 1 for each of N images is taken for L = 1. QuantlensError, with `what` in the
    sentence, where they do not fit."""
    array = np.asarray(labels)
    if array.ndim == 1 and n_labels == 1:
        array = array[:, None]
    if array.shape != (n_images, n_labels):
        raise QuantlensError(
            f"the {what} have shape {array.shape}, and {n_images} images with {n_labels} outputs need "
            f"{(n_images, n_labels)}, 1 where a label holds and 0 where not"
        )
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise QuantlensError(f"the {what} hold other values than 0 and 1; give 1 where a label holds and 0 where not")
    return array.astype(bool)


def label_ranking(scores: Array, positive: Array, drawn: Array) -> dict[str, Array]:
    """{"auroc", "average_precision"} [R] of one label: scores [N], whether it holds [N], counts [N, R].

    Average precision is the step sum over distinct thresholds; for AUROC equal scores count one half. NaN where no
    image, or every image drawn has the label (average precision only where none has).
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    every = np.add.reduceat(drawn[order], starts, axis=0)
    hits = np.add.reduceat(drawn[order] * positive[order, None], starts, axis=0)  # [U, R] for U distinct scores
    taken, found = np.cumsum(every, axis=0), np.cumsum(hits, axis=0)
    positives, negatives = found[-1], taken[-1] - found[-1]
    below = negatives - (taken - found) + (every - hits) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "auroc": np.einsum("ur,ur->r", hits, below) / (positives * negatives),
            "average_precision": np.einsum("ur,ur->r", hits, found / np.maximum(taken, 1)) / positives,
        }


def resampled_labels(
    logits: Array, labels: Array, drawn: Array, *, n_bins: int, wanted: Collection[str]
) -> dict[str, Array]:
    """{metric: [R]} of logits [N, L] and labels [N, L] bool for counts [N, R]. See `label_metrics` for the metrics."""
    z, dtype, n = np.asarray(logits, dtype=np.float64), drawn.dtype, len(drawn)
    said, found = z > 0, {}
    per_image = {
        "accuracy": lambda: (said == labels).mean(axis=1),
        "exact_match": lambda: (said == labels).all(axis=1).astype(np.float64),
        "nll": lambda: _nll(z, labels).mean(axis=1),
        "brier": lambda: (_error(z, labels) ** 2).mean(axis=1),
    }
    for name in per_image.keys() & set(wanted):
        found[name] = per_image[name]().astype(dtype) @ drawn / n
    if "ece" in wanted:
        found["ece"] = np.abs(_gaps(z, labels, n_bins).astype(dtype) @ drawn).sum(axis=0) / z.size
    if {"f1", "f1_micro"} & set(wanted):
        hits, wrong = ((m.T.astype(dtype) @ drawn) for m in (said & labels, said != labels))  # [L, R]
        found["f1"] = _f1(hits, wrong).mean(axis=0)
        found["f1_micro"] = _f1(hits.sum(axis=0), wrong.sum(axis=0))
    if set(RANKED) & set(wanted):
        ranked = [label_ranking(z[:, k], labels[:, k], drawn) for k in range(z.shape[1])]
        for name in RANKED:
            found[name] = _mean_known(np.array([one[RANKED[name]] for one in ranked]))
    return {name: values for name, values in found.items() if name in wanted}


def label_metrics(
    logits: ArrayLike, labels: ArrayLike, *, n_bins: int = 15, label_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """All metrics of logits [N, L] against labels [N, L] (or [N] for L = 1), as plain Python values.

    - `n`, `num_labels`; `accuracy`: share of (image, label) pairs that are right; `exact_match`: share of images with
      all labels right; `f1`: mean over labels, `f1_micro`: of all pairs (0 where nothing is or should be found);
    - `auroc`, `map`: mean over labels of AUROC and of average precision. A label that no image has (for AUROC also one
      that all have) is left out; None where all are;
    - `nll`: binary cross-entropy, `brier`: (p - y)^2, means over pairs; `ece`, `ece_adaptive`: `calibration_error` of p
      against y over all pairs;
    - `per_label`: [{"label", "name", "n" (images that have it), "auroc", "average_precision", "brier", "accuracy",
      "f1"}]; `reliability`: see `reliability`, "accuracy" being the share that has the label.

    With L = 1, `average_precision` stands for `map`, and there is no `exact_match`, `f1_micro` or `per_label`, but
    `positives`. Raises QuantlensError: no image, logits not finite, labels of another shape or not 0 and 1.
    """
    z = as_matrix(logits, "logits").astype(np.float64)
    if not len(z):
        raise QuantlensError("there are no images to evaluate: the logits have 0 rows")
    y, one = multi_hot(labels, *z.shape), z.shape[1] == 1
    if label_names is not None and not one and len(label_names) != z.shape[1]:
        raise QuantlensError(f"there are {len(label_names)} names for {z.shape[1]} labels: give one per label, or none")
    wanted = BINARY if one else MULTI_LABEL
    once = np.ones((len(z), 1))
    found = resampled_labels(z, y, once, n_bins=n_bins, wanted=wanted)
    p, flat = expit(z).ravel(), y.ravel()
    more: dict[str, Any] = {"positives": int(y.sum())} if one else {"num_labels": z.shape[1]}
    return {
        "n": len(z),
        **more,
        **{name: _known(found[name][0]) for name in wanted},
        "ece_adaptive": calibration_error(p, flat, n_bins=n_bins, adaptive=True),
        **({} if one else {"per_label": _per_label(z, y, once, label_names)}),
        "reliability": reliability(p, flat, n_bins=n_bins),
    }


def _per_label(z: Float, y: np.ndarray, once: Array, names: Sequence[str] | None) -> list[dict[str, Any]]:
    right, brier = ((z > 0) == y).mean(axis=0), (_error(z, y) ** 2).mean(axis=0)
    f1 = _f1(((z > 0) & y).sum(axis=0), ((z > 0) != y).sum(axis=0))
    return [
        {
            "label": k,
            "name": None if names is None else str(names[k]),
            "n": int(y[:, k].sum()),
            **{name: _known(values[0]) for name, values in label_ranking(z[:, k], y[:, k], once).items()},
            "brier": float(brier[k]),
            "accuracy": float(right[k]),
            "f1": float(f1[k]),
        }
        for k in range(z.shape[1])
    ]


def _error(z: Float, y: np.ndarray) -> Float:
    """|p - y|, exact where p is near y."""
    return np.asarray(expit(np.where(y, -z, z)))


def _nll(z: Float, y: np.ndarray) -> Float:
    return np.logaddexp(0.0, np.where(y, -z, z))


def _gaps(z: Float, y: np.ndarray, n_bins: int) -> Float:
    """[n_bins, N]: the sum over an image's labels of y - p, by the bin of p."""
    p, n = expit(z), len(z)
    cell = equal_width_bins(p.ravel(), n_bins) * n + np.repeat(np.arange(n), z.shape[1])
    return np.bincount(cell, (y - p).ravel(), n_bins * n).reshape(n_bins, n).astype(np.float64)


def _f1(hits: Array, wrong: Array) -> Array:
    """2 TP / (2 TP + FP + FN), 0 where that is 0 / 0."""
    return 2 * hits / np.maximum(2 * hits + wrong, 1)


def _mean_known(values: Array) -> Array:
    """The mean of [L, R] over the labels whose value is known; NaN where none is."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
