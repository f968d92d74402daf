"""Studies in several processes, real kills, real signals: no stored cell is lost or run again, nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from study_fakes import FakeBackend, Recorder, config, surroundings

from quantlens.errors import QuantlensError, StorageError
from quantlens.studies.executors.local import _exit_code
from quantlens.studies.runner import StudyInterrupted, run_study
from quantlens.studies.store import Store

pytestmark = pytest.mark.process

CELLS = 9
ENDED_WITHIN = 10.0
"""Seconds after the end of a driver in which its workers end."""


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C works here and in what is started here, also where the tests were started in the background of a shell,
    which has its children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "study"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def run(out: Path, log: Path, study=None, backend: FakeBackend | None = None, **settings):
    backend = backend or FakeBackend(log)
    return run_study(study or config(), out, progress=False, backend=backend, **settings)


@pytest.fixture
def start(out: Path, log: Path) -> Iterator:
    """Starts a study in a process of its own; what is left of it and its workers at the end is killed."""
    started: list[subprocess.Popen] = []

    def begin(pause: float, settings: object = None, changes: object = None) -> subprocess.Popen:
        here, more = Path(__file__).parent, [json.dumps(x or {}) for x in (settings, changes)]
        started.append(
            subprocess.Popen(
                [sys.executable, str(here / "study_fakes.py"), str(out), str(log), str(pause), *more],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=surroundings(),
            )
        )
        return started[-1]

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(log: Path, lines: int, process: subprocess.Popen, word: str = "end ") -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count(word) < lines:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The worker processes among the children (Python's tracker of resources stays with its process)."""
    found = []
    for child in process.children():
        with suppress(psutil.Error):
            found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
    return found


def gone(processes: list[psutil.Process]) -> bool:
    """Whether they end within the time that they have for it."""
    return not psutil.wait_procs(processes, timeout=ENDED_WITHIN)[1]


