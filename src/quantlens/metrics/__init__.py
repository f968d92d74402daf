"""Classification, calibration and OOD detection figures of arrays. Knows nothing of models."""

from quantlens.metrics.classification import calibration_error, classification_figures, reliability
from quantlens.metrics.ood import delta, mean_over_sets, ood_figures, score_histograms
from quantlens.metrics.ood_scores import (
    FitData,
    ScoreInfo,
    Scorer,
    available_scores,
    make_scorer,
    register_score,
    score_label,
)

__all__ = [
    "FitData",
    "ScoreInfo",
    "Scorer",
    "available_scores",
    "calibration_error",
    "classification_figures",
    "delta",
    "make_scorer",
    "mean_over_sets",
    "ood_figures",
    "register_score",
    "reliability",
    "score_histograms",
    "score_label",
]
