"""One process's hold on a study and its store: what is planned, what is left, and how a finished cell is kept.

Executors decide where the work is done; all they know of the store goes through here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError, StorageError
from quantlens.evaluation.outputs import path_of
from quantlens.files import write_whole
from quantlens.studies.backend import Backend
from quantlens.studies.cells import PlannedCell, Slot, StudyImages, cell_key, identity, plan_study, weights_of
from quantlens.studies.config import ModelSpec, StudyConfig
from quantlens.studies.progress import Quiet
from quantlens.studies.specs import label, reason, relabelled, spec_of
from quantlens.studies.store import INSPECTION, Owner, Store, to_json
from quantlens.studies.work import ModelWork, Outcome

HEARTBEAT_SECONDS = 20.0
POLL_SECONDS = 1.0


@dataclass
class Summary:
    """What a run did, and how the study stands after it."""

    directory: Path
    planned: int
    done: int
    ran: int
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def remaining(self) -> int:
        """Cells that are neither done nor failed (a limit stopped the run)."""
        return self.planned - self.done - len(self.failed)

    def __str__(self) -> str:
        text = f"{self.done} of {self.planned} cells done ({self.ran} in this run) in {self.directory}"
        if self.failed:
            text += f"; {len(self.failed)} failed"
        if self.remaining:
            text += f"; {self.remaining} still to run"
        return text


@dataclass
class Group:
    """The cells of one model, and which of them are not finished as far as this process knows."""

    model: ModelSpec
    cells: list[PlannedCell]
    keys: dict[Slot, str] = field(default_factory=dict)
    specs: dict[Slot, dict[str, Any]] = field(default_factory=dict)
    left: list[PlannedCell] = field(default_factory=list)
    reference: Any = None

    def __post_init__(self) -> None:
        self.left = list(self.cells)

    @property
    def fp32(self) -> PlannedCell:
        """The cell that all deltas are taken from."""
        return next(cell for cell in self.cells if cell.method is None)


class Session:
    """One process at work on a study.

    retry_before: cells that failed before this time run again. limit: cells to run at most. parent: the process that
    started this one as a worker; when it is gone the worker stops. device: where cells run, by default as the study
    says.
    """

    def __init__(
        self,
        config: StudyConfig,
        directory: Path,
        backend: Backend,
        shown: Quiet,
        retry_before: str | None = None,
        limit: int | None = None,
        *,
        parent: int | None = None,
        device: str | None = None,
    ) -> None:
        self.config, self.directory, self.backend, self.shown = config, directory, backend, shown
        self.retry_before, self.limit, self.parent = retry_before, limit, parent
        self.store = Store(directory)
        self.owner = Owner.me()
        self.ran = 0

        self.cells = plan_study(config, backend)
        if config.scores is not None:
            from quantlens.evaluation.scoring import choose_scores

            choose_scores(config.scores)
        for model in config.models:
            backend.check_model(model.name, weights_of(model))
        self.device = backend.device(config.device if device is None else device)
        self.images = StudyImages.open(config, backend)
        self.identities = {cell.slot: identity(cell, config, self.images) for cell in self.cells}

    # -- life --

    def begin(self) -> None:
        """Make this study the store's current one."""
        identities = list(self.identities.values())
        self.store.begin(self.config.name, self.config.to_dict(), self.backend.environment(self.device), identities)

    def close(self) -> None:
        """Give up this process's claims, and close the store."""
        with suppress(StorageError):  # what broke the store has been told already
            if self.store.exists():
                self.store.release(self.owner)
        self.store.close()

    def interrupted(self) -> str:
        """How the study stands after Ctrl-C, and how to carry on."""
        counts = {"done": 0, "failed": 0}
        with suppress(StorageError):
            counts = self.counts()
        finished = counts["done"] + counts["failed"]
        return (
            f"stopped; {finished} of {len(self.cells)} cells are finished and kept in {self.store.path}; run the same "
            "command again to carry on"
        )

    def summary(self) -> Summary:
        """How the study stands."""
        counts = self.counts()
        failed = [(label(spec), reason(error)) for spec, error in self.store.failures(self.identities.values())]
        self.store.close()
        return Summary(self.directory, len(self.cells), counts["done"], self.ran, failed)

    def counts(self) -> dict[str, int]:
        """How many of this study's cells are done and failed, whatever other studies the store holds."""
        return self.store.counts(self.identities.values())

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Keep this process's claims alive from a thread of its own."""
        over = threading.Event()

        def beat() -> None:
            with Store(self.directory) as store:
                while not over.wait(HEARTBEAT_SECONDS):
                    try:
                        store.beat(self.owner)
                    except StorageError:
                        store.close()  # the cell itself will report a store that stays broken

        thread = threading.Thread(target=beat, name="quantlens-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def spent(self) -> bool:
        """Whether to stop: the limit is reached, or the process that started this worker is gone."""
        if self.parent is not None and os.getppid() != self.parent:
            return True
        return self.limit is not None and self.ran >= self.limit

    # -- the cells of a model --

    def groups(self) -> list[Group]:
        """The cells, model by model."""
        return [Group(model, [c for c in self.cells if c.model == model]) for model in self.config.models]

    def work(self, spec: ModelSpec) -> ModelWork:
        """Load a model in this process."""
        return ModelWork(self.config, self.backend, self.images, self.device, spec, self.shown)

    def know(self, group: Group, checkpoint_sha256: str | None, preprocess: Mapping[str, Any]) -> None:
        """A group's model has been loaded: name its cells by their keys, and drop those that are finished."""
        for cell in group.cells:
            group.keys[cell.slot] = cell_key(cell, self.config, self.images, str(checkpoint_sha256), preprocess)
            group.specs[cell.slot] = spec_of(cell, self.config, self.images, checkpoint_sha256, preprocess)
        self.store.bind({self.identities[cell.slot]: group.keys[cell.slot] for cell in group.cells})
        self._relabel(group)
        self.drop_finished(group)

    def drop_finished(self, group: Group) -> None:
        """Forget the cells of a group that are finished, by an earlier run or by another process."""
        finished = self.store.finished((group.keys[cell.slot] for cell in group.left), self.retry_before)
        left = [cell for cell in group.left if group.keys[cell.slot] not in finished]
        self.shown.skipped(len(group.left) - len(left))
        group.left = left

    def ready(self, group: Group) -> bool:
        """Whether a cell of the group could be claimed now."""
        self.drop_finished(group)
        first = group.left[:1]
        waited_for = first if first and first[0].method is None else group.left
        return any(not self.store.taken(group.keys[cell.slot], self.owner) for cell in waited_for)

    def reference(self, group: Group) -> Any:
        """The FP32 Result of a group's model, from the store."""
        if group.reference is None:
            from quantlens.evaluation import Result

            stored = self.store.cell(group.keys[group.fp32.slot])
            if stored is None or stored.result is None:
                why = "it is missing" if stored is None else reason(stored.error)
                raise QuantlensError(f"{group.model.label} could not be measured at FP32 ({why})")
            # Labels are a study's own; the evaluation knows the model by its method.
            group.reference = Result.from_dict({**stored.result, "method": "fp32"})
        return group.reference

    def claim(self, cell: PlannedCell, group: Group) -> str:
        """Take a cell: "mine", "taken" by another process, or finished already ("done", "failed")."""
        outcome = self.store.claim(group.keys[cell.slot], self.owner, self.retry_before)
        if outcome in ("done", "failed"):
            self.shown.skipped(1)
        return outcome

    def keep(self, cell: PlannedCell, group: Group, outcome: Outcome) -> None:
        """Write a finished cell to the store, and before it the file of its per-image outputs."""
        spec = group.specs[cell.slot]
        key = group.keys[cell.slot]
        result = None if outcome.result is None else relabelled(outcome.result, spec)
        if outcome.outputs is not None:
            write_whole(path_of(self.directory, key), outcome.outputs, what="the per-image outputs")
        self.shown.storing(key)
        self.store.put(key, spec, outcome.status, result, outcome.error, outcome.seconds)
        self._tell(cell, outcome.seconds, outcome.error)

    def not_loaded(self, group: Group, error: str) -> None:
        """The model of a group cannot be loaded: its cells failed, and are tried again by every run."""
        for cell in list(group.left):
            mark = self.identities[cell.slot]
            key = f"{INSPECTION if cell.inspects else ''}not-loaded-{mark}"
            self.store.bind({mark: key})
            spec = spec_of(cell, self.config, self.images, None, None)
            self.shown.storing(key)
            self.store.put(key, spec, "failed", None, error, 0.0)
            group.left.remove(cell)
            self._tell(cell, 0.0, error)

    def _tell(self, cell: PlannedCell, seconds: float, error: str | None) -> None:
        self.ran += 1
        self.shown.finished(cell.kind, str(cell), seconds, None if error is None else reason(error))

    def _relabel(self, group: Group) -> None:
        """Give cells that were finished under other labels or paths those of this study."""
        for cell in group.cells:
            key, spec = group.keys[cell.slot], group.specs[cell.slot]
            if self.store.spec(key) in (None, to_json(spec)):
                continue
            known = self.store.cell(key)
            if known is not None:
                self.store.rewrite(key, spec, None if known.result is None else relabelled(known.result, spec))
