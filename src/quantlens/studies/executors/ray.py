"""Cells on a Ray cluster. The driver plans, claims and alone writes the store; workers measure.

SQLite must not be shared over a network, and a result is small, so results travel to the driver, one cell at a time,
as they finish. Ray starts a worker that dies again and retries its cell. A driver that is killed takes its workers
with it; started again it goes on with the cells that are not in the store.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.studies.cells import PlannedCell, Slot
from quantlens.studies.config import ResourcesSpec
from quantlens.studies.executors.cluster import Share, connected, load_ray, share
from quantlens.studies.executors.remote import Loaded, Stop, Worker
from quantlens.studies.session import POLL_SECONDS, Group, Session
from quantlens.studies.work import Outcome

RETRIES = 2
"""How often a cell is run again whose worker died."""

WAIT_SECONDS = 60.0
"""After so long without a worker the person is told what the study waits for."""


def run_on_ray(session: Session, workers: int | None, address: str | None, resources: ResourcesSpec) -> None:
    """Run the study on the cluster at `address` (see `cluster.connected`); workers None: as many as find room."""
    ray = load_ray()
    with connected(ray, address, workers, resources), session.beating():
        part = share(ray, workers, resources, session.config.device, len(session.cells))
        driver = _Driver(ray, session, part)
        try:
            driver.run()
        finally:
            driver.end()


@dataclass(eq=False)
class _Actor:
    """A worker, the model it has loaded, and the seeds of that model it has calibration images and statistics of."""

    handle: Any
    model: int | None = None
    seeds: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Job:
    """What a worker was asked: to start, to load a model, or to run a cell of it."""

    actor: _Actor
    index: int | None = None
    cell: PlannedCell | None = None


@dataclass
class _Model:
    """A group with what the driver knows of it."""

    index: int
    group: Group
    known: bool = False
    checkpoint_sha256: str | None = None
    running: list[PlannedCell] = field(default_factory=list)
    held: dict[Slot, float] = field(default_factory=dict)
    """Slots of cells that another process holds -> when to ask again."""
    reference: Any = None
    """The FP32 result in Ray's object store; while a worker measures it, the reference of its answer in a list."""

    @property
    def free(self) -> list[PlannedCell]:
        return [cell for cell in self.group.left if cell not in self.running]

    def waits_for_fp32(self) -> bool:
        """Whether FP32 is missing and no worker of this cluster measures it."""
        return self.known and self.group.fp32 in self.free


