"""The difference of two models in a metric, its interval, and whether it is significant among many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantlens.metrics.bootstrap import Array, Resamples, differences, holm, interval

LEVEL = 0.95
SIGNIFICANT, UNCORRECTED, NOT_SIGNIFICANT = "significant", "significant before correction", "not significant"


@dataclass
class Difference:
    """One metric: means over seeds of A and B, their difference (B less A), its 95 % interval, the two-sided p-value,
    the same corrected for the number of metrics, and the verdict (SIGNIFICANT, UNCORRECTED or NOT_SIGNIFICANT). The
    last five are None where no per-image outputs were kept."""

    path: str
    a: float
    b: float
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    verdict: str | None = None


def differences_of(
    measured: Mapping[str, Sequence[tuple[float, float]]],
    drawn: Mapping[str, Sequence[tuple[Array, Array]]],
    resamples: Resamples,
) -> list[Difference]:
    """Differences of metrics by path, not corrected for their number yet, from their values of every pair, and on every
    resample."""
    metrics = []
    for path, pairs in measured.items():
        a, b = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        metrics.append(Difference(path, a, b, b - a))
        if path in drawn:
            found = interval(differences(drawn[path], resamples), LEVEL)
            metrics[-1].low, metrics[-1].high, metrics[-1].p = found
            metrics[-1].verdict = UNCORRECTED if found.excludes_zero else NOT_SIGNIFICANT
    return metrics


def corrected(every: Sequence[Difference], resamples: int) -> list[str]:
    """Put Holm's p-values and the verdicts into the metrics; a note where there are too few resamples for so many."""
    tested = {i: one.p for i, one in enumerate(every) if one.p is not None}
    for i, p in holm(tested).items():
        every[i].p_holm = p
        if p < 1 - LEVEL:
            every[i].verdict = SIGNIFICANT
    needed = round(2 * len(tested) / (1 - LEVEL))
    if needed <= resamples or not tested:
        return []
    return [
        f"{len(tested)} metrics are compared, and after correction for so many none can be significant on {resamples} "
        f"resamples: give --resamples {2 * needed}, or compare fewer"
    ]
