"""Which changes by quantization are not significant: those whose 95 % interval holds 0 (see `evaluation.compare`).

The report asks for every cell at once, so the answers are kept in `DIR/outputs/significance.json`. They depend on the
cells alone, whose keys name them; the file can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from quantlens.errors import StorageError
from quantlens.evaluation import outputs as kept
from quantlens.evaluation.bootstrap import Wanted, replicate
from quantlens.evaluation.outputs import Outputs
from quantlens.files import write_whole
from quantlens.metrics.bootstrap import Array, Resamples, differences, interval

VERSION = 1
RESAMPLES = 1000
ASKED = ("top1", "nll", "ece", "aupr_out")


class Significance:
    """Answers for the store in `directory`; call `save` when all has been asked."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.file = directory / kept.FOLDER / "significance.json"
        self.resamples = Resamples(RESAMPLES)
        self.known = self._read()
        self.asked: dict[str, list[str]] = {}
        self._baseline: tuple[str, Outputs] | None = None
        self._replicas: dict[tuple[str, Wanted], dict[str, Array]] = {}

    def not_significant(self, baseline: str, keys: Sequence[str]) -> frozenset[str] | None:
        """Paths of the metrics ("id.top1", "ood_mean.far.msp.aupr_out", …) in which the cells `keys` (the seeds of one
        precision) do not differ from the FP32 cell `baseline`; None where not all outputs are kept and whole."""
        if not all(kept.path_of(self.directory, key).is_file() for key in (baseline, *keys)):
            return None
        name = hashlib.sha256(" ".join([str(VERSION), str(RESAMPLES), baseline, *keys]).encode()).hexdigest()
        if name not in self.known:
            try:
                self.known[name] = self._measured(baseline, keys)
            except StorageError:
                return None
        self.asked[name] = self.known[name]
        return frozenset(self.asked[name])

    def _measured(self, baseline: str, keys: Sequence[str]) -> list[str]:
        if self._baseline is None or self._baseline[0] != baseline:
            self._baseline = (baseline, kept.read(kept.path_of(self.directory, baseline)))
            self._replicas.clear()
        first = self._baseline[1]
        drawn: dict[str, list[tuple[Array, Array]]] = {}
        for key in keys:
            second = kept.read(kept.path_of(self.directory, key))
            if first.labels.tolist() != second.labels.tolist():
                raise StorageError(f"the per-image outputs {key} are not of the images of {baseline}")
            sets = tuple(s for s in first.ood_scores if s in second.ood_scores)
            wanted = Wanted(sets, tuple(s for s in first.id_scores if s in second.id_scores), ASKED)
            if (baseline, wanted) not in self._replicas:
                self._replicas[baseline, wanted] = replicate(first, wanted, self.resamples)
            before = self._replicas[baseline, wanted]
            for path, after in replicate(second, wanted, self.resamples).items():
                drawn.setdefault(path, []).append((before[path], after))
        return [
            path
            for path, pairs in drawn.items()
            if len(pairs) == len(keys) and not interval(differences(pairs, self.resamples)).excludes_zero
        ]

    def _read(self) -> dict[str, list[str]]:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            return {str(name): [str(path) for path in paths] for name, paths in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def save(self) -> None:
        """Keep the answers for the next report; a store that cannot be written is left as it is."""
        if self.asked and self._read() != self.asked:
            try:
                write_whole(self.file, json.dumps(self.asked, sort_keys=True))
            except StorageError:
                return
