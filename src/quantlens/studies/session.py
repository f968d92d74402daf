"""One run of a study on its store: what is planned, what is left, and how a finished cell is kept.

Executors decide where the work is done; all they know of the store goes through here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError, StorageError
from quantlens.evaluation.environment import choose_device, environment
from quantlens.evaluation.outputs import path_of
from quantlens.evaluation.result import Result
from quantlens.files import write_whole
from quantlens.metrics import choose_scores
from quantlens.studies.backend import Backend
from quantlens.studies.cells import (
    PlannedCell,
    StudyImages,
    cell_key,
    identity,
    label,
    plan_study,
    spec_of,
    weights_of,
)
from quantlens.studies.config import ModelSpec, StudyConfig
from quantlens.studies.measuring import Outcome, reason, told
from quantlens.studies.progress import Quiet
from quantlens.studies.store import INSPECTION, Store, relabelled


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


@dataclass(eq=False)
class Task:
    """A planned cell on its way to the store. identity: its name in the plan; key: that of its row, once its model has
    been loaded."""

    cell: PlannedCell
    identity: str
    spec: dict[str, Any]
    key: str = ""


@dataclass(eq=False)
class Group:
    """The cells of one model, and which of them are not finished. index: the model's place in the study."""

    index: int
    model: ModelSpec
    tasks: list[Task]
    left: list[Task] = field(default_factory=list)
    checkpoint_sha256: str | None = None
    reference: Any = None

    @property
    def known(self) -> bool:
        """Whether the model has been loaded, so that its cells have keys."""
        return bool(self.tasks[0].key)

    @property
    def fp32(self) -> Task:
        """The cell that the others are compared with."""
        return next(task for task in self.tasks if task.cell.method is None)


class Session:
    """One run of a study. retry_failed: cells that failed before run again. limit: cells to run at most. device: where
    cells run, by default as the study says."""

    def __init__(
        self,
        config: StudyConfig,
        directory: Path,
        backend: Backend,
        shown: Quiet,
        *,
        retry_failed: bool = False,
        limit: int | None = None,
        device: str | None = None,
    ) -> None:
        self.config, self.directory, self.backend, self.shown = config, directory, backend, shown
        self.retry_failed, self.limit = retry_failed, limit
        self.store = Store(directory)
        self.ran = 0

        cells = plan_study(config, backend)
        if config.scores is not None:
            choose_scores(config.scores)
        for model in config.models:
            backend.check_model(model.name, weights_of(model))
        self.device = choose_device(config.device if device is None else device)
        self.images = StudyImages.open(config)
        self.tasks = [Task(c, identity(c, config, self.images), spec_of(c, config, self.images)) for c in cells]
        self.groups = [
            Group(i, model, [t for t in self.tasks if t.cell.model == model]) for i, model in enumerate(config.models)
        ]
        for group in self.groups:
            group.left = list(group.tasks)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, this process alone runs a study on the store, and this study is its current one."""
        try:
            with self.store.driving():
                plan = [(task.identity, task.spec) for task in self.tasks]
                self.store.begin(self.config.name, self.config.to_dict(), environment(self.device), plan)
                self.shown.start(len(self.tasks))
                yield
        finally:
            self.shown.stop()
            self.store.close()

    def interrupted(self) -> str:
        """How the study stands after Ctrl-C, and how to carry on."""
        finished = 0
        with suppress(StorageError), self.store:
            finished = sum(self.store.counts().values())
        return (
            f"stopped; {finished} of {len(self.tasks)} cells are finished and kept in {self.store.path}; run the same "
            "command again to carry on"
        )

    def summary(self) -> Summary:
        """How the study stands."""
        with self.store:
            failed = [(label(cell.spec), reason(cell.error)) for cell in self.store.failures()]
            return Summary(self.directory, len(self.tasks), self.store.counts()["done"], self.ran, failed)

    # -- the cells of a model --

    def know(self, group: Group, checkpoint_sha256: str | None, preprocess: Mapping[str, Any]) -> None:
        """A group's model has been loaded: name its cells by their keys, and drop those that are finished."""
        group.checkpoint_sha256 = checkpoint_sha256
        for task in group.tasks:
            task.key = cell_key(task.cell, self.config, self.images, str(checkpoint_sha256), preprocess)
            task.spec |= {"checkpoint_sha256": checkpoint_sha256, "preprocess": dict(preprocess)}
        self.store.bind({task.identity: task.key for task in group.tasks})
        finished = self.store.statuses(task.key for task in group.tasks)
        wanted = (None, "failed") if self.retry_failed else (None,)
        self._drop(group, [task for task in group.left if finished.get(task.key) not in wanted])

    def reference(self, group: Group) -> Any:
        """The FP32 Result of a group's model, from the store. Raises QuantlensError where it could not be measured."""
        if group.reference is None:
            stored = self.store.cell(group.fp32.key)
            if stored is None or stored.result is None:
                why = "it is missing" if stored is None else reason(stored.error)
                raise QuantlensError(f"{group.model.label} could not be measured at FP32 ({why})")
            # Labels are a study's own; the evaluation knows the model by its method.
            group.reference = Result.from_dict({**stored.result, "method": "fp32"})
        return group.reference

    def keep(self, task: Task, group: Group, outcome: Outcome) -> None:
        """Write a finished cell to the store, compared with FP32, and before it the file of its per-image outputs."""
        if task.cell.needs_fp32 and outcome.result is not None:
            outcome = self._compared(outcome, group)
        result = None if outcome.result is None else relabelled(outcome.result, task.spec)
        if outcome.outputs is not None:
            write_whole(path_of(self.directory, task.key), outcome.outputs, what="the per-image outputs")
        self.store.put(
            task.key, task.spec, "done" if outcome.error is None else "failed", result, outcome.error, outcome.seconds
        )
        self.ran += 1
        error = None if outcome.error is None else reason(outcome.error)
        self.shown.finished(task.cell.kind, str(task.cell), outcome.seconds, error)
        group.left.remove(task)
        for other in self.groups:  # the same cell under another label
            self._drop(other, [twin for twin in other.left if twin.key == task.key])

    def _compared(self, outcome: Outcome, group: Group) -> Outcome:
        assert outcome.result is not None
        result = Result.from_dict(outcome.result)
        try:
            result.compare(self.reference(group))
        except QuantlensError as error:
            return Outcome(None, told(error), outcome.seconds)
        if result.task == "detect" and outcome.outputs is not None:
            from quantlens.evaluation.detection import compare_kept

            kept = compare_kept(result, outcome.outputs, path_of(self.directory, group.fp32.key))
            outcome = replace(outcome, outputs=kept)
        return replace(outcome, result=result.to_dict())

    def not_loaded(self, group: Group, error: str) -> None:
        """The model of a group cannot be loaded: its cells failed, and are tried again by every run."""
        for task in list(group.left):
            task.key = f"{INSPECTION if task.cell.inspects else ''}not-loaded-{task.identity}"
            self.store.bind({task.identity: task.key})
            self.keep(task, group, Outcome(None, error, 0.0))

    def _drop(self, group: Group, finished: list[Task]) -> None:
        """Forget cells that are finished."""
        self.shown.skipped(len(finished))
        group.left = [task for task in group.left if task not in finished]
