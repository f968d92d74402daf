"""Workers on this machine: one in this process, or several processes of their own."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from typing import Any

from quantlens.evaluation.environment import cores
from quantlens.studies.measuring import Worker
from quantlens.studies.session import Session

PATIENCE = 5.0
"""Seconds in which a worker that is told to end may still remove its temporary files."""


class Here:
    """A worker in this process: a call is answered when it returns."""

    def __init__(self, session: Session) -> None:
        self.worker = Worker(session.config, session.backend, images=session.images, shown=session.shown)

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_result(self.worker.call(method, *arguments))
        return answer

    def death(self, error: BaseException) -> str:
        return ""

    def replace(self) -> None:
        """It dies with this process alone."""


@contextmanager
def processes(session: Session, workers: int | None) -> "Iterator[tuple[list[Here] | list[Process], str]]":
    """One worker here, or so many processes, which end with this context, and within seconds of this process; and what
    they are in words."""
    if workers is None or workers == 1:
        yield [Here(session)], ""
        return
    threads = max(1, cores() // workers)
    slots = [Process(threads, (session.config, session.backend, threads, session.images.marks)) for _ in range(workers)]
    try:
        yield slots, f"{workers} processes"
    finally:
        for slot in slots:
            slot.end()
        for slot in slots:
            slot.join()


class Process:
    """A pool of one process, so that a process that dies breaks only what itself did. arguments: of its Worker."""

    def __init__(self, threads: int, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments
        self.variables = {
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            # Python removes the locks that a killed process leaves behind, and says so.
            "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        }
        self.context = _Context()
        self.pool = self._pool()
        self.answer: Future[Any] | None = None

    def _pool(self) -> ProcessPoolExecutor:
        with environment(self.variables):
            return ProcessPoolExecutor(1, mp_context=self.context, initializer=_begin, initargs=self.arguments)

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        try:
            with _interrupts_held(), environment(self.variables):  # as the first call starts the process
                self.answer = self.pool.submit(_call, method, *arguments)
        except BrokenExecutor as error:  # it died while it had nothing to do
            self.answer = Future()
            self.answer.set_exception(error)
        return self.answer

    def death(self, error: BaseException) -> str:
        if not isinstance(error, BrokenExecutor):
            return ""
        return f"ended with exit code {_exit_code(self.context.started[-1])}"

    def replace(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = self._pool()

    def end(self) -> None:
        """Let the process end, or tell it to leave what it does."""
        if self.answer is not None and not self.answer.done():
            self.context.started[-1].terminate()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait for its end, or bring it about."""
        for process in self.context.started:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


class _Context(SpawnContext):
    """Starts processes afresh, and remembers them: before Python 3.14 a pool has no way to end its own."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Any] = []

    def Process(self, *arguments: Any, **settings: Any) -> Any:  # type: ignore[override]
        self.started.append(super().Process(*arguments, **settings))
        return self.started[-1]


def _exit_code(process: Any) -> int | None:
    """Of a process that is ending. A pool waits for its process in a thread of its own: where that thread was told of
    the end, join() here returns before the code is known."""
    until = time.monotonic() + PATIENCE
    process.join(PATIENCE)
    while process.exitcode is None and time.monotonic() < until:
        time.sleep(0.01)
    code: int | None = process.exitcode
    return code


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started inside inherit, unless the person has set them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside do not hear Ctrl-C while they start: this process ends them, in order."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in the process --------------------------------------------------------------------------------------------------

_worker: Worker
_busy = False


def _begin(*arguments: Any) -> None:
    """The first thing a worker process does. arguments: of its Worker."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_watch, name="quantlens-watch", daemon=True).start()
    _worker = Worker(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    global _busy
    _busy = True
    try:
        return _worker.call(method, *arguments)
    except SystemExit:  # of _end: every `with` has been left by now, so temporary files are gone
        os._exit(128 + signal.SIGTERM)
    finally:
        _busy = False


def _end(number: int, frame: Any) -> None:
    """SIGTERM: leave what is being done. (The interpreter is not wound up: what the destructors of libraries then say
    helps nobody.)"""
    if _busy:
        raise SystemExit(128 + number)
    os._exit(0)


def _watch() -> None:
    """End with the process that started this one, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)
