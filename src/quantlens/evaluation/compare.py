"""What changed between two models, methods or studies, metric by metric, and whether the difference is significant.

A difference is B less A on the same images. Its interval is that of a paired bootstrap: the images (of the ID set and
of every OOD set) are drawn again with replacement, the same for A and B, and with several seeds the seeds too. The
interval holds the middle 95 % of the resampled differences.

When many metrics are compared, one interval in twenty leaves 0 out by chance alone. A difference is therefore
*significant* when it is so at 5 % after Holm's correction for all metrics of the comparison, and *significant before
correction* when only its own interval leaves 0 out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.evaluation.bootstrap import ID_METRICS, OOD_METRICS, Wanted, point, replicate
from quantlens.evaluation.entries import Entry, Match
from quantlens.metrics.bootstrap import Array, Resamples, differences, holm, interval

LEVEL = 0.95
RESAMPLES = 10_000
SIGNIFICANT, UNCORRECTED, NOT_SIGNIFICANT = "significant", "significant before correction", "not significant"


@dataclass(frozen=True)
class Difference:
    """One metric: means over seeds of A and B, their difference (B less A), its 95 % interval, the two-sided p-value,
    and the same corrected for the number of metrics. The last four are None where no per-image outputs were kept."""

    path: str
    a: float
    b: float
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def verdict(self) -> str | None:
        """SIGNIFICANT, UNCORRECTED or NOT_SIGNIFICANT; None without an interval."""
        if self.low is None or self.high is None or self.p_holm is None:
            return None
        if self.p_holm < 1 - LEVEL:
            return SIGNIFICANT
        return UNCORRECTED if self.low > 0 or self.high < 0 else NOT_SIGNIFICANT

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass
class Compared:
    """The metrics of cells that differ in nothing but what is compared, over all their seeds."""

    title: dict[str, str]
    seeds: list[list[int]]
    """[seed of A, seed of B] of every pair"""
    n_id: int | None
    metrics: list[Difference]
    without_interval: str = ""
    """why there are no intervals"""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "metrics": [metric.to_dict() for metric in self.metrics]}


@dataclass
class Comparison:
    """All that was compared, a group of metrics for every group of cells."""

    a: str
    b: str
    resamples: int
    seed: int
    groups: list[Compared]
    unpaired: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that is valid JSON; metrics are fractions, not percent."""
        return {**asdict(self), "level": LEVEL, "groups": [group.to_dict() for group in self.groups]}


