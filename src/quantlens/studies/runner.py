"""Runs a study: every model, method, precision and seed, each finished cell written to the store at once.

A cell's key is a hash of everything that determines its metrics; so a finished cell is never run again, a study that
was killed carries on where it was, and a changed study runs only what changed.

For each model: load it once per worker, decode each image set once, measure FP32 once; its Result is the reference of
all quantized cells of that model. The driver hands cells to workers, takes in what they measured, and alone writes the
store; where workers are is the executor's business (`executors/`). A worker that dies is replaced, and its cell run
again; a driver that is killed takes its workers with it.
"""

import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlens.ambient import isolated
from quantlens.errors import QuantlensError, QuantlensWarning, UnknownNameError
from quantlens.plugins import given
from quantlens.studies.backend import Backend
from quantlens.studies.config import StudyConfig, parse_config
from quantlens.studies.executors.local import Here, Process, processes
from quantlens.studies.executors.ray import Actor, actors
from quantlens.studies.measuring import Heard, Outcome, Stop, told
from quantlens.studies.progress import Quiet, display
from quantlens.studies.session import Group, Session, Summary, Task

__all__ = ["StudyInterrupted", "Summary", "run_study"]


EXECUTORS = ("local", "ray")
"""The names that `run_study` and `--executor` take."""

RETRIES = 2
"""How often a cell is run again whose worker died."""

POLL_SECONDS = 1.0

WAIT_SECONDS = 60.0
"""After so long without a worker the person is told what the study waits for."""


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study. `str()` says what is in the store and how to carry on."""


@isolated
def run_study(
    config: StudyConfig | Mapping[str, Any],
    out_dir: str | os.PathLike[str],
    *,
    workers: int | None = None,
    executor: str = "local",
    address: str | None = None,
    gpus_per_worker: float | None = None,
    progress: bool | Quiet = True,
    retry_failed: bool = False,
    limit: int | None = None,
    backend: Backend | None = None,
) -> Summary:
    """Run what is not finished yet of a study, and keep it in `out_dir/store.sqlite`.

    executor: "local", or "ray" for a Ray cluster. workers: that share the work, by default one, in this process, and on
    a cluster as many as find room there. address: of the cluster ("auto": the one this machine belongs to); without it
    one is started for the time of the study. gpus_per_worker: instead of `resources: {gpu: …}` of the study.
    progress: a live bar on stderr, or a display of your own. retry_failed: run cells again that failed before. limit:
    run at most so many cells now.

    A cell that raises is recorded as failed with its traceback and the rest goes on. What would stop every cell (images
    that cannot be read, a full disk, another process that runs a study in `out_dir`) raises QuantlensError. Ctrl-C
    raises `StudyInterrupted`; the store is whole at every moment, and the same call carries on.
    """
    started = time.monotonic()
    if not isinstance(config, StudyConfig):
        config = parse_config(dict(config))
    # what was loaded in this process, workers must load too
    config = config.model_copy(update={"plugins": tuple(dict.fromkeys([*config.plugins, *given()]))})
    for name, value in (("workers", workers), ("limit", limit)):
        if value is not None and value < 1:
            raise QuantlensError(f"{name} is {value}; give at least 1")
    if executor not in EXECUTORS:
        raise UnknownNameError("executor", executor, EXECUTORS)
    resources = config.resources
    if gpus_per_worker is not None:
        asked = {"resources": {"cpu": resources.cpu, "gpu": gpus_per_worker}}
        resources = parse_config(config.to_dict() | asked, where=f"--gpus-per-worker {gpus_per_worker:g}").resources
    if executor == "local" and (address is not None or gpus_per_worker is not None):
        raise QuantlensError("an address and GPUs per worker are for a cluster; add --executor ray")
    session = Session(
        config,
        Path(out_dir),
        backend or Backend(),
        display(progress),
        retry_failed=retry_failed,
        limit=limit,
        device="cpu" if executor == "ray" else None,  # the driver's machine may lack the GPU that its workers have
    )
    try:
        with session.running():
            ray = executor == "ray"
            room = actors(session, workers, address, resources) if ray else processes(session, workers)
            with room as (slots, what):
                Driver(session, slots, what).run()
    except KeyboardInterrupt:
        raise StudyInterrupted(session.interrupted()) from None
    return replace(session.summary(), seconds=time.monotonic() - started)


# ---- the driver ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Place:
    """Room for one worker at a time. group: the model that it has loaded; seeds: those of that model it has calibration
    images of. asked: what it does ("start", "load", "run"; "" where it is idle); task: the cell that it runs; outcome:
    of a cell that was measured before the FP32 cell it is compared with (its worker waits, too)."""

    slot: Here | Process | Actor
    group: Group | None = None
    seeds: set[int] = field(default_factory=set)
    asked: str = ""
    answer: Future[Any] | None = None
    task: Task | None = None
    outcome: Outcome | None = None

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method of the worker."""
        self.asked, self.answer = method, self.slot.submit(method, *arguments)

    def rest(self) -> None:
        """The worker has nothing to do."""
        self.asked, self.task, self.outcome = "", None, None


