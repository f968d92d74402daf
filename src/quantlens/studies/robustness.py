"""How robust the cells of a study are under shift, beside their accuracy: what was measured, and 95 % intervals by a
bootstrap over images (and seeds), a corrupted image being drawn together with the image it was made of.

Resampling takes a second for a cell, so the intervals are kept in `DIR/outputs/robustness.json`; the keys of the cells
name them, and the file can be deleted at any time.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quantlens.errors import StorageError
from quantlens.evaluation import outputs as kept
from quantlens.evaluation.compare import Wanted, replicate
from quantlens.evaluation.result import CORRUPTED
from quantlens.files import write_whole
from quantlens.metrics.bootstrap import Array, Resamples, differences, interval
from quantlens.studies.board import Board, Group, change_of, dig
from quantlens.studies.text import BASELINE, Stat

VERSION, RESAMPLES = 1, 1000
EXTRA, RATIO = "extra", "relative_mce"
"""What corruption adds to the change of top-1 (that of corrupted images less that of the ID images), and the mean
corruption error as a ratio to FP32's."""
OF_SETS = ("top1", "nll", "ece")
OF_SPECTRUM = ("aupr_out", "auroc")


class Measured(NamedTuple):
    """A number, and its interval where per-image outputs are kept."""

    value: float
    low: float | None = None
    high: float | None = None


class Robustness(NamedTuple):
    """A group at a precision: its metrics by path ("shift_mean.corruptions.top1", "id.top1", …), and what quantization
    changed of them, with EXTRA and RATIO."""

    values: dict[str, Measured]
    changes: dict[str, Measured]


Ends = Mapping[str, Sequence[float]]


def has_shift(board: Board) -> bool:
    """Whether shifted images were measured."""
    return any(result.get("shift") for result in board.results)


def paths_of(board: Board) -> list[str]:
    """Paths of the metrics that are looked at: of the ID images, of the means over corruptions, of other shifted sets,
    and of OOD detection by the first score, without and with the shifted images."""
    of_sets = [("id",), *(("shift_mean", name) for name in parts_of(board)), *(("shift", n) for n in sets_of(board))]
    found = [(*part, name) for part in of_sets for name in OF_SETS]
    for part in ("ood_mean", "full_spectrum_mean"):
        found += [(part, group, board.score or "", name) for group in ("far", "near") for name in OF_SPECTRUM]
    return [".".join(path) for path in found]


def parts_of(board: Board) -> list[str]:
    """Names of the means over corruptions: of all severities, and of each."""
    return list(dict.fromkeys(name for result in board.results for name in result.get("shift_mean") or ()))


def sets_of(board: Board) -> list[str]:
    """Names of the shifted sets that are no corruptions."""
    from quantlens.evaluation.shift import corruption_of

    names = dict.fromkeys(name for result in board.results for name in result.get("shift") or ())
    return [name for name in names if corruption_of(name) is None]


def robustness(board: Board) -> dict[tuple[int, str], Robustness]:
    """Of every group (by its index) and precision that has shifted images."""
    found = vars(board).get("_robustness")
    if found is None:
        drawn, paths = _Intervals(board.directory), paths_of(board)
        found = {}
        for group in board.groups:
            for bits in board.precisions:
                if any(result.get("shift") for result in group.results(bits)):
                    found[group.index, bits] = _of(board, drawn, paths, group, bits)
        drawn.save()
        vars(board)["_robustness"] = found
    return dict(found)


def _of(board: Board, drawn: "_Intervals", paths: Sequence[str], group: Group, bits: str) -> Robustness:
    results = group.results(bits)
    values = {path: Stat.of(dig(result, tuple(path.split("."))) for result in results) for path in paths}
    changes: dict[str, Stat | None] = {}
    if bits != BASELINE:
        changes = {path: Stat.of(change_of(group, r, tuple(path.split("."))) for r in results) for path in paths}
        clean, corrupted = changes["id.top1"], changes.get(f"shift_mean.{CORRUPTED}.top1")
        changes[RATIO] = Stat.of(dig(result, ("shift_mean", CORRUPTED, RATIO)) for result in results)
        changes[EXTRA] = Stat.of([corrupted.mean - clean.mean]) if clean and corrupted else None
    ends = drawn.of(group, bits, board.score)

    def with_ends(stats: Mapping[str, Stat | None], intervals: Ends) -> dict[str, Measured]:
        return {path: Measured(stat.mean, *intervals.get(path, ())) for path, stat in stats.items() if stat is not None}

    return Robustness(with_ends(values, ends.get("values", {})), with_ends(changes, ends.get("changes", {})))


