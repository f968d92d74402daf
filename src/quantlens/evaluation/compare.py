"""What changed between two models, methods or studies, metric by metric, and whether the difference is significant.

A difference is B less A on the same images. Its interval is that of a paired bootstrap: the images (of the ID set and
of every OOD set) are drawn again with replacement, the same for A and B, and with several seeds the seeds too. The
interval holds the middle 95 % of the resampled differences.

When many metrics are compared, one interval in twenty leaves 0 out by chance alone. A difference is therefore
*significant* when it is so at 5 % after Holm's correction for all metrics of the comparison, and *significant before
correction* when only its own interval leaves 0 out.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from quantlens import _moved
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.evaluation import outputs as kept
from quantlens.evaluation.differences import LEVEL, Difference, corrected, differences_of
from quantlens.evaluation.operating import ClassLoss, Flips, Shipped, flips_csv
from quantlens.evaluation.outputs import Outputs
from quantlens.evaluation.shift import common_shift, resampled_shift, shift_sizes, shift_values
from quantlens.metrics import TASKS, first_score, metrics_of, names_of
from quantlens.metrics.bootstrap import ID, Array, Resamples, classification, ranking
from quantlens.metrics.detection import resampled_detections
from quantlens.metrics.labels import resampled_labels
from quantlens.metrics.operating import Promise

BASELINE = "FP32"
TRAITS = ("model", "method", "bits", "seed")
ID_METRICS = metrics_of("classify", resampled=True)
OOD_METRICS = names_of("ood", resampled=True)
RESAMPLES = 10_000


@dataclass(frozen=True, eq=False)
class Entry:
    """One measured model of a side. `result` is its result dictionary, None where only per-image outputs are at hand;
    `file` is where those are kept, None where they are `held` in memory or were not kept."""

    model: str
    method: str
    bits: str
    seed: int
    result: Mapping[str, Any] | None
    file: Path | None
    held: Outputs | None = None

    def __str__(self) -> str:
        return f"{self.model} {BASELINE if self.baseline else f'{self.method} {self.bits} seed {self.seed}'}"

    @property
    def baseline(self) -> bool:
        return self.bits == BASELINE

    @cached_property
    def outputs(self) -> Any:
        """The per-image outputs; None where none were kept. Raises StorageError for a damaged file."""
        return self.held if self.file is None else kept.read(self.file)

    def forget(self) -> None:
        """Give the outputs' memory back; they are read again when they are asked for."""
        self.__dict__.pop("outputs", None)

    @property
    def task(self) -> str:
        """What it was measured as."""
        return str((self.result or self.outputs.about).get("task") or "classify")

    @property
    def sets(self) -> dict[str, Mapping[str, Any]]:
        """What is known of every image set, the ID set as "": its fingerprint, and the group of an OOD set."""
        about = self.result or self.outputs.about
        return {"": about["id"], **about["ood"]}


@dataclass
class Match:
    """Cells that answer to each other: one pair per seed, everything else being fixed."""

    title: dict[str, str]
    """what both sides share, by trait"""
    pairs: list[tuple[Entry, Entry]] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return [entry for pair in self.pairs for entry in pair]


