"""The metrics of attention drift, as tables and charts show them, and how they are read from results. What they are
called and their units are in :data:`quantlens.metrics.METRICS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantlens.metrics import METRICS, Spread, number

Summary = Mapping[str, Any]
"""What :meth:`quantlens.attention.drift.Drift.summary` gives."""


@dataclass(frozen=True)
class DriftMetric:
    """A metric of a drift summary, or a number derived from some.

    name: its key in METRICS. digits: decimals shown. title, label (of its axis) and factor: as in METRICS. derived:
    how it is computed from which ``keys`` of a summary, where it is none itself.
    """

    name: str
    digits: int = 3
    title: str = ""
    label: str = ""
    factor: float = 1.0
    keys: tuple[str, ...] = ()
    derived: Callable[..., float] = float

    def of(self, summary: Summary) -> float | None:
        """The value in a summary, before ``factor``; None where there is none."""
        values = [number(summary.get(key)) for key in self.keys or (self.name,)]
        return None if None in values else self.derived(*values)


def _metric(name: str, digits: int = 3) -> DriftMetric:
    """A metric with the title, label and factor of METRICS."""
    known = METRICS[name]
    title = known.heading[0].upper() + known.heading[1:]
    return DriftMetric(name, digits, title, known.label, known.factor)


RANK = _metric("rollout_spearman")
OVERLAP = _metric("rollout_overlap", 1)
CENTRE = _metric("centre_movement", 1)
KL = _metric("row_kl")
OUTLIERS = _metric("outliers", 1)
CHANGED = _metric("prediction_changed", 1)
OUTPUT_KL = _metric("output_kl")

TABLED = (
    RANK,
    OVERLAP,
    CENTRE,
    KL,
    _metric("row_cosine"),
    _metric("entropy_change"),
    _metric("outlier_overlap", 1),
    CHANGED,
    _metric("confidence_change", 1),
    OUTPUT_KL,
)
"""The tables of a report, after that of the outlier tokens."""

CAUSES = (
    DriftMetric(
        "rank_distance",
        title="1 − rollout rank correlation",
        label="1 − rollout rank correlation",
        keys=("rollout_spearman",),
        derived=lambda correlation: 1 - correlation,
    ),
    KL,
    DriftMetric("centre_movement", title="Centre of mass moved", label="share of the diagonal"),
    DriftMetric(
        "outlier_change",
        1,
        title="Outlier tokens, change of their number",
        label="outlier tokens per image, change",
        keys=("outliers", "outliers_fp32"),
        derived=lambda quantized, fp32: abs(quantized - fp32),
    ),
    OUTPUT_KL,
)
"""What may go with the change of AUPR-out; the last is not attention, and stands there to compare."""

MEASURED = (
    *("rollout_spearman", "rollout_overlap", "row_cosine", "row_kl", "centre_movement", "outliers", "outlier_overlap"),
    *("prediction_changed", "output_kl"),
)
OF_MAPS = ("map_spearman", "map_overlap", "map_movement")
"""Of maps other than rollout, in place of these:"""
OF_ROLLOUT = ("rollout_spearman", "rollout_overlap", "centre_movement")


def columns_of(summary: Summary) -> list[str]:
    """Names of the metrics of a summary that a table of one image set shows."""
    other = [name for name in OF_MAPS if name in summary]
    return [name for name in MEASURED if name in summary and not (other and name in OF_ROLLOUT)] + other


WHERE = {"id": "ID images", "ood": "OOD images, mean of the sets"}


def summaries(result: Mapping[str, Any] | None, where: str) -> list[Summary]:
    """The drift summaries of a study's result: that of the ID images ("id") or those of all OOD sets ("ood")."""
    attention = (result or {}).get("attention")
    found = attention.get(where) if isinstance(attention, Mapping) else None
    parts = [found] if where == "id" else list(found.values()) if isinstance(found, Mapping) else []
    return [p for p in parts if isinstance(p, Mapping)]


def value_in(result: Mapping[str, Any] | None, where: str, metric: DriftMetric) -> float | None:
    """A metric of a study's result; on OOD images the mean over their sets."""
    spread = Spread.of(metric.of(s) for s in summaries(result, where))
    return None if spread is None else spread.mean
