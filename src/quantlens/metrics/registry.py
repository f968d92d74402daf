"""Every metric by its key in a result: what it is called, its unit, and which direction is better. Whatever shows a
metric (a table, a plot, a comparison, a page of the docs) asks here. And the spread of one over seeds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Metric:
    """A metric as people read it.

    name: its key in a result. title: without the unit. unit: "%" means that the value is a fraction and is shown times
    100, its changes in points. direction: which is better, None where neither is. family: what it belongs to; also:
    other families that have it. digits: decimals in a table. resampled: whether the bootstrap gives it an interval.
    """

    name: str
    title: str
    unit: str = ""
    direction: Direction = None
    family: str = ""
    digits: int = 3
    resampled: bool = False
    also: tuple[str, ...] = ()

    @property
    def percent(self) -> bool:
        """Whether its values are fractions that are shown as percentages."""
        return self.unit == "%"

    @property
    def factor(self) -> float:
        """What a value is multiplied with to be shown."""
        return 100.0 if self.percent else 1.0

    @property
    def sign(self) -> int:
        """+1 where higher is better, -1 where lower is, 0 where neither is."""
        return {"higher": 1, "lower": -1}.get(self.direction or "", 0)

    @property
    def arrow(self) -> str:
        """ "↑" where higher is better, "↓" where lower is, "" where neither is."""
        return {"higher": "↑", "lower": "↓"}.get(self.direction or "", "")

    @property
    def label(self) -> str:
        """Title and unit: "top-1 %". Nats are not written, as every quantity of information is in them."""
        return f"{self.title} {self.unit}" if self.unit not in ("", "nats") else self.title

    @property
    def heading(self) -> str:
        """The label with the better direction: "top-1 % ↑"."""
        return f"{self.label} {self.arrow}".rstrip()

    @property
    def change_unit(self) -> str:
        """The unit of a difference: "points" of percentages."""
        return "points" if self.percent else self.unit

    def text(self, value: Any, sign: str = "") -> str:
        """A value as it is shown, without its unit; "–" for None. sign: "+" for a difference."""
        return "–" if value is None else f"{value * self.factor:{sign}.{self.digits}f}"


def _percent(
    name: str, title: str, direction: Direction, family: str, resampled: bool = False, also: tuple[str, ...] = ()
) -> Metric:
    return Metric(name, title, "%", direction, family, digits=2, resampled=resampled, also=also)


_SIGMOID = ("binary", "multilabel")

_ALL = (
    _percent("top1", "top-1", "higher", "classification", True),
    _percent("top5", "top-5", "higher", "classification", True),
    _percent("average_precision", "average precision", "higher", "binary", True),
    _percent("map", "mAP", "higher", "multilabel", True, ("detection",)),
    _percent("map50", "mAP@.5", "higher", "detection", True),
    _percent("map75", "mAP@.75", "higher", "detection", True),
    _percent("map_small", "mAP small", "higher", "detection", True),
    _percent("map_medium", "mAP medium", "higher", "detection", True),
    _percent("map_large", "mAP large", "higher", "detection", True),
    _percent("mar_1", "mAR@1", "higher", "detection", True),
    _percent("mar_10", "mAR@10", "higher", "detection", True),
    _percent("mar_100", "mAR@100", "higher", "detection", True),
    _percent("mar_small", "mAR small", "higher", "detection", True),
    _percent("mar_medium", "mAR medium", "higher", "detection", True),
    _percent("mar_large", "mAR large", "higher", "detection", True),
    _percent("d_ece", "D-ECE", "lower", "detection", True),
    Metric("oce", "OCE", "", "lower", "detection", resampled=True),
    Metric("matched_iou", "IoU with FP32's boxes", "", "higher", "detection", digits=4, resampled=True),
    _percent("lost", "detections lost", "lower", "detection", True),
    _percent("invented", "detections invented", "lower", "detection", True),
    Metric("score_drift", "score drift", "", None, "detection", digits=4, resampled=True),
    _percent("accuracy", "accuracy", "higher", "binary", True, ("multilabel",)),
    _percent("exact_match", "all labels right", "higher", "multilabel", True),
    _percent("f1", "F1", "higher", "binary", True, ("multilabel",)),
    _percent("f1_micro", "F1 of all pairs", "higher", "multilabel", True),
    _percent("knn1", "k-NN top-1", "higher", "features", True),
    _percent("linear1", "linear-probe top-1", "higher", "features", True),
    Metric("cosine", "cosine to FP32", "", "higher", "features", digits=4, resampled=True),
    Metric("cosine_p5", "cosine to FP32, 5th percentile", "", "higher", "features", digits=4),
    Metric("cka", "CKA with FP32", "", "higher", "features", digits=4),
    Metric("nll", "NLL", "nats", "lower", "classification", resampled=True, also=_SIGMOID),
    _percent("ece", "ECE", "lower", "classification", True, _SIGMOID),
    _percent("ece_adaptive", "adaptive ECE", "lower", "classification", also=_SIGMOID),
    _percent("ece_temperature", "ECE after temperature scaling", "lower", "temperature"),
    Metric("temperature", "temperature", "", None, "temperature"),
    Metric("brier", "Brier", "", "lower", "classification", resampled=True, also=_SIGMOID),
    _percent("aupr_out", "AUPR-out", "higher", "ood", True),
    _percent("aupr_in", "AUPR-in", "higher", "ood"),
    _percent("auroc", "AUROC", "higher", "ood", True, _SIGMOID),
    _percent("fpr95_id", "FPR@95 (ID kept)", "lower", "ood", True),
    _percent("fpr95_ood", "FPR@95 (OOD caught)", "lower", "ood", True),
    _percent("mce", "mCE", "lower", "shift", True),
    _percent("relative_mce", "mCE of FP32's", "lower", "shift"),
    _percent("chance_aupr_out", "chance AUPR-out", None, "chance"),
    _percent("chance_aupr_in", "chance AUPR-in", None, "chance"),
    _percent("kept", "looks known", "higher", "threshold"),
    _percent("flagged", "looks unknown", "higher", "threshold"),
    _percent("balanced_accuracy", "balanced accuracy", "higher", "threshold"),
    _percent("coverage", "coverage", "higher", "operating"),
    _percent("selective_accuracy", "selective accuracy", "higher", "operating"),
    _percent("false_alarms", "false alarms", "lower", "operating"),
    _percent("misses", "misses", "lower", "operating"),
    Metric("size_mb", "size", "MB", "lower", "size", digits=2),
    _percent("size_ratio", "size of FP32's", "lower", "size"),
    Metric("sqnr_db", "SQNR", "dB", "higher", "sensitivity", digits=1),
    Metric("kl", "KL", "nats", "lower", "sensitivity"),
    _percent("agreement", "agreement", "higher", "sensitivity"),
    _percent("changed", "predictions changed", "lower", "sensitivity"),
    Metric("rollout_spearman", "rollout rank correlation", "", "higher", "attention"),
    _percent("rollout_overlap", "rollout top-10 % overlap", "higher", "attention"),
    _percent("centre_movement", "centre of mass moved, of the diagonal", "lower", "attention"),
    Metric("map_spearman", "map rank correlation", "", "higher", "attention"),
    _percent("map_overlap", "map top-10 % overlap", "higher", "attention"),
    _percent("map_movement", "centre of mass moved, of the diagonal", "lower", "attention"),
    Metric("row_cosine", "attention rows cosine", "", "higher", "attention"),
    Metric("row_kl", "attention rows KL", "nats", "lower", "attention"),
    Metric("entropy_change", "attention rows entropy change", "nats", None, "attention"),
    Metric("outliers", "outlier tokens per image", "", None, "attention", digits=2),
    Metric("large_tokens", "large tokens per image", "", None, "attention", digits=2),
    _percent("outlier_overlap", "outlier positions overlap", "higher", "attention"),
    _percent("prediction_changed", "predictions changed", "lower", "attention"),
    _percent("confidence_change", "confidence change", None, "attention"),
    Metric("output_kl", "class probabilities KL", "nats", "lower", "attention"),
    Metric("median_ms", "latency", "ms", "lower", "speed", digits=2),
    Metric("images_per_second", "throughput", "images/s", "higher", "speed", digits=1),
    Metric("memory_mb", "memory", "MB", "lower", "speed", digits=0),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Metrics by name, in the order in which they are shown."""


