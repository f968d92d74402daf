"""Which changes by quantization are not significant: those whose 95 % interval holds 0 (see `evaluation.compare`).

The report asks for every cell at once, so the answers are kept in `DIR/outputs/significance.json`. They depend on the
cells alone, whose keys name them; the file can be deleted at any time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantlens.errors import StorageError
from quantlens.evaluation import outputs as kept
from quantlens.evaluation.compare import Wanted, replicate
from quantlens.files import write_whole
from quantlens.metrics import summary_of
from quantlens.metrics.bootstrap import Array, Resamples, differences, interval
from quantlens.studies.board import Board
from quantlens.studies.text import count

VERSION = 1
RESAMPLES = 1000
SIGN = " ○"
"""Stands after a change that is not significant."""


def asked_of(task: str) -> tuple[str, ...]:
    """Names of the metrics whose changes are tested, of results of a task."""
    return (*summary_of(task), "aupr_out")


class Answers:
    """What is computed from the per-image outputs of cells of the store in `directory`, and kept in `outputs/NAME` by
    the keys of the cells; call `save` when all has been asked. `marks` stand for what else an answer depends on."""

    def __init__(self, directory: Path, name: str, *marks: str):
        self.directory, self.marks = directory, marks
        self.file = directory / kept.FOLDER / name
        self.resamples = Resamples(RESAMPLES)
        self.known = self._read()
        self.asked: dict[str, Any] = {}
        self.baseline = lru_cache(maxsize=1)(lambda key: kept.read(kept.path_of(directory, key)))

    def answer(self, baseline: str, keys: Sequence[str]) -> Any:
        """What `measured` gives of the cells `keys` (the seeds of one precision) and the FP32 cell `baseline`; None
        where not all outputs are kept and whole."""
        if not all(kept.path_of(self.directory, key).is_file() for key in (baseline, *keys)):
            return None
        name = hashlib.sha256(" ".join([*self.marks, str(RESAMPLES), baseline, *keys]).encode()).hexdigest()
        if name not in self.known:
            try:
                self.known[name] = self.measured(baseline, keys)
            except StorageError:
                return None
        self.asked[name] = self.known[name]
        return self.asked[name]

    def measured(self, baseline: str, keys: Sequence[str]) -> Any:
        """The answer as plain data, anew."""
        raise NotImplementedError

    def beside(self, baseline: str, keys: Sequence[str]) -> Iterator[tuple[kept.Outputs, kept.Outputs]]:
        """The outputs of the baseline with those of every cell. Raises StorageError where they are not of one set of
        images."""
        first = self.baseline(baseline)
        for key in keys:
            second = kept.read(kept.path_of(self.directory, key))
            if first.labels.tolist() != second.labels.tolist():
                raise StorageError(f"the per-image outputs {key} are not of the images of {baseline}")
            yield first, second

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def save(self) -> None:
        """Keep the answers for the next report; a store that cannot be written is left as it is."""
        if self.asked and self._read() != self.asked:
            with suppress(StorageError):
                write_whole(self.file, json.dumps(self.asked, sort_keys=True))


class Significance(Answers):
    """Which changes are not significant, for the store in `directory`."""

    def __init__(self, directory: Path):
        super().__init__(directory, "significance.json", str(VERSION))
        self._before = lru_cache(maxsize=4)(lambda outputs, wanted: replicate(outputs, wanted, self.resamples))

    def not_significant(self, baseline: str, keys: Sequence[str]) -> frozenset[str] | None:
        """Paths of the metrics ("id.top1", "ood_mean.far.msp.aupr_out", …) in which the cells `keys` (the seeds of one
        precision) do not differ from the FP32 cell `baseline`; None where not all outputs are kept and whole."""
        found = self.answer(baseline, keys)
        return None if found is None else frozenset(found)

    def measured(self, baseline: str, keys: Sequence[str]) -> list[str]:
        drawn: dict[str, list[tuple[Array, Array]]] = {}
        for first, second in self.beside(baseline, keys):
            sets = tuple(s for s in first.ood_scores if s in second.ood_scores)
            wanted = Wanted(sets, tuple(s for s in first.id_scores if s in second.id_scores), asked_of(first.task))
            before = self._before(first, wanted)
            for path, after in replicate(second, wanted, self.resamples).items():
                drawn.setdefault(path, []).append((before[path], after))
        return [
            path
            for path, pairs in drawn.items()
            if len(pairs) == len(keys) and not interval(differences(pairs, self.resamples)).excludes_zero
        ]


def mark(board: Board, directory: Path | None, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Fill the board's `unsure` (group, precision, path of a metric) and the sentence that explains the sign."""
    rows = [(group, bits, results) for group in board.groups for bits, results in group.cells.items()]
    if directory is None or not rows:
        return
    significance = Significance(directory)
    unsure: set[tuple[int, str, str]] = set()
    missing = 0
    for done, (group, bits, results) in enumerate(rows, 1):
        if progress is not None:
            progress("resampling the changes", done, len(rows))
        found = None
        if group.fp32 is not None and group.fp32_own:
            found = significance.not_significant(group.fp32["cell_key"], [result["cell_key"] for result in results])
        missing += found is None
        unsure.update((group.index, bits, path) for path in found or ())
    significance.save()
    board.unsure = frozenset(unsure)
    without = "per-image outputs were not kept or are damaged"
    board.unsure_note = (
        f"{SIGN.strip()} not significant: the 95 % interval of Δ, by a paired bootstrap over images and seeds, "
        "holds 0. Where nothing differs at all, one Δ in twenty still lacks the sign by chance."
    )
    if missing == len(rows):
        board.unsure_note = f"No change is marked as possible chance: {without} (see docs/compare.md)."
    elif missing:
        board.unsure_note += f" {count(missing, 'row has', 'rows have')} no marks, as {without}."
