"""How well a score tells in-distribution (ID) from out-of-distribution (OOD) images.

A score is larger for images that look more in-distribution; an image is flagged as OOD when its score falls
below a threshold. Quantized models give many equal scores, so every metric here treats equal scores as one: a
threshold takes all of them or none, and the order of the images never matters. Metrics are fractions, not
percent.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike

from quantlens.errors import QuantlensError
from quantlens.metrics._arrays import Float, Int, as_vector

COUNTS = frozenset({"n", "n_id", "n_ood", "n_sets", "skipped", "num_classes"})
"""Keys that hold a number of things: they have no change by quantization and no mean over sets."""


def ood_metrics(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, Any]:
    """Metrics of one score on ID and OOD images, `id_scores` [N] and `ood_scores` [M].

    - `aupr_out`, `aupr_in`: average precision with OOD, or ID, as the positive class. It is the step sum over
      distinct thresholds, sum (R_i - R_(i-1)) P_i, without interpolation. (OpenOOD takes the trapezoid area, which
      differs a little.)
    - `auroc`: probability that an ID image scores above an OOD image, equal scores counting one half.
    - `fpr95_id`: share of the OOD images accepted when at least 95 % of the ID images are kept (ID positive,
      as in ODIN: Liang, Li and Srikant, ICLR 2018).
    - `fpr95_ood`: share of the ID images flagged when at least 95 % of the OOD images are caught (OOD
      positive, as in OpenOOD and pytorch-ood). Both use the first threshold that reaches 95 %.
    - `chance_aupr_out`, `chance_aupr_in`: the AUPR of a constant score, M / (N + M) and N / (N + M).
    - `n_id`, `n_ood`.

    Raises QuantlensError for an empty set and for scores that are NaN or infinite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # late: it takes a second to import

    def other_at_95(positive: Int, scores: Float) -> float:
        """Share of the other images taken at the first threshold that takes at least 95 % of the positive ones."""
        other, taken, _ = roc_curve(positive, scores, drop_intermediate=False)
        return float(other[np.argmax(taken >= 0.95)])

    ins, outs = as_vector(id_scores, "ID scores"), as_vector(ood_scores, "OOD scores")
    n, m = ins.size, outs.size
    scores = np.concatenate([ins, outs])
    inside = np.repeat([1, 0], [n, m])
    return {
        "aupr_out": float(average_precision_score(1 - inside, -scores)),
        "aupr_in": float(average_precision_score(inside, scores)),
        "auroc": float(roc_auc_score(inside, scores)),
        "fpr95_id": other_at_95(inside, scores),
        "fpr95_ood": other_at_95(1 - inside, -scores),
        "chance_aupr_out": m / (n + m),
        "chance_aupr_in": n / (n + m),
        "n_id": n,
        "n_ood": m,
    }


def threshold_keeping(scores: ArrayLike, share: float) -> float:
    """The largest threshold that keeps at least the share `share` (above 0, at most 1) of these scores [N].

    A score is kept where it reaches the threshold (score >= threshold). The threshold is one of the scores: nothing is
    interpolated, so that the promise holds on the images that it was set on. Equal scores are kept together: without
    ties ceil(share · N) are kept, with ties perhaps more, never fewer.
    Raises QuantlensError for a share out of range, no scores, and scores that are NaN or infinite.
    """
    values = as_vector(scores, "scores")
    if not 0 < share <= 1:
        raise QuantlensError(f"the share to keep is {share!r}; give a number above 0 and at most 1, such as 0.95")
    k = least_kept(values.size, share)
    return float(np.partition(values, -k)[-k])


def least_kept(n: int, share: float) -> int:
    """The least number of n images that is at least the share of them."""
    counts = np.arange(1, n + 1)
    return int(np.argmax(counts / n >= share)) + 1  # a quotient, as share · n may round up: 0.07 · 100 > 7


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def change(value: Mapping[str, Any], fp32: Mapping[str, Any]) -> dict[str, Any]:
    """What quantization changed: each metric of a quantized model less the same metric at FP32, in the same nesting.

    Kept are the numbers that both sides have. Left out are counts (see COUNTS), names, None, lists (per-class
    tables, reliability data) and branches in which nothing is left.
    """
    out: dict[str, Any] = {}
    for key, before in fp32.items():
        after = value.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            branch = change(after, before)
            if branch:
                out[key] = branch
        elif key not in COUNTS and _is_number(before) and _is_number(after):
            out[key] = float(after) - float(before)
    return out


def opposite_change(fp32: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """`change` with the opposite sign (FP32 - quantized), as `delta` of earlier releases gave it."""
    return change(fp32, value)


def mean_over_sets(ood: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean of each metric over the OOD sets of a group, every set weighing the same.

    `ood` is {set: {"group": "far" | "near" | None, score: metrics, …}} as in a result; entries of a set that are not a
    dict are passed over. Returns {group: {score: {metric: mean, …, "n_sets": int}}} for every group that has a set, and
    "all" for all sets together (also those without a group). Counts are left out; `n_sets` says how many sets the mean
    is over.
    """
    groups = dict.fromkeys(str(entry["group"]) for entry in ood.values() if entry.get("group") is not None)
    means: dict[str, dict[str, dict[str, Any]]] = {}
    for group in (*groups, "all"):
        collected: dict[str, list[Mapping[str, Any]]] = {}
        for entry in ood.values():
            for score, metrics in entry.items():
                if isinstance(metrics, Mapping) and group in (entry.get("group"), "all"):
                    collected.setdefault(score, []).append(metrics)
        if collected:
            means[group] = {score: _mean_metrics(rows) for score, rows in collected.items()}
    return means


def _mean_metrics(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    names = [key for key in rows[0] if key not in COUNTS and all(_is_number(row.get(key)) for row in rows)]
    mean: dict[str, Any] = {key: float(np.mean([row[key] for row in rows])) for key in names}
    return {**mean, "n_sets": len(rows)}


def score_histograms(id_scores: ArrayLike, ood: Mapping[str, ArrayLike], bins: int = 40) -> dict[str, Any]:
    """Histograms of ID scores [N] and of each OOD set's scores on common edges, to be drawn over each other.

    Returns {"edges": [bins + 1], "id": [bins], "ood": {name: [bins]}}; counts, so each list sums to its
    number of images. Edges are equally wide from the smallest to the largest score. Where these are equal, or
    too close for `bins` distinct edges in float64, the range is widened about its middle. Raises as
    `ood_metrics`.
    """
    ins = as_vector(id_scores, "ID scores")
    outs = {name: as_vector(scores, f"scores of OOD set {name!r}") for name, scores in ood.items()}
    low = min(float(v.min()) for v in (ins, *outs.values()))
    high = max(float(v.max()) for v in (ins, *outs.values()))
    narrowest = max(abs(low), abs(high), 1.0) * 1e-9
    if high - low < narrowest:
        middle = low + (high - low) / 2
        half = max(0.5, narrowest) if high == low else narrowest
        low, high = middle - half, middle + half
    edges = np.linspace(low, high, bins + 1)
    return {
        "edges": edges.tolist(),
        "id": np.histogram(ins, edges)[0].tolist(),
        "ood": {name: np.histogram(v, edges)[0].tolist() for name, v in outs.items()},
    }
