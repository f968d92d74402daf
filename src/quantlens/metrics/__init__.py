"""Arrays → numbers: classification, calibration error, OOD detection, statistics. Knows nothing of models.

`METRICS` says what each metric is called, its unit, and which direction is better.
"""

from quantlens.metrics.classification import calibration_error, classification_figures, reliability
from quantlens.metrics.ood import change, delta, mean_over_sets, ood_figures, score_histograms
from quantlens.metrics.ood_scores import (
    FitData,
    ScoreInfo,
    Scorer,
    available_scores,
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
    "classification_figures",
    "delta",
    "make_scorer",
    "mean_over_sets",
    "metric_of",
    "names_of",
    "ood_figures",
    "register_score",
    "reliability",
    "score_histograms",
    "score_label",
]
