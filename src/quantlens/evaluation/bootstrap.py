"""The metrics of per-image outputs under resampling of the images, by their path in a result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from quantlens.evaluation.outputs import Outputs
from quantlens.metrics import names_of
from quantlens.metrics.bootstrap import ID, Array, Resamples, classification, ranking

ID_METRICS = names_of("classification", resampled=True)
OOD_METRICS = names_of("ood", resampled=True)


@dataclass(frozen=True)
class Wanted:
    """Which metrics are resampled: OOD sets and scores by name, and metrics among ID_METRICS and OOD_METRICS."""

    sets: Sequence[str]
    scores: Sequence[str]
    metrics: Collection[str] = (*ID_METRICS, *OOD_METRICS)


def point(outputs: Outputs, wanted: Wanted) -> dict[str, float]:
    """The metrics on the images themselves, by their path in a result ("id.top1", "ood.textures.msp.auroc", …)."""
    once = {name: np.ones((n, 1)) for name, n in _sizes(outputs, wanted.sets).items()}
    return {path: float(values[0]) for path, values in _metrics(outputs, wanted, once).items()}


def replicate(outputs: Outputs, wanted: Wanted, resamples: Resamples) -> dict[str, Array]:
    """The metrics on every resample: path -> float64 [resamples]."""
    found: dict[str, Array] = {}
    # the products are small: several threads would wait for each other most of the time
    with threadpool_limits(limits=1, user_api="blas"):
        for part, counts in resamples.chunks(_sizes(outputs, wanted.sets)):
            for path, values in _metrics(outputs, wanted, counts).items():
                found.setdefault(path, np.empty(resamples.count))[part] = values
    return found


def _sizes(outputs: Outputs, sets: Sequence[str]) -> dict[str, int]:
    """Images by set, the ID images first."""
    return {ID: outputs.labels.size, **{s: next(iter(outputs.ood_scores[s].values())).size for s in sets}}


def _metrics(outputs: Outputs, wanted: Wanted, counts: Mapping[str, Array]) -> dict[str, Array]:
    """Path -> [resamples] for counts [images, resamples] of every set."""
    vectors = (outputs.rank, outputs.confidence, outputs.nll, outputs.brier)
    n_bins = int(outputs.about["n_bins"])
    metrics = classification(*vectors, counts[ID], n_bins=n_bins, wanted=wanted.metrics)
    found = {f"id.{name}": metrics[name] for name in ID_METRICS if name in metrics}
    groups = {
        group: [s for s in wanted.sets if group in ("all", outputs.groups[s])] for group in ("far", "near", "all")
    }
    for score in wanted.scores if wanted.sets else ():
        oods = {s: outputs.ood_scores[s][score] for s in wanted.sets}
        by_set = ranking(outputs.id_scores[score], oods, counts, wanted.metrics)
        for name, metrics in by_set.items():
            found |= {f"ood.{name}.{score}.{metric}": values for metric, values in metrics.items()}
        for group, members in groups.items():
            for metric in by_set[members[0]] if members else ():
                mean = sum(by_set[name][metric] for name in members) / len(members)
                found[f"ood_mean.{group}.{score}.{metric}"] = np.asarray(mean)
    return found
