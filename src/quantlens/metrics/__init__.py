"""Arrays → numbers: classification, calibration error, OOD detection, statistics. Knows nothing of models.

`METRICS` says what each metric is called, its unit, and which direction is better.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from quantlens.metrics.classification import calibration_error, classification_metrics, reliability
from quantlens.metrics.ood import change, mean_over_sets, ood_metrics, score_histograms
from quantlens.metrics.ood_scores import (
    FitData,
    ScoreInfo,
    Scorer,
    available_scores,
    choose_scores,
    make_scorer,
    register_score,
    score_label,
)
from quantlens.metrics.registry import METRICS, Metric, metric_of, names_of
from quantlens.metrics.spread import Spread

__all__ = [
    "METRICS",
    "FitData",
    "Metric",
    "ScoreInfo",
    "Scorer",
    "Spread",
    "available_scores",
    "calibration_error",
    "change",
    "choose_scores",
    "classification_metrics",
    "make_scorer",
    "mean_over_sets",
    "metric_of",
    "names_of",
    "ood_metrics",
    "register_score",
    "reliability",
    "score_histograms",
    "score_label",
]


def _delta(fp32: Mapping[str, Any], quantized: Mapping[str, Any]) -> dict[str, Any]:
    """`change` with the opposite sign."""
    return change(fp32, quantized)


_RENAMED = {
    "classification_figures": (classification_metrics, "classification_metrics"),
    "ood_figures": (ood_metrics, "ood_metrics"),
    "delta": (_delta, "change, with the opposite sign (quantized - FP32) and the quantized metrics first"),
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found, now = _RENAMED[name]
    message = f"quantlens.metrics.{name} is {now} now; quantlens 0.4 drops the old name"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return found
