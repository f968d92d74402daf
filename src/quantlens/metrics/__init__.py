"""Arrays → numbers: classification, detection, calibration error, OOD detection, statistics. Knows nothing of models.

`METRICS` says what each metric is called, its unit, and which direction is better.
"""

from quantlens._moved import finder
from quantlens.metrics.classification import (
    calibration_error,
    classification_metrics,
    reliability,
    temperature,
    temperature_metrics,
)
from quantlens.metrics.detection import Boxes, Detections, box_drift, detection_metrics
from quantlens.metrics.embeddings import cosines, knn_classes, linear_cka, linear_classes, similarity
from quantlens.metrics.labels import label_metrics
from quantlens.metrics.ood import change, mean_over_sets, ood_metrics, score_histograms, threshold_keeping
from quantlens.metrics.ood_scores import (
    FitData,
    ScoreInfo,
    Scorer,
    available_scores,
    choose_scores,
    first_score,
    make_scorer,
    register_score,
    score_label,
)
from quantlens.metrics.registry import (
    METRICS,
    TASKS,
    Metric,
    Spread,
    metric_of,
    metrics_of,
    names_of,
    number,
    summary_of,
)

__all__ = [
    "METRICS",
    "TASKS",
    "Boxes",
    "Detections",
    "FitData",
    "Metric",
    "ScoreInfo",
    "Scorer",
    "Spread",
    "available_scores",
    "box_drift",
    "calibration_error",
    "change",
    "choose_scores",
    "classification_metrics",
    "cosines",
    "detection_metrics",
    "first_score",
    "knn_classes",
    "label_metrics",
    "linear_cka",
    "linear_classes",
    "make_scorer",
    "mean_over_sets",
    "metric_of",
    "metrics_of",
    "names_of",
    "number",
    "ood_metrics",
    "register_score",
    "reliability",
    "score_histograms",
    "score_label",
    "similarity",
    "summary_of",
    "temperature",
    "temperature_metrics",
    "threshold_keeping",
]


__getattr__ = finder(__name__)