class _Intervals:
    """Intervals for the store in `directory` (None: there are none); call `save` when all has been asked."""

    def __init__(self, directory: Path | None) -> None:
        self.directory, self.resamples = directory, Resamples(RESAMPLES)
        self.known: dict[str, dict[str, dict[str, list[float]]]] = {}
        self.asked: dict[str, dict[str, dict[str, list[float]]]] = {}
        self.new = False
        if directory is not None:
            with suppress(OSError, ValueError, TypeError):
                self.known = dict(json.loads(self._file.read_text(encoding="utf-8")))
        self._drawn = lru_cache(maxsize=2)(self._replicate)

    @property
    def _file(self) -> Path:
        assert self.directory is not None
        return self.directory / kept.FOLDER / "robustness.json"

    def of(self, group: Group, bits: str, score: str | None) -> Mapping[str, Ends]:
        """{"values", "changes"}: {path: (low, high)} of a group at a precision; empty where not all outputs are kept
        and whole."""
        keys = [str(result.get("cell_key")) for result in group.results(bits)]
        own = bits != BASELINE and group.fp32_own and group.fp32 is not None
        baseline = str(group.fp32["cell_key"]) if own and group.fp32 is not None else None
        wanted = [*keys, *([] if baseline is None else [baseline])]
        if self.directory is None or not all(kept.path_of(self.directory, key).is_file() for key in wanted):
            return {}
        about = [str(VERSION), str(RESAMPLES), str(score), str(baseline), *keys]
        name = hashlib.sha256(" ".join(about).encode()).hexdigest()
        if name not in self.known:
            try:
                self.known[name] = self._measured(keys, baseline, score)
            except StorageError:
                return {}
            self.new = True
        self.asked[name] = self.known[name]
        return self.asked[name]

    def _measured(
        self, keys: Sequence[str], baseline: str | None, score: str | None
    ) -> dict[str, dict[str, list[float]]]:
        cells = [self._replicate(key, score) for key in keys]
        found = {"values": self._ends([({path: np.zeros(RESAMPLES) for path in cell}, cell) for cell in cells])}
        if baseline is not None:
            before = self._drawn(baseline, score)
            top1 = f"shift_mean.{CORRUPTED}.top1"
            pairs = [({path: before[path] for path in cell if path in before}, cell) for cell in cells]
            if top1 in before:
                for first, cell in pairs:
                    first[EXTRA], cell[EXTRA] = before[top1] - before["id.top1"], cell[top1] - cell["id.top1"]
                    errors = np.where(before[top1] < 1, 1 - before[top1], np.nan)
                    first[RATIO], cell[RATIO] = np.zeros(RESAMPLES), (1 - cell[top1]) / errors
            found["changes"] = self._ends(pairs)
        return found

    def _ends(self, pairs: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> dict[str, list[float]]:
        """{path: [low, high]} of what every second has of its first, over seeds."""
        common = [path for path in pairs[0][0] if all(path in one for pair in pairs for one in pair)]
        drawn = {path: differences([(a[path], b[path]) for a, b in pairs], self.resamples) for path in common}
        return {path: list(interval(values)[:2]) for path, values in drawn.items() if not np.isnan(values).all()}

    def _replicate(self, key: str, score: str | None) -> dict[str, Array]:
        """The metrics of a cell on every resample, by path."""
        assert self.directory is not None
        outputs = kept.read(kept.path_of(self.directory, key))
        scores = tuple(name for name in outputs.id_scores if name == score)
        wanted = Wanted(
            tuple(outputs.ood_scores) if scores else (), scores, (*OF_SETS, *OF_SPECTRUM), tuple(outputs.shift)
        )
        found = replicate(outputs, wanted, self.resamples)
        errors = [path for path in found if path.startswith("shift_mean.") and path.endswith(".mce")]
        return found | {path.replace(".mce", ".top1"): 1 - found[path] for path in errors}

    def save(self) -> None:
        """Keep the intervals for the next report; a store that cannot be written is left as it is."""
        if self.new:
            with suppress(StorageError):
                write_whole(self._file, json.dumps(self.asked, sort_keys=True))


def losses(board: Board) -> Iterable[tuple[Group, str, str, float, float]]:
    """(group, precision, corruption, top-1 of FP32, change of it) of every corruption in ImageNet-C's order, means over
    severities and seeds."""
    from quantlens.data.corruptions import CORRUPTIONS
    from quantlens.evaluation.shift import corruptions_among

    for group in board.groups:
        before = dig(group.fp32, ("shift",)) or {}
        known = corruptions_among(before).get(CORRUPTED, {})
        for bits in board.quantized:
            for corruption, names in ((one, known[one]) for one in CORRUPTIONS if one in known):
                after = [dig(result, ("shift", name, "top1")) for result in group.results(bits) for name in names]
                first, last = Stat.of(before[name].get("top1") for name in names), Stat.of(after)
                if first is not None and last is not None and last.n == len(after):
                    yield group, bits, corruption, first.mean, last.mean - first.mean