def compare_matches(
    matches: Sequence[Match],
    *,
    a: str,
    b: str,
    unpaired: Sequence[str] = (),
    scores: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare entries that answer to each other.

    a, b: names of the two sides; unpaired: what was left over, in words. scores: OOD scores whose metrics are compared;
    None is MSP (or the first there is), ["all"] every one. resamples: bootstrap resamples; seed: of their draw.
    progress: called with (what, done, in all).

    Raises QuantlensError for entries that share no images, StorageError for damaged files.
    """
    if resamples < 100:
        raise QuantlensError(f"resamples is {resamples}; give at least 100, as an interval is read off their tails")
    drawn = Resamples(resamples, seed)
    groups, notes = [], []
    for i, one in enumerate(matches):
        group, told = _compared(one, scores, drawn)
        groups.append(group)
        notes += told
        if progress is not None:
            progress("comparing", i + 1, len(matches))
    notes += _corrected(groups, resamples)
    return Comparison(a, b, resamples, seed, groups, list(unpaired), list(dict.fromkeys(notes)))


def _compared(one: Match, scores: Sequence[str] | None, resamples: Resamples) -> tuple[Compared, list[str]]:
    sets, notes = _common_sets(one)
    wanted = Wanted(sets, _common_scores(one, scores) if sets else ())
    means = _means(one, sets)
    bare = [entry for pair in one.pairs for entry in pair if not entry.has_outputs]
    rows: dict[str, list[tuple[float, float]]] = {}
    drawn: dict[str, list[tuple[Array, Array]]] = {}
    n = None
    known: dict[int, dict[str, Array]] = {}
    for first, second in one.pairs:
        values = [_values(entry, wanted, means) for entry in (first, second)]
        for path in (p for p in values[0] if p in values[1]):
            rows.setdefault(path, []).append((values[0][path], values[1][path]))
        if bare:
            continue
        n = _check_same_images(first, second, sets)
        for entry in (first, second):
            if id(entry) not in known:
                assert entry.outputs is not None
                known[id(entry)] = replicate(entry.outputs, wanted, resamples)
        for path in (p for p in known[id(first)] if p in known[id(second)]):
            drawn.setdefault(path, []).append((known[id(first)][path], known[id(second)][path]))
        second.forget()
    for entry in (entry for pair in one.pairs for entry in pair):
        entry.forget()
    figures = []
    for path, pairs in rows.items():
        mean_a, mean_b = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
        figure = Difference(path, mean_a, mean_b, mean_b - mean_a)
        if path in drawn:
            found = interval(differences(drawn[path], resamples), LEVEL)
            figure = replace(figure, low=found.low, high=found.high, p=found.p)
        figures.append(figure)
    seeds = [[first.seed, second.seed] for first, second in one.pairs]
    return Compared(one.title, seeds, n, figures, _reason(bare)), notes


def _reason(bare: Sequence[Entry]) -> str:
    if not bare:
        return ""
    names = list(dict.fromkeys(str(entry) for entry in bare))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"no intervals: the per-image outputs of {', '.join(names[:3])}{more} were not kept; a study keeps them unless "
        "it says `outputs: false`, and `quantlens evaluate` does with --keep FILE.npz"
    )


def _common_sets(one: Match) -> tuple[list[str], list[str]]:
    """OOD sets that all cells saw with the same images, and notes on the others. The ID images must be the same."""
    marks = [entry.marks for pair in one.pairs for entry in pair]
    if len({mark[""] for mark in marks}) > 1:
        first, second = one.pairs[0]
        raise QuantlensError(
            f"{first} (A) and {second} (B) were measured on different ID images; only metrics of the same images can "
            "be compared: measure both on one set"
        )
    names = dict.fromkeys(name for mark in marks for name in mark if name)
    same = [name for name in names if len({mark.get(name) for mark in marks}) == 1]
    other = [name for name in names if name not in same]
    note = f"left out, as not all cells were measured on the same images of it: OOD set {', '.join(other)}"
    return same, [note] if other else []


def _common_scores(one: Match, scores: Sequence[str] | None) -> list[str]:
    having = [_scores_of(entry) for pair in one.pairs for entry in pair]
    common = [score for score in having[0] if all(score in names for names in having)]
    if scores is None:
        return ["msp"] if "msp" in common else common[:1]
    if list(scores) == ["all"]:
        return common
    for score in scores:
        if score not in common:
            raise UnknownNameError("OOD score of both sides", score, common)
    return list(scores)


def _scores_of(entry: Entry) -> list[str]:
    if entry.result is None:
        assert entry.outputs is not None
        return list(entry.outputs.id_scores)
    return list(dict.fromkeys(k for e in entry.result["ood"].values() for k, v in e.items() if isinstance(v, dict)))


def _means(one: Match, sets: Sequence[str]) -> dict[str, list[str]]:
    """Far and near, each with its members among `sets`, where it has several and all cells agree on the groups."""
    groups = [{name: entry.groups.get(name) for name in sets} for pair in one.pairs for entry in pair]
    if any(group != groups[0] for group in groups):
        return {}
    members = {group: [name for name in sets if groups[0][name] == group] for group in ("far", "near")}
    return {group: names for group, names in members.items() if len(names) > 1}


def _values(entry: Entry, wanted: Wanted, means: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The metrics of an entry: those of its result, else those of its per-image outputs; then the means over sets."""
    if entry.result is None:
        assert entry.outputs is not None
        measured = point(entry.outputs, wanted)
        values = {path: measured[path] for path in map(".".join, _paths(wanted)) if path in measured}
    else:
        found = {".".join(keys): _dig(entry.result, keys) for keys in _paths(wanted)}
        values = {path: value for path, value in found.items() if value is not None}
    for group, names in means.items():
        for tail in (f"{score}.{metric}" for score in wanted.scores for metric in OOD_METRICS):
            parts = [values.get(f"ood.{name}.{tail}") for name in names]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                values[f"ood_mean.{group}.{tail}"] = sum(known) / len(known)
    return values


def _dig(value: Any, keys: Sequence[str]) -> float | None:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _paths(wanted: Wanted) -> Iterator[tuple[str, ...]]:
    yield from (("id", metric) for metric in ID_METRICS)
    for score in wanted.scores:
        yield from (("ood", name, score, metric) for name in wanted.sets for metric in OOD_METRICS)


def _check_same_images(first: Entry, second: Entry, sets: Sequence[str]) -> int:
    """The number of ID images; QuantlensError where the two files are not of the same images."""
    one, two = first.outputs, second.outputs
    assert one is not None
    assert two is not None
    same = one.labels.tolist() == two.labels.tolist()
    for name in sets:
        sizes = [{v.size for v in outputs.ood_scores.get(name, {}).values()} for outputs in (one, two)]
        same = same and sizes[0] == sizes[1] and len(sizes[0]) == 1
    if not same:
        raise QuantlensError(
            f"the per-image outputs of {first} and {second} ({first.file}, {second.file}) are not of the same images; "
            "were some skipped as bad in one of them? measure both anew on images that can all be read"
        )
    return int(one.labels.size)


def _corrected(groups: Sequence[Compared], resamples: int) -> list[str]:
    """Put Holm's p-values into the metrics; a note where there are too few resamples for so many metrics."""
    p = {
        f"{i} {figure.path}": figure.p
        for i, group in enumerate(groups)
        for figure in group.metrics
        if figure.p is not None
    }
    corrected = holm(p)
    for i, group in enumerate(groups):
        group.metrics = [replace(f, p_holm=corrected.get(f"{i} {f.path}")) for f in group.metrics]
    needed = round(2 * len(p) / (1 - LEVEL))
    if needed <= resamples:
        return []
    return [
        f"{len(p)} metrics are compared, and after correction for so many none can be significant on {resamples} "
        f"resamples: give --resamples {2 * needed}, or compare fewer"
    ]
