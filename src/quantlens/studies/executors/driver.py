"""The loop of every study: it hands cells to workers, takes in what they measured, and alone writes the store.

A worker that dies is replaced, and its cell run again; what others do is not touched. A driver that is killed takes its
workers with it; started again it goes on with the cells that are not in the store.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.studies.executors.local import Here, Process
from quantlens.studies.executors.ray import Actor
from quantlens.studies.executors.worker import Stop
from quantlens.studies.measuring import Outcome, told
from quantlens.studies.session import Group, Session, Task

RETRIES = 2
"""How often a cell is run again whose worker died."""

POLL_SECONDS = 1.0

WAIT_SECONDS = 60.0
"""After so long without a worker the person is told what the study waits for."""


@dataclass(eq=False)
class Place:
    """Room for one worker at a time, the model that it has loaded, and the seeds of that model it has calibration
    images of."""

    slot: Here | Process | Actor
    group: Group | None = None
    seeds: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Job:
    """What a worker was asked: to start, to load a model, or to run a cell of it."""

    place: Place
    group: Group | None = None
    task: Task | None = None


class Driver:
    """Keeps every worker busy. what: the workers in words ("2 processes"), for the person."""

    def __init__(self, session: Session, slots: Sequence[Here | Process | Actor], what: str = "") -> None:
        self.session, self.what = session, what
        self.places = [Place(slot) for slot in slots]
        self.idle: list[Place] = []
        self.jobs: dict[Future[Any], Job] = {}
        self.waiting: list[tuple[Job, Outcome]] = []
        """Cells that were measured before the FP32 cell they are compared with; their workers wait too."""
        self.deaths: Counter[Any] = Counter()

    def run(self) -> None:
        """Run all that is left, or as much as the limit says."""
        shown = self.session.shown
        shown.parallel = len(self.places)
        if self.what:
            shown.working(self.what)
        for place in self.places:
            self.ask(Job(place), "start")
        began, said = time.monotonic(), False
        while True:
            self.dispatch()
            working = [job for job in self.jobs.values() if job.group is not None]
            if not working and (self.spent() or not any(group.left for group in self.session.groups)):
                return
            if not working and not said and time.monotonic() - began > WAIT_SECONDS:
                shown.message(f"waiting for room for {self.what}")
                said = True
            done, _ = wait(list(self.jobs), timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for answer in done:
                self.receive(self.jobs.pop(answer), answer)

    def spent(self) -> bool:
        """Whether the limit is reached once the cells that run have ended."""
        at_work = len(self.running()) + len(self.waiting)
        return self.session.limit is not None and self.session.ran + at_work >= self.session.limit

    def running(self) -> list[Task]:
        """The cells that workers measure now."""
        return [job.task for job in self.jobs.values() if job.task is not None]

    def free(self, group: Group) -> list[Task]:
        """The cells of a model that are neither finished nor in work."""
        taken = [*self.running(), *(job.task for job, _ in self.waiting)]
        return [task for task in group.left if task not in taken]

    # -- giving out work --

    def ask(self, job: Job, method: str, *arguments: Any) -> None:
        """Ask a worker for something."""
        self.jobs[job.place.slot.submit(method, *arguments)] = job

    def dispatch(self) -> None:
        """Give every idle worker something to do, if there is something."""
        for place in list(self.idle):
            if self.spent():
                return
            group = place.group
            task = None if group is None or not group.known else self.choose(group, place)
            if group is not None and task is not None:
                self.idle.remove(place)
                place.seeds |= {task.cell.seed} if task.cell.needs_fp32 else set()
                self.ask(Job(place, group, task), "run", group.index, task.cell, group.checkpoint_sha256)
                continue
            other = self.next_model(place)
            if other is not None:
                self.idle.remove(place)
                place.group, place.seeds = other, set()
                self.ask(Job(place, other), "load", other.index)

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
        if not free or group.fp32 in free:
            return group.fp32 if free else None
        others = [p.seeds for p in self.places if p is not place and p.group is group]
        if not others:
            return free[0]
        elsewhere = set().union(*others)
        return min(free, key=lambda task: task.cell.seed not in place.seeds and 1 + (task.cell.seed in elsewhere))

    # -- taking in results --

    def receive(self, job: Job, answer: Future[Any]) -> None:
        """Note what a worker answered, and keep the cell."""
        error = answer.exception()
        if error is not None and (died := job.place.slot.death(error)):
            self.replace(job, died)
            return
        if error is not None and job.group is None:
            raise QuantlensError(f"a worker could not be started: {str(error).splitlines()[-1]}") from error
        found = answer.result() if error is None else Outcome(None, told(error), 0.0)
        if isinstance(found, Stop):
            raise QuantlensError(found.message)
        if job.task is not None:
            self.finished(job, found)
            return
        if job.group is not None and not job.group.known:
            if isinstance(found, Outcome):
                self.session.not_loaded(job.group, str(found.error))
            else:
                self.session.know(job.group, *found)
                self.give_up(job.group)
        self.idle.append(job.place)

    def finished(self, job: Job, outcome: Outcome) -> None:
        """Keep a cell, once the FP32 cell it is compared with is there; the worker is idle again."""
        group, task = job.group, job.task
        assert group is not None
        assert task is not None
        if task.cell.needs_fp32 and outcome.error is None and group.fp32 in group.left:
            self.waiting.append((job, outcome))
            return
        self.session.keep(task, group, outcome)
        self.idle.append(job.place)
        if task is group.fp32:
            ready = [one for one in self.waiting if one[0].group is group]
            self.waiting = [one for one in self.waiting if one not in ready]
            for one in ready:
                self.finished(*one)
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

    def replace(self, job: Job, died: str) -> None:
        """A worker died: another takes its place; what it did is done again, by whoever is free first."""
        place, group, task = job.place, job.group, job.task
        about = task or group or place
        self.deaths[about] += 1
        if group is None and self.deaths[about] > RETRIES:
            raise QuantlensError(
                f"a worker process {died} as it began, {RETRIES + 1} times; a script that runs a study with several "
                "workers does so under `if __name__ == '__main__':`"
            )
        what = "its start" if group is None else f"loading {group.model.label}" if task is None else str(task.cell)
        if self.deaths[about] <= RETRIES:
            self.session.shown.message(f"a worker {died} (out of memory?) at {what}; this is done again")
        elif group is not None:
            text = f"a worker {died} at {what}, {RETRIES + 1} times (out of memory?); give each worker more room"
            if task is None:
                self.session.not_loaded(group, text)
            else:
                self.finished(job, Outcome(None, text, 0.0))
                self.idle.remove(place)
        place.slot.replace()
        place.group, place.seeds = None, set()
        self.ask(Job(place), "start")
