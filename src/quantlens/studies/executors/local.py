"""Cells in this process, or in several processes of this machine that share the store."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.evaluation.environment import cores
from quantlens.studies.backend import Backend
from quantlens.studies.cells import PlannedCell
from quantlens.studies.config import StudyConfig
from quantlens.studies.progress import Quiet
from quantlens.studies.session import POLL_SECONDS, Group, Session
from quantlens.studies.specs import label, reason
from quantlens.studies.work import ModelWork, full_disk, is_full_disk, stops, told

# ---- this process ----------------------------------------------------------------------------------------------------


def run_here(session: Session) -> None:
    """Run all that can be run; then wait for what other processes hold, and take over what they leave."""
    groups, desk = session.groups(), _Desk(session)
    session.shown.start(len(session.cells), 0)
    with session.beating():
        for group in groups:
            if session.spent():
                return
            _run_group(session, group, desk)
        said = False
        while any(group.left for group in groups) and not session.spent():
            if not said:
                held = sum(len(group.left) for group in groups)
                session.shown.message(f"waiting for {held} cells that other processes run on this store")
                said = True
            time.sleep(POLL_SECONDS)
            for group in groups:
                if group.left and session.ready(group):
                    _run_group(session, group, desk)
                    said = False


class _Desk:
    """The one model that this process has loaded; it stays while the process waits for another's FP32 figures."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._label = ""
        self._work: ModelWork | None = None

    def work(self, group: Group) -> ModelWork:
        """The model of a group; the one before it is given up."""
        if self._work is None or self._label != group.model.label:
            self.clear()
            self.session.shown.working(f"loading {group.model.label}")
            self._work, self._label = self.session.work(group.model), group.model.label
        return self._work

    def clear(self) -> None:
        """Give up the model, if there is one."""
        if self._work is not None:
            self._work = None
            self.session.backend.free(more_to_come=False)


def _run_group(session: Session, group: Group, desk: _Desk) -> None:
    """All cells of one model that are free."""
    try:
        work = desk.work(group)
    except Exception as error:
        if stops(error):
            raise
        session.not_loaded(group, told(error))
        return
    session.know(group, work.checkpoint_sha256, work.preprocess)
    if group.left:
        work.decode()
        _run_cells(session, group, work)
    del work
    if not group.left:
        desk.clear()


def _run_cells(session: Session, group: Group, work: ModelWork) -> None:
    waits = False  # another process measures FP32, the reference of all but inspections
    for cell in list(group.left):
        if session.spent():
            return
        if waits and cell.needs_fp32:
            continue
        outcome = _run_cell(session, cell, group, work)
        waits = waits or (outcome == "taken" and cell.method is None)
        if outcome != "taken":
            group.left.remove(cell)


def _run_cell(session: Session, cell: PlannedCell, group: Group, work: ModelWork) -> str:
    """Claim and run one cell. "mine" when it ran, "taken" by another process, or finished already."""
    outcome = session.claim(cell, group)
    if outcome == "mine":
        session.shown.working(str(cell))
        session.keep(cell, group, work.attempt(cell, lambda: session.reference(group)))
    return outcome


# ---- several processes -----------------------------------------------------------------------------------------------