@dataclass
class Compared:
    """The metrics of cells that differ in nothing but what is compared, over all their seeds."""

    title: dict[str, str]
    seeds: list[list[int]]
    """[seed of A, seed of B] of every pair"""
    n_id: int | None
    metrics: list[Difference]
    without_interval: str = ""
    """why there are no intervals, and nothing of what follows"""
    set_on: str = "A"
    """the side whose thresholds are the same on both: FP32, where one is"""
    thresholds: list[dict[str, Any]] = field(default_factory=list)
    """of every pair, {"a": {"confidence": the cut, score: threshold}, "b": …}"""
    operating: list[Difference] = field(default_factory=list)
    """what the thresholds do, by path: "operating.same.id.coverage" …"""
    flips: list[Flips] = field(default_factory=list)
    classes: list[ClassLoss] = field(default_factory=list)


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
    promise: Promise = field(default_factory=Promise)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that is valid JSON; metrics are fractions, not percent."""
        return {**asdict(self), "level": LEVEL}

    def flips_csv(self) -> str:
        """Every image whose answer flips as CSV text, a row for each pair of cells."""
        return flips_csv((group.title, flips) for group in self.groups for flips in group.flips)


def compare_matches(
    matches: Sequence[Match],
    *,
    a: str,
    b: str,
    unpaired: Sequence[str] = (),
    scores: Sequence[str] | None = None,
    promise: Promise | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare entries that answer to each other.

    a, b: names of the two sides; unpaired: what was left over, in words. scores: OOD scores whose metrics are compared;
    None is MSP (or the first there is), ["all"] every one. promise: what thresholds are set to. resamples: bootstrap
    resamples; seed: of their draw. progress: called with (what, done, in all).

    Raises QuantlensError for entries that share no images, StorageError for damaged files.
    """
    if resamples < 100:
        raise QuantlensError(f"resamples is {resamples}; give at least 100, as an interval is read off their tails")
    drawn, promise = Resamples(resamples, seed), promise or Promise()
    groups, notes = [], []
    for i, one in enumerate(matches):
        group, told = _compared(one, scores, promise, drawn)
        groups.append(group)
        notes += told
        if progress is not None:
            progress("comparing", i + 1, len(matches))
    notes += corrected([one for group in groups for one in group.metrics], resamples)
    notes += corrected([one for group in groups for one in group.operating], resamples)
    return Comparison(a, b, resamples, seed, groups, list(unpaired), list(dict.fromkeys(notes)), promise)


def _compared(
    one: Match, scores: Sequence[str] | None, promise: Promise, resamples: Resamples
) -> tuple[Compared, list[str]]:
    sets, notes = _common_sets(one)
    common = _common_scores(one, scores) if sets else []
    shifted, told = common_shift([entry.result or entry.outputs.about for entry in one.entries])
    notes += told
    wanted = Wanted(sets if common else [], common, shift=shifted)
    groups = _groups(one, wanted.sets)
    without = _without_interval(one)
    replicas = cache(lambda entry: replicate(entry.outputs, wanted, resamples))
    measured: dict[str, list[tuple[float, float]]] = {}
    drawn: dict[str, list[tuple[Array, Array]]] = {}
    shipped, base = Shipped(promise, wanted.sets, wanted.scores, groups, resamples), _base(one)
    n = None
    for first, second in one.pairs:
        _add_common(measured, _values(first, wanted, groups), _values(second, wanted, groups))
        if not without:
            n = _check_same_images(first, second, wanted.sets)
            _add_common(drawn, replicas(first), replicas(second))
            shipped.add(first.outputs, second.outputs, (first.seed, second.seed), base=base)
            second.forget()
    for entry in one.entries:
        entry.forget()
    return Compared(
        one.title,
        [[first.seed, second.seed] for first, second in one.pairs],
        n,
        differences_of(measured, drawn, resamples),
        without,
        "B" if base else "A",
        shipped.thresholds,
        differences_of(shipped.measured, shipped.drawn, resamples),
        shipped.flips,
        shipped.classes(),
    ), notes


def _base(one: Match) -> int:
    """Which side the thresholds are set on: FP32 where it is one of them, else A."""
    first, second = one.pairs[0]
    return int(second.baseline and not first.baseline)