class _Driver:
    """The loop that keeps every worker busy."""

    def __init__(self, ray: Any, session: Session, part: Share) -> None:
        self.ray, self.session, self.part = ray, session, part
        self.models = [_Model(i, group) for i, group in enumerate(session.groups())]
        self.jobs: dict[Any, _Job] = {}
        self.idle: list[_Actor] = []
        self.actors: list[_Actor] = []

    def end(self) -> None:
        """End the workers. Those that have not begun yet end by themselves, as nobody holds them any more."""
        starting = [job.actor for job in self.jobs.values() if job.index is None]
        for actor in self.actors:
            if actor not in starting:
                self.ray.kill(actor.handle)

    def run(self) -> None:
        session, shown = self.session, self.session.shown
        shown.start(len(session.cells), 0)
        shown.parallel = self.part.workers
        shown.working(str(self.part))
        self.start()
        began, said = time.monotonic(), False
        while True:
            self.dispatch()
            working = [job for job in self.jobs.values() if job.index is not None]
            if not working and (session.spent() or not any(m.group.left for m in self.models)):
                return
            if not self.idle and not working and not said and time.monotonic() - began > WAIT_SECONDS:
                shown.message(f"waiting for the cluster to find room for {self.part}")
                said = True
            if not working and self.idle and not said and all(m.known for m in self.models):
                shown.message(f"waiting for {self.left} cells that other processes run on this store")
                said = True
            if not self.jobs:
                time.sleep(POLL_SECONDS)
                continue
            done, _ = self.ray.wait(list(self.jobs), num_returns=1, timeout=POLL_SECONDS)
            for reference in done:
                self.receive(self.jobs.pop(reference), reference)
                said = False

    @property
    def left(self) -> int:
        """Cells that are not finished."""
        return sum(len(m.group.left) for m in self.models)

    def start(self) -> None:
        """Ask Ray for the workers; each of them begins as soon as there is room for it."""
        session = self.session
        remote = self.ray.remote(Worker).options(
            num_cpus=self.part.cpus, num_gpus=self.part.gpus, max_restarts=-1, max_task_retries=RETRIES
        )
        marks = session.images.marks()
        for _ in range(self.part.workers):
            actor = _Actor(remote.remote(session.config, session.backend, self.part.cpus, marks))
            self.actors.append(actor)
            self.jobs[actor.handle.start.remote()] = _Job(actor)

    # -- giving out work --

    def dispatch(self) -> None:
        """Give every idle worker something to do, if there is something."""
        for actor in list(self.idle):
            job = self.choose(actor)
            if job is None:
                continue
            self.idle.remove(actor)
            answer = self.send(job)
            self.jobs[answer] = job
            if job.cell is not None and job.index is not None and job.cell.kind == "fp32":
                self.models[job.index].reference = [answer]

    def choose(self, actor: _Actor) -> _Job | None:
        """A cell of the model the worker has loaded; else the model with the most cells for each of its workers."""
        session = self.session
        running = sum(len(m.running) for m in self.models)
        if session.spent() or (session.limit is not None and session.ran + running >= session.limit):
            return None
        if actor.model is not None:
            cell = self.take(self.models[actor.model], actor)
            if cell is not None:
                return _Job(actor, actor.model, cell)
        crowd = Counter(a.model for a in self.actors if a is not actor)
        others = [m for m in self.models if m.index != actor.model and m.free and not self.blocked(m)]
        if not others:
            return None
        best = max(others, key=lambda m: (len(m.free) / (1 + crowd[m.index]), -m.index))
        actor.model, actor.seeds = best.index, set()
        return _Job(actor, best.index)

    def blocked(self, model: _Model) -> bool:
        """Whether a further worker could do nothing for a model that others are at work on."""
        now = time.monotonic()
        waiting = all(model.held.get(cell.slot, 0.0) > now for cell in model.free)
        return model.known and waiting

    def take(self, model: _Model, actor: _Actor) -> PlannedCell | None:
        """Claim a cell of a model whose keys are known; while another process measures FP32, one that does without it
        (a worker of this cluster hands it over). A seed that the worker has calibrated on comes first, one that no
        other has next."""
        if not model.known:
            return None
        session, group, now = self.session, model.group, time.monotonic()
        wanted = model.free
        if model.waits_for_fp32():
            wanted = [cell for cell in wanted if not cell.needs_fp32]
        others = {seed for a in self.actors if a is not actor and a.model == model.index for seed in a.seeds}

        def strangeness(cell: PlannedCell) -> int:
            return 0 if cell.seed in actor.seeds else 1 + (cell.seed in others)

        for cell in sorted(wanted, key=strangeness):
            if cell in model.running or model.held.get(cell.slot, 0.0) > now:
                continue
            outcome = session.claim(cell, group)
            if outcome == "mine":
                model.running.append(cell)
                if cell.needs_fp32:
                    actor.seeds.add(cell.seed)
                return cell
            if outcome == "taken":
                model.held[cell.slot] = now + POLL_SECONDS
            else:
                group.left.remove(cell)
                if cell.method is None:
                    return self.take(model, actor)
        return None

    def send(self, job: _Job) -> Any:
        """Ask the worker; the reference of its answer."""
        assert job.index is not None
        if job.cell is None:
            return job.actor.handle.load.remote(job.index)
        model = self.models[job.index]
        baseline = None
        if job.cell.needs_fp32:
            try:
                baseline = self.baseline(model)
            except QuantlensError as error:
                return self.ray.put(Outcome(None, f"{type(error).__module__}.{type(error).__name__}: {error}", 0.0))
        return job.actor.handle.run.remote(job.index, job.cell, model.checkpoint_sha256, baseline)

    def baseline(self, model: _Model) -> Any:
        """The FP32 result of a model, or the promise of it; put into Ray's object store once."""
        if model.reference is None:
            model.reference = self.ray.put(self.session.reference(model.group).to_dict())
        return model.reference

    # -- taking in results --

    def receive(self, job: _Job, reference: Any) -> None:
        """Note what a worker answered, and keep the cell."""
        try:
            answer = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            answer = self.lost(job, error)
        if isinstance(answer, Stop):
            raise QuantlensError(answer.message)
        self.idle.append(job.actor)
        if job.index is None:
            return
        model = self.models[job.index]
        if job.cell is not None:
            self.session.keep(job.cell, model.group, answer)
            if job.cell.kind == "fp32":
                model.reference = None
            model.running.remove(job.cell)
            model.group.left.remove(job.cell)
        elif isinstance(answer, Loaded):
            if not model.known and model.group.left:
                model.known, model.checkpoint_sha256 = True, answer.checkpoint_sha256
                self.session.know(model.group, answer.checkpoint_sha256, answer.preprocess)
        elif not model.known:
            self.session.not_loaded(model.group, answer.error)

    def lost(self, job: _Job, error: BaseException) -> Outcome | Stop:
        """What became of a job whose worker died as often as Ray tries, or that Ray could not do."""
        text = str(error).strip()
        if job.index is None:
            return Stop(f"a Ray worker could not be started: {text.splitlines()[-1]}")
        died = isinstance(error, self.ray.exceptions.RayActorError)
        if died:
            text += f"\nthe worker died {RETRIES + 1} times in this cell (out of memory?); give each worker more room"
        return Outcome(None, text, 0.0)