def run_workers(session: Session, workers: int) -> None:
    """Start worker processes on this store, and show how it fills."""
    context = multiprocessing.get_context("spawn")
    heard, report = context.Pipe(duplex=False)
    threads = max(1, cores() // workers)
    arguments = (session.config, session.directory, session.backend, session.retry_before, threads, os.getpid(), report)
    processes = [
        context.Process(target=_worker, args=(*arguments, limit), name=f"quantlens-worker-{i}")
        for i, limit in enumerate(_shares(session.limit, workers))
    ]
    mark = session.store.last()
    session.shown.start(len(session.cells), 0)
    session.shown.parallel = len(processes)
    session.shown.working(f"{len(processes)} processes")
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # Workers that are ended leave locks of their libraries behind, which Python removes, and says so.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
    }
    with _no_interrupts(), environment(variables):
        for process in processes:
            process.start()
    ears = _Ears(heard)
    try:
        _watch(session, processes, mark, ears)
    except KeyboardInterrupt:
        for process in processes:  # their claims are void once they are gone
            process.terminate()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        raise
    for process in processes:
        process.join()
    ears.listen()
    if ears.errors:
        raise QuantlensError(ears.errors[0])
    crashed = [p for p in processes if p.exitcode]
    if not crashed:
        return
    ended = f"{len(crashed)} of {workers} workers ended with exit code {crashed[0].exitcode} (out of memory?)"
    counts = session.counts()
    if counts["done"] + counts["failed"] < len(session.cells):
        raise QuantlensError(
            f"{ended}; finished cells are kept: run the same command again, perhaps with fewer workers"
        )
    session.shown.message(f"{ended}; the others took over its cells")


class _Mouth(Quiet):
    """A worker's display: it tells the process that started it which cells it puts into the store, before it does."""

    def __init__(self, report: Any) -> None:
        super().__init__()
        self.report = report

    def storing(self, key: str) -> None:
        with suppress(OSError):  # who started this worker is gone; the cell is kept all the same
            self.report.send(("cell", key))


class _Ears:
    """What the workers of this process have said: the keys of the cells they put into the store, what stopped them."""

    def __init__(self, heard: Any) -> None:
        self.heard = heard
        self.cells: set[str] = set()
        self.errors: list[str] = []

    def listen(self) -> None:
        while self.heard.poll():
            kind, text = self.heard.recv()
            if kind == "cell":
                self.cells.add(text)
            else:
                self.errors.append(text)


def _watch(session: Session, processes: Sequence[Any], mark: int, ears: _Ears) -> None:
    """Show the cells as the workers put them into the store, until no worker is alive; what others put there counts as
    finished by them. `mark`: see `Store.since`."""
    known = failures = 0
    alive = True
    while alive:
        alive = any(p.is_alive() for p in processes)
        time.sleep(0.3 if alive else 0)
        rows = session.store.since(mark)
        ears.listen()  # after the store was read: a worker tells of a cell before it is there
        for number, key, spec, seconds, error in rows:
            mark = number
            if key not in ears.cells:  # another run's, perhaps of another study
                continue
            kind = "fp32" if spec["method_name"] == "fp32" else str(spec["method"])
            kind = "inspection" if spec.get("inspects") else kind
            session.ran += 1
            failures += error is not None
            session.shown.finished(kind, label(spec), seconds, None if error is None else reason(error))
        counts = session.counts()
        earlier = counts["done"] - (session.ran - failures)
        if session.retry_before is None:
            earlier += counts["failed"] - failures
        if earlier > known:
            session.shown.skipped(earlier - known)
            known = earlier


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started inside inherit, unless the person has set them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _shares(limit: int | None, workers: int) -> Sequence[int | None]:
    """A limit divided among workers."""
    if limit is None:
        return [None] * workers
    return [limit // workers + (i < limit % workers) for i in range(min(workers, max(1, limit)))]


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: their parent ends them, in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker(
    config: StudyConfig,
    directory: Path,
    backend: Backend,
    retry_before: str | None,
    threads: int,
    parent: int,
    report: Any,
    limit: int | None,
) -> None:
    """One worker process. The cells it stores, and errors a person can mend as a sentence, go back to the parent."""
    try:
        backend.set_threads(threads)
        session = Session(config, directory, backend, _Mouth(report), retry_before, limit, parent=parent)
        try:
            run_here(session)
        finally:
            session.close()
    except QuantlensError as error:
        report.send(("error", str(error)))
    except OSError as error:
        if not is_full_disk(error):
            raise
        report.send(("error", full_disk(error)))
    # The store is closed. What destructors of libraries still say (nanobind under triton lists its leaks) helps nobody.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