def _add_common(pairs: dict[str, list[tuple[Any, Any]]], first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Add what both have of a metric to its pairs, by path."""
    for path in first:
        if path in second:
            pairs.setdefault(path, []).append((first[path], second[path]))


def _without_interval(one: Match) -> str:
    """Why there are no intervals, "" where there are."""
    names = list(dict.fromkeys(str(entry) for entry in one.entries if entry.file is None and entry.held is None))
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"no intervals, operating point, flips or classes: the per-image outputs of {', '.join(names[:3])}{more} were "
        "not kept; a study keeps them unless it says `outputs: false`, and `quantlens evaluate` does with --keep "
        "FILE.npz"
    )


def _common_sets(one: Match) -> tuple[list[str], list[str]]:
    """OOD sets that all cells saw with the same images, and notes on the others. The ID images must be the same."""
    names = list(dict.fromkeys(name for entry in one.entries for name in entry.sets))
    marks = {name: {entry.sets.get(name, {}).get("fingerprint") for entry in one.entries} for name in names}
    if len(marks.pop("")) > 1:
        first, second = one.pairs[0]
        raise QuantlensError(
            f"{first} (A) and {second} (B) were measured on different ID images; only metrics of the same images can "
            "be compared: measure both on one set"
        )
    if len(tasks := sorted({TASKS.get(entry.task, entry.task) for entry in one.entries})) > 1:
        raise QuantlensError(f"A and B were measured as different tasks ({', '.join(tasks)}); they share no metrics")
    other = [name for name, found in marks.items() if len(found) > 1]
    note = f"left out, as not all cells were measured on the same images of it: OOD set {', '.join(other)}"
    return [name for name in marks if name not in other], [note] if other else []


def _common_scores(one: Match, scores: Sequence[str] | None) -> list[str]:
    having = [_scores_of(entry) for entry in one.entries]
    common = [score for score in having[0] if all(score in names for names in having)]
    if scores is None:
        return [first_score(common)] if common else []
    if list(scores) == ["all"]:
        return common
    for score in scores:
        if score not in common:
            raise UnknownNameError("OOD score of both sides", score, common)
    return list(scores)


def _scores_of(entry: Entry) -> list[str]:
    if entry.result is None:
        return list(entry.outputs.id_scores)
    return list(dict.fromkeys(k for e in entry.result["ood"].values() for k, v in e.items() if isinstance(v, dict)))


def _groups(one: Match, sets: Sequence[str]) -> dict[str, list[str]]:
    """Far and near, each with its members among `sets`, where it has several and all cells agree on the groups."""
    of = {name: {entry.sets[name].get("group") for entry in one.entries} for name in sets}
    members = {group: [name for name in sets if of[name] == {group}] for group in ("far", "near")}
    agreed = all(len(groups) == 1 for groups in of.values())
    return {group: names for group, names in members.items() if agreed and len(names) > 1}


def _values(entry: Entry, wanted: "Wanted", groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The metrics of an entry: those of its result, else those of its per-image outputs; then the means over sets."""
    if entry.result is None:
        known = point(entry.outputs, wanted)
    else:
        known = {f"id.{metric}": entry.result["id"].get(metric) for metric in metrics_of(entry.task, resampled=True)}
        for score in wanted.scores:
            for name in wanted.sets:
                found = entry.result["ood"][name].get(score, {})
                known |= {f"ood.{name}.{score}.{metric}": found.get(metric) for metric in OOD_METRICS}
        known |= shift_values(entry.result, wanted.sets, wanted.scores) if wanted.shift else {}
    left_out = ("ood_mean.", "shift_mean.severity")
    values = {path: v for path, v in known.items() if v is not None and not path.startswith(left_out)}
    for group, names in groups.items():
        for tail in (f"{score}.{metric}" for score in wanted.scores for metric in OOD_METRICS):
            parts = [values[f"ood.{name}.{tail}"] for name in names if f"ood.{name}.{tail}" in values]
            if len(parts) == len(names):
                values[f"ood_mean.{group}.{tail}"] = sum(parts) / len(parts)
    return values


def _check_same_images(first: Entry, second: Entry, sets: Sequence[str]) -> int:
    """The number of ID images; QuantlensError where the two files are not of the same images."""
    one, two = first.outputs, second.outputs
    same = one.labels.tolist() == two.labels.tolist()
    sizes = [[{v.size for v in side.ood_scores.get(name, {}).values()} for name in sets] for side in (one, two)]
    if not same or sizes[0] != sizes[1]:
        raise QuantlensError(
            f"the per-image outputs of {first} and {second} ({first.file}, {second.file}) are not of the same images; "
            "were some skipped as bad in one of them? measure both anew on images that can all be read"
        )
    return len(one.labels)


# ---- metrics under resampling of the images, by their path in a result -----------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """Which metrics are resampled: OOD sets and scores by name, and metrics by name (those that a task has). shift: the
    shifted sets, all or none."""

    sets: Sequence[str]
    scores: Sequence[str]
    metrics: Collection[str] = tuple(
        dict.fromkeys(name for f in (*TASKS.values(), "ood") for name in names_of(f, resampled=True))
    )
    shift: tuple[str, ...] = ()


def point(outputs: Outputs, wanted: Wanted) -> dict[str, float]:
    """The metrics on the images themselves, by their path in a result ("id.top1", "ood.textures.msp.auroc", …), those
    left out that these images have not (mAP of large objects without any)."""
    once = {name: np.ones((n, 1)) for name, n in _sizes(outputs, wanted.sets).items()}
    values = {path: float(values[0]) for path, values in _metrics(outputs, wanted, once).items()}
    return {path: value for path, value in values.items() if not np.isnan(value)}


def replicate(outputs: Outputs, wanted: Wanted, resamples: Resamples) -> dict[str, Array]:
    """The metrics on every resample: path -> float64 [resamples], those left out that no resample has."""
    found: dict[str, Array] = {}
    # the products are small: several threads would wait for each other most of the time
    with threadpool_limits(limits=1, user_api="blas"):
        for part, counts in resamples.chunks(_sizes(outputs, wanted.sets)):
            for path, values in _metrics(outputs, wanted, counts).items():
                found.setdefault(path, np.empty(resamples.count))[part] = values
    return {path: values for path, values in found.items() if not np.isnan(values).all()}


def _sizes(outputs: Outputs, sets: Sequence[str]) -> dict[str, int]:
    """Images by set, the ID images first."""
    of_sets = {s: next(iter(outputs.ood_scores[s].values())).size for s in sets}
    return {ID: len(outputs.labels), **of_sets, **shift_sizes(outputs)}


def _metrics(outputs: Outputs, wanted: Wanted, counts: Mapping[str, Array]) -> dict[str, Array]:
    """Path -> [resamples] for counts [images, resamples] of every set."""
    names = metrics_of(outputs.task, resampled=True)
    metrics = _of_ids(outputs, counts[ID], [name for name in names if name in wanted.metrics])
    found = {f"id.{name}": metrics[name] for name in names if name in metrics}
    groups = {
        group: [s for s in wanted.sets if group in ("all", outputs.groups[s])] for group in ("far", "near", "all")
    }
    for score in wanted.scores if wanted.sets else ():
        oods = {s: outputs.ood_scores[s][score] for s in wanted.sets}
        by_set = ranking(outputs.id_scores[score], oods, counts, wanted.metrics)
        for name, metrics in by_set.items():
            found |= {f"ood.{name}.{score}.{metric}": values for metric, values in metrics.items()}
        for group, members in groups.items():
            for metric in by_set[members[0]] if members else ():
                mean = sum(by_set[name][metric] for name in members) / len(members)
                found[f"ood_mean.{group}.{score}.{metric}"] = np.asarray(mean)
    return found | (resampled_shift(outputs, wanted.sets, wanted.scores, counts) if wanted.shift else {})


def _of_ids(outputs: Outputs, drawn: Array, wanted: Collection[str]) -> dict[str, Array]:
    """{metric: [resamples]} of the ID images for counts [images, resamples]."""
    n_bins = int(outputs.about["n_bins"])
    if outputs.task == "features":
        return {name: outputs.hits[name].astype(drawn.dtype) @ drawn / len(drawn) for name in outputs.hits}
    if outputs.task in ("binary", "multilabel"):
        labels, logits = outputs.labels.astype(bool), np.asarray(outputs.logits)
        return resampled_labels(logits, labels, drawn, n_bins=n_bins, wanted=wanted)
    if outputs.task == "detect":
        matches, ratios = outputs.matches
        return resampled_detections(matches, drawn, n_bins=n_bins, wanted=wanted, ratios=ratios)
    vectors = (outputs.rank, outputs.confidence, outputs.nll, outputs.brier)
    return classification(*vectors, drawn, n_bins=n_bins, wanted=wanted)


__getattr__ = _moved.finder(__name__)
