"""What factors do to an outcome: experiments with two levels of each factor, made again with several seeds.

The model of one outcome is y(seed, cell) = seed + cell + noise, the noise being of one size: a cell is one setting of
the factors, and seeds are blocks (Box, Hunter and Hunter, Statistics for Experimenters, 2nd edition, 2005, chapters 4
and 5). An effect is a contrast, a weighted sum of cells, taken within every seed, so that it is paired by seed. A main
effect is the mean at the high level less the mean at the low one; the interaction of two factors is half the difference
between the effects that one has at the two levels of the other.

A mediator is what a factor moves and what moves the outcome. What it carries of an effect is the product of the two
slopes (Baron and Kenny, Journal of Personality and Social Psychology 51, 1986), of which the second is that between
trainings of one cell, which differ in their seed alone: over all cells together, whatever else a factor moves would
be taken for the mediator's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from quantlens.errors import QuantlensError
from quantlens.metrics.bootstrap import holm

Array = NDArray[Any]
Verdict = Literal["effect", "without effect", "not decided"]


@dataclass(frozen=True)
class Effect:
    """A contrast as it was estimated, in the unit of the outcome.

    low, high: its confidence interval. p: two-sided, of "there is none"; p_holm: corrected for the other effects of its
    family. spread: the standard deviation of one run over seeds. verdict: :func:`verdict`.
    """

    name: str
    estimate: float
    low: float
    high: float
    p: float
    p_holm: float
    spread: float
    verdict: Verdict

    @property
    def size(self) -> float:
        """The estimate in standard deviations of one run over seeds; infinite where runs do not differ."""
        if self.spread or not self.estimate:
            return self.estimate / (self.spread or 1.0)
        return math.copysign(math.inf, self.estimate)


def factorial_effects(
    values: Any, levels: Any, names: Sequence[str], bound: float, *, level: float = 0.95, covariate: Any = None
) -> list[Effect]:
    """Main effects, then interactions of two factors, of a balanced two-level design, whole or a fraction.

    values: of the outcome [seeds, cells]. levels: of every factor in every cell, -1 or 1 [cells, factors]. bound,
    level, covariate: as :func:`effects` has them; p-values are corrected over the main effects, and over the
    interactions. Effects that a fraction cannot tell apart are one, their names joined by "=" ("= -": with the opposite
    sign). Raises QuantlensError where arrays do not fit together, or factors are not balanced against each other.
    """
    signs, k = np.asarray(levels, dtype=np.float64), len(names)
    if signs.ndim != 2 or signs.shape[1] != k or (np.abs(signs) != 1).any():
        raise QuantlensError(f"levels {signs.shape} must be -1 or 1, and [cells, factors] of the {k} factors named")
    if signs.sum(axis=0).any() or (signs.T @ signs != len(signs) * np.eye(k)).any():
        raise QuantlensError("the cells are not balanced: give every pair of levels of two factors as many cells")
    pairs = list(combinations(range(k), 2))
    columns = [*signs.T, *(signs[:, i] * signs[:, j] for i, j in pairs)]
    titles: list[str] = []
    kept: list[Array] = []
    for title, column in zip([*names, *(f"{names[i]} x {names[j]}" for i, j in pairs)], columns, strict=True):
        along = [int(np.sign(column @ other)) if abs(column @ other) == len(signs) else 0 for other in kept]
        if not any(along):
            titles.append(title)
            kept.append(column)
            continue
        place = int(np.argmax(np.abs(along)))
        titles[place] += f" = {'-' * (along[place] < 0)}{title}"
    scaled = [column * (2 / len(signs)) for column in kept]
    families = (dict(zip(titles[:k], scaled[:k], strict=True)), dict(zip(titles[k:], scaled[k:], strict=True)))
    settings: dict[str, Any] = {"level": level, "covariate": covariate}
    return [effect for family in families if family for effect in effects(values, family, bound, **settings)]


def effects(
    values: Any, contrasts: Mapping[str, Any], bound: float, *, level: float = 0.95, covariate: Any = None
) -> list[Effect]:
    """Contrasts {name: weights [cells], which sum to 0} of an outcome [seeds, cells], with Student's intervals.

    The noise is that of all cells, what is left of them without the means of seed and cell: (seeds - 1)(cells - 1)
    degrees of freedom; with two cells it is the paired t-test. bound: the smallest effect of interest. level: of the
    intervals, and of the verdicts (a Holm-corrected p below 1 - level). covariate [seeds, cells]: effects at an equal
    value of it (analysis of covariance, its slope being that of the noise). Raises QuantlensError for arrays that do
    not fit together, a bound that is not positive, and fewer than two seeds or cells.
    """
    y = np.asarray(values, dtype=np.float64)
    weights = np.array(list(contrasts.values()), dtype=np.float64)
    _check(y, weights, bound, level)
    noise, means, n = _interaction(y), y.mean(axis=0), len(y)
    freedom, squares = (n - 1) * (y.shape[1] - 1), float((noise**2).sum())
    estimates, factor = weights @ means, (weights**2).sum(axis=1) / n
    if covariate is not None:
        x = np.asarray(covariate, dtype=np.float64)
        if x.shape != y.shape or not np.isfinite(x).all():
            raise QuantlensError(
                f"the covariate {x.shape} must be finite, and of the same shape as the values {y.shape}"
            )
        moved, of_noise = weights @ x.mean(axis=0), _interaction(x)
        total, freedom = float((of_noise**2).sum()), freedom - 1
        if _flat(x) or not freedom:
            raise QuantlensError(
                "the covariate does not vary between runs of a cell, or runs are too few; leave it out"
            )
        slope = float((of_noise * noise).sum()) / total
        squares = max(0.0, squares - slope**2 * total)
        estimates, factor = estimates - slope * moved, factor + moved**2 / total
    spread = np.sqrt(squares / freedom)
    errors = spread * np.sqrt(factor)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.nan_to_num(2 * student.sf(np.abs(estimates) / errors, freedom), nan=1.0)
    corrected = holm(dict(zip(contrasts, p.tolist(), strict=True)))
    width = student.ppf((1 + level) / 2, freedom) * errors
    return [
        Effect(
            name,
            float(estimates[i]),
            low := float(estimates[i] - width[i]),
            high := float(estimates[i] + width[i]),
            float(p[i]),
            corrected[name],
            float(spread),
            verdict(low, high, corrected[name], bound, 1 - level),
        )
        for i, name in enumerate(contrasts)
    ]


@dataclass(frozen=True)
class Mediation:
    """What a mediator carries of the effect of a factor on an outcome, in the unit of the outcome.

    total, direct: the effect, and the effect at an equal value of the mediator, which :func:`effects` gives with it as
    covariate. moved: the factor's effect on the mediator. slope: of the outcome over the mediator. estimate: what is
    carried, moved x slope = total - direct, with its interval and p, as :class:`Effect` has them; p_holm: corrected
    for the other mediators of the factor.
    """

    factor: str
    mediator: str
    total: Effect
    direct: Effect
    moved: float
    slope: float
    estimate: float
    low: float
    high: float
    p: float
    p_holm: float
    verdict: Verdict


DRAWS = 20_000
"""Of a product of two estimates."""


def mediations(
    values: Any, mediators: Mapping[str, Any], contrasts: Mapping[str, Any], bound: float, *, level: float = 0.95
) -> list[Mediation]:
    """What each of the mediators {name: [seeds, cells]}, one at a time, carries of each contrast of an outcome [seeds,
    cells].

    The interval is that of the product of two independent estimates with Student's errors (MacKinnon, Lockwood and
    Williams, Multivariate Behavioral Research 39, 2004), drawn 20000 times; p is the larger of their two (joint
    significance). A mediator that does not vary between the seeds of a cell is left out. Other arguments and errors as
    :func:`effects` has them.
    """
    y = np.asarray(values, dtype=np.float64)
    totals, found = effects(y, contrasts, bound, level=level), list[Mediation]()
    weights, freedom = np.array(list(contrasts.values()), dtype=np.float64), (len(y) - 1) * (y.shape[1] - 1)
    for name, given in mediators.items():
        x = np.asarray(given, dtype=np.float64)
        if x.shape == y.shape and _flat(x):
            continue
        directs = effects(y, contrasts, bound, level=level, covariate=x)
        of_noise, drawn = _interaction(x), np.random.default_rng(0).standard_t([freedom, freedom - 1], (DRAWS, 2)).T
        total = float((of_noise**2).sum())
        slope = float((of_noise * _interaction(y)).sum()) / total
        error = directs[0].spread / math.sqrt(total)
        p_slope = 2 * student.sf(abs(slope) / error, freedom - 1) if error else float(slope == 0)
        for weight, whole, direct in zip(weights, totals, directs, strict=True):
            moved, off = float(weight @ x.mean(axis=0)), spread(x) * math.sqrt(float((weight**2).sum()) / len(x))
            low, high = np.quantile(
                (moved + off * drawn[0]) * (slope + error * drawn[1]), [0.5 - level / 2, 0.5 + level / 2]
            )
            p = max(float(2 * student.sf(abs(moved) / off, freedom)), float(p_slope))
            ends = (moved, slope, moved * slope, float(low), float(high), p, p)
            found.append(Mediation(whole.name, name, whole, direct, *ends, "not decided"))
    return [one for factor in contrasts for one in _judged([m for m in found if m.factor == factor], bound, 1 - level)]


def _judged(family: list[Mediation], bound: float, alpha: float) -> list[Mediation]:
    """The same with corrected p-values and verdicts."""
    p = holm({one.mediator: one.p for one in family})
    return [
        replace(m, p_holm=p[m.mediator], verdict=verdict(m.low, m.high, p[m.mediator], bound, alpha)) for m in family
    ]


def spread(values: Any) -> float:
    """The standard deviation of one run over seeds, of an outcome [seeds, cells] without the means of seed and cell."""
    y = np.asarray(values, dtype=np.float64)
    return math.sqrt(float((_interaction(y) ** 2).sum()) / ((len(y) - 1) * (y.shape[1] - 1)))


def verdict(low: float, high: float, p: float, bound: float, alpha: float = 0.05) -> Verdict:
    """ "without effect" where the interval lies inside -bound to bound, else "effect" where p is below alpha, else "not
    decided": that an effect was not found does not mean that there is none."""
    if -bound < low and high < bound:
        return "without effect"
    return "effect" if p < alpha else "not decided"


def _interaction(table: Array) -> Array:
    """What the means of rows and columns do not explain of a table."""
    return table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()


def _flat(table: Array) -> bool:
    """Whether runs of a cell do not differ."""
    return bool((_interaction(table) ** 2).sum() <= 1e-24 * max(1.0, float((table**2).sum())))


def _check(values: Array, weights: Array, bound: float, level: float) -> None:
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise QuantlensError(
            f"values {values.shape} must be finite and [seeds, cells], with two seeds and two cells at least"
        )
    if weights.ndim != 2 or weights.shape[1] != values.shape[1]:
        raise QuantlensError(f"contrasts {weights.shape} do not fit {values.shape[1]} cells; give a weight for each")
    if not np.allclose(weights.sum(axis=1), 0) or not weights.any(axis=1).all():
        raise QuantlensError("the weights of a contrast must sum to 0, and not all be 0")
    if not (0 < bound < np.inf and 0 < level < 1):
        raise QuantlensError(f"the bound {bound} must be positive and the level {level} between 0 and 1")