def metric_of(path: str) -> Metric:
    """The metric that a path in a result ends in ("ood.textures.msp.auroc"); one without unit and direction where it is
    not known, as a result may be of another program."""
    name = path.rpartition(".")[2]
    return METRICS.get(name) or Metric(name, name)


def names_of(family: str, *, resampled: bool = False) -> tuple[str, ...]:
    """Names of a family's metrics; resampled: only those that the bootstrap gives an interval."""
    of = (m for m in METRICS.values() if family == m.family or family in m.also)
    return tuple(m.name for m in of if m.resampled or not resampled)


# ---- tasks -----------------------------------------------------------------------------------------------------------

TASKS = {
    "classify": "classification",
    "zero-shot": "classification",
    "binary": "binary",
    "multilabel": "multilabel",
    "features": "features",
    "detect": "detection",
}
"""The family of a task's metrics. *classify*: one label of several, a softmax; *zero-shot*: the same, the classes being
texts; *binary*: one output and *multilabel*: several, each a sigmoid; *features*: no classifier; *detect*: boxes."""

SUMMARIES = {
    "classification": ("top1", "nll", "ece"),
    "binary": ("auroc", "average_precision", "ece"),
    "multilabel": ("map", "auroc", "ece"),
    "features": ("knn1", "linear1"),
    "detection": ("map", "map50", "d_ece"),
}
"""The metrics that a family is summed up by, the one that it is judged by first."""


def metrics_of(task: Any, *, resampled: bool = False, fitted: bool = False) -> tuple[str, ...]:
    """Names of the metrics of a task's ID images; None, of results that name no task, is "classify". fitted: and of
    those that a classifier has where its temperature could be fitted."""
    family = TASKS.get(task or "classify", "")
    more = names_of("temperature", resampled=resampled) if fitted and family == "classification" else ()
    return (*names_of(family, resampled=resampled), *more)


def summary_of(task: Any) -> tuple[str, ...]:
    """Names of the metrics that a task is summed up by, the one that it is judged by first; of a task that is not known
    a classifier's."""
    return SUMMARIES[TASKS.get(task, "classification")]


# ---- over seeds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1; None for a single value) of n numbers."""

    mean: float
    std: float | None
    n: int

    @staticmethod
    def of(values: Iterable[Any]) -> "Spread | None":
        """Of the finite numbers among `values` (what is None, NaN, text or bool is passed over); None without any."""
        found = [v for v in map(number, values) if v is not None]
        if not found:
            return None
        n = len(found)
        mean = math.fsum(found) / n
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (n - 1)) if n > 1 else None
        return Spread(mean, std, n)

    def scaled(self, factor: float) -> "Spread":
        """The spread of the numbers times a factor."""
        return Spread(self.mean * factor, None if self.std is None else self.std * abs(factor), self.n)


def number(value: Any) -> float | None:
    """`value` as a float; None where it is no finite number (None, NaN, text, bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
