"""How far one metric goes with another over the cells of a study: pure functions of arrays.

Cells are no independent draws: seeds of one model, method and precision are nearly one point, and both metrics grow as
bits fall. So the interval resamples whole conditions, and the correlation within precisions is given beside the plain
one: it asks whether, at the same bits, the model or method that drifts more also loses more.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

ROUNDS = 2000
FEWEST = 4
"""Points below which no correlation is given."""


@dataclass(frozen=True)
class Association:
    """Correlations of n points from so many conditions; None where they are not defined (a constant metric, too few
    points). low, high: 95 % bootstrap interval of ``spearman``. within: Spearman's within strata of equal precision."""

    n: int
    conditions: int
    pearson: float | None
    spearman: float | None
    low: float | None
    high: float | None
    within: float | None


def associate(
    x: Sequence[float], y: Sequence[float], conditions: Sequence[Hashable], strata: Sequence[Hashable], *, seed: int = 0
) -> Association:
    """Association of two metrics, one value of each per cell.

    conditions: what cells that differ only in their seed share; the bootstrap draws conditions. strata: the precision
    of each cell. The bootstrap weighs the ranks of the whole sample (2000 draws, percentiles).
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = list(dict.fromkeys(conditions))
    n, count = len(a), len(known)
    if n < FEWEST:
        return Association(n, count, None, None, None, None, None)
    ra, rb = rankdata(a), rankdata(b)
    low = high = None
    spearman = _single(ra, rb)
    if spearman is not None and count >= FEWEST:
        of = np.array([known.index(c) for c in conditions])
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=ROUNDS)
        found = _weighted(ra, rb, drawn[:, of].astype(np.float64))
        found = found[np.isfinite(found)]
        if len(found) > ROUNDS // 2:
            low, high = (float(v) for v in np.quantile(found, [0.025, 0.975]))
    return Association(n, count, _single(a, b), spearman, low, high, _within(a, b, list(strata)))


def _weighted(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation of x and y [n] under weights [R, n]: [R], NaN where it is not defined."""
    share = weights / weights.sum(1, keepdims=True)
    dx, dy = x - share @ x[:, None], y - share @ y[:, None]
    cov, vx, vy = (share * dx * dy).sum(1), (share * dx**2).sum(1), (share * dy**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((vx > 1e-18) & (vy > 1e-18), cov / np.sqrt(vx * vy), np.nan)


def _single(x: np.ndarray, y: np.ndarray) -> float | None:
    found = float(_weighted(x, y, np.ones((1, len(x))))[0])
    return found if np.isfinite(found) else None


def _within(x: np.ndarray, y: np.ndarray, strata: list[Hashable]) -> float | None:
    """Spearman's correlation with ranks taken in each stratum of at least three points, centred and scaled there."""
    parts = []
    for stratum in dict.fromkeys(strata):
        inside = np.array([s == stratum for s in strata])
        if inside.sum() >= 3:
            ranks = [rankdata(v[inside]) for v in (x, y)]
            parts.append(np.stack([(r - r.mean()) / len(r) for r in ranks]))
    if not parts or sum(p.shape[1] for p in parts) < FEWEST:
        return None
    both = np.concatenate(parts, axis=1)
    return _single(both[0], both[1])
