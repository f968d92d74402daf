"""The operating point of a study's cells: what the thresholds of FP32 do at every precision, how many answers flip, and
on request which, from the per-image outputs that the study keeps. Answers are kept as those of `significance`, in
`DIR/outputs/operating.json`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlens.errors import StorageError
from quantlens.evaluation.differences import Difference, differences_of
from quantlens.evaluation.operating import Shipped
from quantlens.evaluation.outputs import Outputs
from quantlens.metrics.operating import Promise
from quantlens.studies.board import Board, Group
from quantlens.studies.significance import Answers

VERSION = 1
WITHOUT = (
    "the per-image outputs of quantized cells and of an FP32 cell beside them were not kept or are damaged; a study "
    "keeps them unless it says `outputs: false`"
)


@dataclass(frozen=True)
class Row:
    """A model and method at one precision, over its seeds. metrics: by path ("operating.same.id.coverage" …), means
    over seeds of FP32 (a) and quantized (b). thresholds: of every seed, as `Shipped` has them; flips: their counts."""

    group: Group
    bits: str
    seeds: list[int]
    metrics: dict[str, Difference]
    thresholds: list[dict[str, Any]]
    flips: list[dict[str, int]]


@dataclass(frozen=True)
class Operating:
    """The operating points of a study. missing: how many rows have none, as their per-image outputs are not there."""

    promise: Promise
    rows: list[Row]
    missing: int


class _Points(Answers):
    def __init__(self, directory: Path, promise: Promise):
        super().__init__(directory, "operating.json", str(VERSION), repr(promise))
        self.promise = promise

    def measured(self, baseline: str, keys: Sequence[str]) -> dict[str, Any]:
        shipped: Shipped | None = None
        for a, b in self.beside(baseline, keys):
            if shipped is None:
                sets = [name for name in a.ood_scores if name in b.ood_scores]
                scores = [name for name in a.id_scores if name in b.id_scores]
                shipped = Shipped(self.promise, sets, scores, _groups(a, sets), self.resamples)
            shipped.add(a, b)
        assert shipped is not None
        metrics = differences_of(shipped.measured, shipped.drawn, self.resamples)
        counts = [flips.counts for flips in shipped.flips]
        return {"metrics": [asdict(one) for one in metrics], "thresholds": shipped.thresholds, "flips": counts}


def _groups(outputs: Outputs, sets: Sequence[str]) -> dict[str, list[str]]:
    members = {group: [name for name in sets if outputs.groups[name] == group] for group in ("far", "near")}
    return {group: names for group, names in members.items() if len(names) > 1}


def operating(
    board: Board, promise: Promise | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Operating:
    """The operating points of a board's cells that have an FP32 cell beside them. promise: None is that of the study
    file (`operating:`), whose answers are kept."""
    keeps = promise is None
    if promise is None:
        promise = Promise(**((board.study.get("config") or {}).get("operating") or {}))
    asked = [(group, b, group.cells[b]) for group in board.groups for b in board.quantized if b in group.cells]
    points = None if board.directory is None else _Points(board.directory, promise)
    rows = []
    for done, (group, bits, results) in enumerate(asked, 1):
        if progress is not None:
            progress("operating points", done, len(asked))
        found = None
        if points is not None and group.fp32 is not None and group.fp32_own:
            found = points.answer(group.fp32["cell_key"], [result["cell_key"] for result in results])
        if found is not None:
            metrics = {one["path"]: Difference(**one) for one in found["metrics"]}
            seeds = [result["seed"] for result in results]
            rows.append(Row(group, bits, seeds, metrics, found["thresholds"], found["flips"]))
    if points is not None and keeps:
        points.save()
    return Operating(promise, rows, len(asked) - len(rows))


def answers(board: Board, group: Group, bits: str) -> Shipped | None:
    """The answers that flip, and what each class lost, of a model at one precision over its seeds; None where not all
    outputs are kept and whole."""
    if board.directory is None or group.fp32 is None or not group.fp32_own:
        return None
    found = Shipped(Promise(), (), (), {}, None)
    keys = [result["cell_key"] for result in group.cells[bits]]
    pairs = Answers(board.directory, "operating.json").beside(group.fp32["cell_key"], keys)
    try:
        for result, (a, b) in zip(group.cells[bits], pairs, strict=True):
            found.add(a, b, (group.fp32["seed"], result["seed"]))
    except StorageError:
        return None
    return found