class Driver:
    """Keeps every worker busy. what: the workers in words ("2 processes"), for the person."""

    def __init__(self, session: Session, slots: Sequence[Here | Process | Actor], what: str = "") -> None:
        self.session, self.what = session, what
        self.places = [Place(slot) for slot in slots]
        self.deaths: Counter[Any] = Counter()
        self.warned: set[str] = set()

    def run(self) -> None:
        """Run all that is left, or as much as the limit says."""
        shown = self.session.shown
        shown.parallel = len(self.places)
        if self.what:
            shown.working(self.what)
        for place in self.places:
            place.ask("start")
        began, said = time.monotonic(), False
        while True:
            self.dispatch()
            working = any(place.asked in ("load", "run") for place in self.places)
            if not working and (self.spent() or not any(group.left for group in self.session.groups)):
                return
            if not working and not said and time.monotonic() - began > WAIT_SECONDS:
                shown.message(f"waiting for room for {self.what}")
                said = True
            answers = {place.answer: place for place in self.places if place.answer is not None}
            done, _ = wait(answers, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for answer in done:
                self.receive(answers[answer], answer)

    def spent(self) -> bool:
        """Whether the limit is reached once the cells that run have ended."""
        return self.session.limit is not None and self.session.ran + len(self.running()) >= self.session.limit

    def running(self) -> list[Task]:
        """The cells that workers measure now, or hold."""
        return [place.task for place in self.places if place.task is not None]

    def free(self, group: Group) -> list[Task]:
        """The cells of a model that are neither finished nor in work."""
        taken = self.running()
        return [task for task in group.left if task not in taken]

    # -- giving out work --

    def dispatch(self) -> None:
        """Give every idle worker something to do, if there is something."""
        for place in self.places:
            if place.asked:
                continue
            if self.spent():
                return
            group = place.group
            task = self.choose(group, place) if group is not None and group.known else None
            if group is not None and task is not None:
                place.task = task
                place.seeds |= {task.cell.seed} if task.cell.needs_fp32 else set()
                place.ask("run", group.index, task.cell, group.checkpoint_sha256)
                continue
            other = self.next_model(place)
            if other is not None:
                place.group, place.seeds = other, set()
                place.ask("load", other.index)

    def next_model(self, place: Place) -> Group | None:
        """The model with the most cells for each of its workers, other than the one that the worker has."""
        crowd = Counter(p.group.index for p in self.places if p is not place and p.group is not None)
        free = {g.index: len(self.free(g)) for g in self.session.groups if g is not place.group}
        wanted = [g for g in self.session.groups if free.get(g.index)]
        return max(wanted, key=lambda g: (free[g.index] / (1 + crowd[g.index]), -g.index), default=None)

    def choose(self, group: Group, place: Place) -> Task | None:
        """A cell of the model that the worker has loaded: FP32 first; beside other workers a seed that it has
        calibrated on, or else one that none of them has."""
        free = self.free(group)
        others = [p.seeds for p in self.places if p is not place and p.group is group]
        if not free or group.fp32 in free or not others:
            return group.fp32 if group.fp32 in free else next(iter(free), None)
        elsewhere = set().union(*others)
        return min(free, key=lambda task: task.cell.seed not in place.seeds and 1 + (task.cell.seed in elsewhere))

    # -- taking in results --

    def receive(self, place: Place, answer: Future[Any]) -> None:
        """Note what a worker answered, and keep the cell."""
        place.answer, error = None, answer.exception()
        if error is not None and (died := place.slot.death(error)):
            self.replace(place, died)
            return
        if error is not None and place.asked == "start":
            raise QuantlensError(f"a worker could not be started: {str(error).splitlines()[-1]}") from error
        found = self.heard(answer.result()) if error is None else Outcome(None, told(error), 0.0)
        if isinstance(found, Stop):
            raise QuantlensError(found.message)
        group = place.group
        if place.asked == "run":
            self.finished(place, found)
            return
        if group is not None and not group.known:
            if isinstance(found, Outcome):
                self.session.not_loaded(group, str(found.error))
            else:
                self.session.know(group, *found)
                self.give_up(group)
        place.rest()

    def heard(self, found: Heard) -> Any:
        """A worker's answer; what it warned of is told once of all workers."""
        for text in dict.fromkeys(found.warnings):
            if text not in self.warned:
                self.warned.add(text)
                warnings.warn(text, QuantlensWarning, stacklevel=2)
        return found.answer

    def finished(self, place: Place, outcome: Outcome) -> None:
        """Keep a cell, once the FP32 cell it is compared with is there; the worker is idle again."""
        group, task = place.group, place.task
        assert group is not None
        assert task is not None
        if task.cell.needs_fp32 and outcome.error is None and group.fp32 in group.left:
            place.outcome = outcome
            return
        self.session.keep(task, group, outcome)
        place.rest()
        if task is group.fp32:
            for other in self.places:
                if other.group is group and other.outcome is not None:
                    self.finished(other, other.outcome)
            self.give_up(group)

    def give_up(self, group: Group) -> None:
        """Where FP32 could not be measured, nothing can be compared with it: those cells failed."""
        affected = [task for task in self.free(group) if task.cell.needs_fp32]
        if group.fp32 in group.left or not affected:
            return
        try:
            self.session.reference(group)
        except QuantlensError as error:
            for task in affected:
                if not self.spent():
                    self.session.keep(task, group, Outcome(None, told(error), 0.0))

    def replace(self, place: Place, died: str) -> None:
        """A worker died: another takes its place; what it did is done again, by whoever is free first."""
        group, task = place.group, place.task
        about = task or group or place
        self.deaths[about] += 1
        loading = "its start" if group is None else f"loading {group.model.label}"
        what = str(task.cell) if task else loading
        if self.deaths[about] <= RETRIES:
            self.session.shown.message(f"a worker {died} (out of memory?) at {what}; this is done again")
        elif group is None:
            raise QuantlensError(
                f"a worker process {died} as it began, {RETRIES + 1} times; a script that runs a study with several "
                "workers does so under `if __name__ == '__main__':`"
            )
        else:
            text = f"a worker {died} at {what}, {RETRIES + 1} times (out of memory?); give each worker more room"
            if task is None:
                self.session.not_loaded(group, text)
            else:
                self.finished(place, Outcome(None, text, 0.0))
        place.slot.replace()
        place.rest()
        place.group, place.seeds = None, set()
        place.ask("start")
