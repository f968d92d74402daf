"""The operating point of two models on the same images: what thresholds that were set on one of them do on the other,
which answers flip, and what each class loses (`metrics.operating`), from their per-image outputs."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from quantlens.evaluation.outputs import Outputs
from quantlens.metrics.bootstrap import ID, Array, Resamples
from quantlens.metrics.operating import FEW, KINDS, Promise, Reached, class_losses, flip_counts, flip_kinds

PATH = "operating"
HOW = {"same": "same thresholds", "again": "set again"}
"""Part of a metric's path -> what it is of: the thresholds of the first model on both, or each model's own."""

Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Flip:
    """An image of the ID set, by place and name, that two models answer differently. kind: of `operating.KINDS`.
    change: of the probability of the true class, second less first. Names are None where nobody knows them."""

    index: int
    image: str | None
    kind: str
    label: int
    label_name: str | None
    a: int
    a_name: str | None
    a_confidence: float
    b: int
    b_name: str | None
    b_confidence: float
    change: float


@dataclass(frozen=True)
class Flips:
    """The flips between two models. seeds: [of the first, of the second]; counts: {"n", *KINDS}."""

    seeds: list[int]
    counts: dict[str, int]
    images: list[Flip]


@dataclass(frozen=True)
class ClassLoss:
    """Top-1 of a class for two models, means over seeds, with a 95 % interval of the difference; few: whether it has so
    few images (below `metrics.operating.FEW`) that it says little."""

    number: int
    name: str | None
    n: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    few: bool


@dataclass
class Shipped:
    """What became of the thresholds, over pairs of models that differ in their seeds.

    sets, scores: OOD sets and scores by name; groups: {"far": sets, …} over which misses are averaged. measured, drawn:
    {path: [(of the first, of the second) for every pair]} of every metric, and the same on resamples. thresholds: of
    every pair, {"a": {"confidence", score: …}, "b": …}, None where no cut keeps the promise.
    """

    promise: Promise
    sets: Sequence[str]
    scores: Sequence[str]
    groups: Mapping[str, Sequence[str]]
    resamples: Resamples | None
    measured: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    drawn: dict[str, list[Pair]] = field(default_factory=dict)
    thresholds: list[dict[str, Any]] = field(default_factory=list)
    flips: list[Flips] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._right: list[Pair] = []
        self._labels: Array = np.zeros(0, np.int64)
        self._names: dict[int, str] = {}

    def add(self, a: Outputs, b: Outputs, seeds: tuple[int, int] = (0, 0), *, base: int = 0) -> None:
        """A pair measured on the same images. base: which of them the thresholds are set on (0 or 1)."""
        sizes = {ID: len(a.labels), **{s: next(iter(a.ood_scores[s].values())).size for s in self.sets}}
        point, cuts = self._at({name: np.ones((n, 1)) for name, n in sizes.items()}, a, b, base)
        self.thresholds.append(cuts)
        there = {path: pair for path, pair in point.items() if not np.isnan(pair[0] - pair[1]).any()}
        for path, (first, second) in there.items():
            self.measured.setdefault(path, []).append((float(first[0]), float(second[0])))
        if self.resamples is not None:
            drawn = self._resample(sizes, a, b, base)
            for path in there:
                self.drawn.setdefault(path, []).append(drawn[path])
        if _answers(a) and _answers(b):
            self.flips.append(_flips(a, b, seeds))
            self._right.append((a.rank == 0, b.rank == 0))
            self._labels = a.labels
            self._names |= {**a.classes, **b.classes}

    def _resample(self, sizes: Mapping[str, int], a: Outputs, b: Outputs, base: int) -> dict[str, Pair]:
        """Every metric of both models on every resample, by its path."""
        assert self.resamples is not None
        found: dict[str, Pair] = {}
        with threadpool_limits(limits=1, user_api="blas"):  # as in `compare.replicate`
            for part, counts in self.resamples.chunks(sizes):
                for path, pair in self._at(counts, a, b, base)[0].items():
                    held = found.setdefault(path, (np.empty(self.resamples.count), np.empty(self.resamples.count)))
                    for side, values in zip(held, pair, strict=True):
                        side[part] = values
        return found

    def _at(
        self, counts: Mapping[str, Array], a: Outputs, b: Outputs, base: int
    ) -> tuple[dict[str, Pair], dict[str, Any]]:
        """Every metric of both models on every resample, by its path, and the first resample's thresholds."""
        found: dict[str, Pair] = {}
        cuts: dict[str, Any] = {"a": {}, "b": {}}
        sides = (a, b)

        def thresholds(name: str, own: list[Array]) -> dict[str, tuple[Array, Array]]:
            cuts["a"][name], cuts["b"][name] = (float(t[0]) if math.isfinite(t[0]) else None for t in own)
            return {"same": (own[base], own[base]), "again": (own[0], own[1])}

        if _answers(a) and _answers(b):
            ids = [Reached(side.confidence, counts[ID], side.rank == 0) for side in sides]
            for how, cut in thresholds("confidence", [one.cut(self.promise) for one in ids]).items():
                found[f"{PATH}.{how}.id.coverage"] = _both(Reached.share, ids, cut)
                found[f"{PATH}.{how}.id.selective_accuracy"] = _both(Reached.accuracy, ids, cut)
        for score in self.scores if self.sets else ():
            ids = [Reached(side.id_scores[score], counts[ID]) for side in sides]
            settings = thresholds(score, [one.keeping(self.promise.keep) for one in ids])
            for how, cut in settings.items():
                first, second = _both(Reached.share, ids, cut)
                found[f"{PATH}.{how}.id.{score}.false_alarms"] = 1 - first, 1 - second
            for name in self.sets:
                oods = [Reached(side.ood_scores[name][score], counts[name]) for side in sides]
                for how, cut in settings.items():
                    found[f"{PATH}.{how}.ood.{name}.{score}.misses"] = _both(Reached.share, oods, cut)
            for how in settings:
                for group, names in self.groups.items():
                    of = [found[f"{PATH}.{how}.ood.{name}.{score}.misses"] for name in names]
                    mean = np.mean(of, axis=0)
                    found[f"{PATH}.{how}.ood_mean.{group}.{score}.misses"] = mean[0], mean[1]
        return found, cuts

    def classes(self) -> list[ClassLoss]:
        """What each class lost, the largest loss first."""
        if not self._right:
            return []
        first, second = (np.mean(side, axis=0) for side in zip(*self._right, strict=True))
        columns = class_losses(self._labels, first, second)
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        found = [ClassLoss(c, self._names.get(c), n, a, b, d, low, high, n < FEW) for c, n, a, b, d, low, high in rows]
        return sorted(found, key=lambda one: (one.difference, -one.n, one.number))