def stored(out: Path) -> int:
    connection = sqlite3.connect(out / "store.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    with Store(out) as store:
        return len(store.cells())


def finish(out: Path, log: Path) -> None:
    """The same study again: it runs what is not stored, and nothing else."""
    before, ended = stored(out), Counter(FakeBackend(log).ended())
    with Store(out) as store:
        kept = {cell.key: cell for cell in store.cells()}
    summary = run(out, log)
    assert (summary.done, summary.ran, summary.failed) == (CELLS, CELLS - before, [])
    with Store(out) as store:
        after = {cell.key: cell for cell in store.cells()}
    assert {key: after[key] for key in kept} == kept
    assert sum((Counter(FakeBackend(log).ended()) - ended).values()) == CELLS - before


# ---- what works ------------------------------------------------------------------------------------------------------


def test_workers(out: Path, log: Path) -> None:
    study, cells = config(inspect=True), CELLS + 1
    run(out, log, study, limit=1)
    shown = Recorder()
    broken = FakeBackend(log, broken=("percentile W3A3 13",))
    summary = run_study(study, out, workers=2, progress=shown, backend=broken)
    assert (summary.done, summary.ran) == (cells - 1, cells - 1)
    assert set(Counter(broken.ended()).values()) == {1}
    assert (len(shown.seen), shown.ended) == (cells - 1, cells)
    assert "fake inspection W8A8" in shown.seen
    assert summary.failed == [("fake percentile W3A3 seed 13", "ValueError: percentile W3A3 13 is broken")]
    pids = {line.rpartition(" ")[2] for line in log.read_text().splitlines() if line.startswith("end ")}
    assert len(pids) == 3  # this process, and two that both had a share
    summary = run(out, log, study, workers=2, retry_failed=True, limit=3)
    assert (summary.done, summary.ran, summary.failed) == (cells, 1, [])


def test_the_same_cells_and_metrics_wherever_they_ran(out: Path, log: Path, tmp_path: Path) -> None:
    study = config(models=["fake", "fake2"], inspect=True)
    run(out, log, study, workers=3)
    run(tmp_path / "alone", log, study)
    found = []
    for directory in (out, tmp_path / "alone"):
        with Store(directory) as store:
            cells = [*store.cells(), *store.inspections()]
        ignored = ("seconds", "environment")
        found.append({c.key: (c.spec, {k: v for k, v in c.result.items() if k not in ignored}) for c in cells})
    assert found[0] == found[1]
    assert len(found[0]) == 2 * (CELLS + 1)


def test_cells_begin_while_fp32_is_measured(out: Path, log: Path) -> None:
    summary = run(out, log, backend=FakeBackend(log, patience=60.0), workers=2)
    assert (summary.done, summary.failed) == (CELLS, [])
    lines = [line.rpartition(" pid ")[0] for line in log.read_text().splitlines()]
    assert next(i for i, line in enumerate(lines) if line.startswith("start")) < lines.index("end fake fp32 FP32 0")


def test_cells_that_wait_for_an_fp32_that_fails_say_so(out: Path, log: Path) -> None:
    summary = run(out, log, backend=FakeBackend(log, broken=("fp32",), patience=60.0), workers=2)
    assert summary.done == 0
    told = dict(summary.failed)
    assert len(told) == CELLS
    assert told.pop("fake FP32") == "ValueError: fp32 is broken"
    assert all("could not be measured at FP32 (ValueError: fp32 is broken)" in text for text in told.values())
    assert len(FakeBackend(log).ended()) <= 1  # only what had begun was measured


def test_what_stops_a_worker_reaches_the_caller(out: Path, log: Path) -> None:
    with pytest.raises(QuantlensError, match="the disk is full"):
        run(out, log, backend=FakeBackend(log, broken=("minmax W8A8 0", "minmax W8A8 13"), error="full"), workers=2)
    assert gone(workers_of(psutil.Process()))


# ---- a second driver -------------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused(out: Path, log: Path, start) -> None:
    first = start(0.4)
    wait_for(log, 1, first, "start ")
    for workers in (1, 2):
        with pytest.raises(StorageError, match=r"another process runs a study on .*; wait until it has ended, or"):
            run(out, log, config(name="another", seeds=[5]), workers=workers)
    with Store(out) as store:  # who reads is not
        assert store.study()["name"] == "test"
        assert store.cells()
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors.decode()
    assert set(Counter(FakeBackend(log).ended()).values()) == {1}
    assert run(out, log).ran == 0  # the lock went with its process


def test_a_second_driver_in_the_same_process_is_refused(out: Path, log: Path) -> None:
    refused: list[BaseException] = []

    class Again(FakeBackend):
        def begin(self, model, what: str) -> None:
            if not refused:
                try:
                    run(out, log)
                except StorageError as error:
                    refused.append(error)
            super().begin(model, what)

    assert run(out, log, backend=Again(log)).done == CELLS
    assert len(refused) == 1


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_kill_at_any_time_loses_nothing_and_repeats_nothing(out: Path, log: Path, start) -> None:
    """SIGKILL in the middle of a cell, in one process: that cell alone runs again, every finished one is there."""
    process = start(0.4)
    wait_for(log, 4, process, "start ")  # FP32 and three cells are finished, the fourth is calibrating
    process.kill()
    process.wait()
    finished = len(FakeBackend(log).ended())
    assert stored(out) in (finished, finished - 1)
    assert 3 <= stored(out) < CELLS
    finish(out, log)


def test_workers_end_with_a_driver_that_is_killed(out: Path, log: Path, start) -> None:
    """SIGKILL of the process that started two workers, and of nothing else; the same command again goes on."""
    driver = start(1.0, {"workers": 2})
    wait_for(log, 4, driver, "start ")
    workers = children(driver)
    assert len(workers) >= 2
    driver.kill()
    driver.wait()
    assert gone(workers)
    finished = len(FakeBackend(log).ended())
    assert finished - 2 <= stored(out) <= finished  # of each worker at most the cell that it had in hand
    assert 1 <= stored(out) < CELLS
    finish(out, log)


def test_a_driver_is_killed_while_its_workers_start(out: Path, log: Path, start) -> None:
    driver = start(0.0, {"workers": 2})
    deadline = time.monotonic() + 60
    while len(workers_of(psutil.Process(driver.pid))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(driver)
    driver.kill()
    driver.wait()
    assert not psutil.wait_procs(workers, timeout=4 * ENDED_WITHIN)[1]  # they may be importing torch at that moment
    finish(out, log)


def test_a_killed_worker_is_replaced_and_its_cell_alone_run_again(out: Path, log: Path) -> None:
    backend, shown = FakeBackend(log, broken=("percentile W8A8 0",), error="kill once"), Recorder()
    summary = run_study(config(), out, workers=2, progress=shown, backend=backend)
    assert (summary.done, summary.ran, summary.failed) == (CELLS, CELLS, [])
    starts = Counter(line.rpartition(" pid ")[0] for line in log.read_text().splitlines() if line.startswith("start"))
    assert starts.pop("start fake percentile W8A8 0") == 2  # the cell that was running ran again, and no other
    assert set(starts.values()) == {1}
    assert set(Counter(backend.ended()).values()) == {1}
    assert shown.said == [
        "a worker ended with exit code -9 (out of memory?) at fake percentile W8A8 seed 0; this is done again"
    ]
    assert gone(workers_of(psutil.Process()))


class Reaped:
    """A process whose end another thread is told of: join() returns before the exit code is known."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def join(self, timeout: float) -> None:
        pass

    @property
    def exitcode(self) -> int | None:
        self.looks -= 1
        return -9 if self.looks < 0 else None


def test_the_exit_code_that_another_thread_is_told_of_first() -> None:
    assert [_exit_code(Reaped(looks)) for looks in (0, 1, 5)] == [-9, -9, -9]


def test_a_cell_that_kills_its_worker_fails_and_the_rest_goes_on(out: Path, log: Path) -> None:
    """As the kernel does where memory runs out."""
    backend = FakeBackend(log, broken=("minmax W3A3 13",), error="kill")
    summary = run(out, log, backend=backend, workers=2)
    assert (summary.done, summary.ran) == (CELLS - 1, CELLS)
    ((name, why),) = summary.failed
    assert name == "fake minmax W3A3 seed 13"
    assert why.startswith("a worker ended with exit code -9 at fake minmax W3A3 seed 13, 3 times (out of memory?)")
    assert set(Counter(backend.ended()).values()) == {1}
    assert log.read_text().count("start fake minmax W3A3 13") == 3
    assert run(out, log).ran == 0


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_everything_in_order(out: Path, log: Path, start, workers: int) -> None:
    """As a terminal sends it: to the driver and to its workers."""
    driver = start(1.0, {"workers": workers})
    wait_for(log, 3, driver, "start ")
    processes = children(driver)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert gone(processes)
    assert "StudyInterrupted: stopped; " in errors.decode()
    assert errors.decode().count("Traceback") <= 2  # the driver's; no worker says anything
    finish(out, log)


@pytest.mark.parametrize("options", [[], ["--workers", "2"], ["--executor", "ray", "--workers", "2"]], ids=" ".join)
def test_sigterm_is_ctrl_c_by_another_name(out: Path, log: Path, start, options: list[str]) -> None:
    """As a container or a batch system sends it to `quantlens study`: to the driver alone."""
    if "ray" in options:
        pytest.importorskip("ray")
    driver = start(1.0, ["--quiet", *options])
    wait_for(log, 3, driver, "start ")
    processes = children(driver)
    driver.terminate()
    _, errors = driver.communicate(timeout=120)
    assert gone(processes)
    assert driver.returncode == 128 + signal.SIGTERM
    *more, last = errors.decode().splitlines()
    assert re.fullmatch(r"stopped; \d of 9 cells are finished and kept in .* again to carry on", last)
    assert not more or "ray" in options  # Ray has messages of its own
    finish(out, log)


def test_ctrl_c_while_workers_start(out: Path, log: Path, start) -> None:
    driver = start(1.0, {"workers": 2})
    deadline = time.monotonic() + 60
    while len(workers_of(psutil.Process(driver.pid))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes = children(driver)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert gone(processes)
    assert "StudyInterrupted: stopped; 0 of 9" in errors.decode()
    finish(out, log)


def test_the_caller_goes_on_after_ctrl_c(out: Path, log: Path) -> None:
    """In a notebook the process stays: its workers do not, and its signals are as they were."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(0, [])

    class Stops(Recorder):
        def finished(self, *arguments) -> None:
            super().finished(*arguments)
            if len(self.seen) == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(StudyInterrupted, match="stopped; 3 of 9"):
        run_study(config(), out, workers=2, progress=Stops(), backend=FakeBackend(log, pause=0.5))
    assert not workers_of(psutil.Process())
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(0, []))
    finish(out, log)


def test_a_worker_that_is_terminated_leaves_no_temporary_files(
    out: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM of a worker, of its driver's death too: what it does is left in order."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    backend = FakeBackend(log, pause=2.0, scratch=True)

    class Ends(Recorder):
        def finished(self, *arguments) -> None:
            super().finished(*arguments)
            deadline = time.monotonic() + 60
            while not list(scratch.glob("quantlens-*")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(StudyInterrupted):
        run_study(config(), out, workers=2, progress=Ends(), backend=backend)
    assert not list(scratch.glob("quantlens-*"))