def _both(of: Any, sides: Sequence[Reached], cuts: tuple[Array, Array]) -> Pair:
    return of(sides[0], cuts[0]), of(sides[1], cuts[1])


def _answers(outputs: Outputs) -> bool:
    """Whether they are of a model that gives one label of several."""
    return outputs.confidence is not None


def _flips(a: Outputs, b: Outputs, seeds: tuple[int, int]) -> Flips:
    """The flips, by kind and then by the change of the true class's probability, the largest first."""
    kinds = flip_kinds(a.labels, a.predicted, b.predicted)
    change = np.exp(-b.nll) - np.exp(-a.nll)
    chosen = np.flatnonzero(kinds >= 0)
    chosen = chosen[np.lexsort((-np.abs(change[chosen]), kinds[chosen]))]
    names = {**a.classes, **b.classes}
    files = a.names or b.names
    images = [
        Flip(
            i,
            None if files is None else printable(files[i]),
            KINDS[kinds[i]],
            int(a.labels[i]),
            names.get(int(a.labels[i])),
            int(a.predicted[i]),
            names.get(int(a.predicted[i])),
            float(a.confidence[i]),
            int(b.predicted[i]),
            names.get(int(b.predicted[i])),
            float(b.confidence[i]),
            float(change[i]),
        )
        for i in chosen.tolist()
    ]
    return Flips(list(seeds), flip_counts(a.labels, a.predicted, b.predicted), images)


def printable(name: str) -> str:
    """A file's name as text that any file and console takes: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def flips_csv(rows: Iterable[tuple[Mapping[str, str], Flips]]) -> str:
    """The flips as CSV text: what was compared and the seeds, then the fields of `Flip`."""
    listed = [
        {**title, "seed_a": flips.seeds[0], "seed_b": flips.seeds[1], **asdict(flip)}
        for title, flips in rows
        for flip in flips.images
    ]
    heads = ["model", "method", "bits", "seed_a", "seed_b", *Flip.__dataclass_fields__]
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return text.getvalue()
