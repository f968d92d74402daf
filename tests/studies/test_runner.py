"""Running a study: nothing lost, nothing twice, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from study_fakes import FakeBackend, config, surroundings

from quantlens.errors import QuantlensError, StorageError, UnknownNameError
from quantlens.studies.cells import StudyImages, cell_key, plan_study
from quantlens.studies.progress import Quiet, duration
from quantlens.studies.runner import StudyInterrupted, run_study
from quantlens.studies.store import Store

CELLS = 9


def run(out: Path, log: Path, study=None, backend: FakeBackend | None = None, **settings):
    backend = backend or FakeBackend(log)
    return run_study(study or config(), out, progress=False, backend=backend, **settings)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "study"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


# ---- the grid and its keys -------------------------------------------------------------------------------------------


def test_the_plan(log: Path) -> None:
    cells = plan_study(config(), FakeBackend(log))
    assert len(cells) == CELLS
    assert [str(c) for c in cells[:3]] == ["fake FP32", "fake minmax W8A8 seed 0", "fake minmax W8A8 seed 13"]
    assert not log.exists()  # nothing was loaded
    assert len(plan_study(config(bits=["W4A4"], seeds=[1]), FakeBackend(log))) == 3  # FP32 is always measured
    assert len(plan_study(config(bits=["FP32"], methods=[]), FakeBackend(log))) == 1
    with pytest.raises(UnknownNameError, match="did you mean 'minmax'"):
        plan_study(config(methods=["minmx"]), FakeBackend(log))


def key(log: Path, index: int = 1, sha: str = "abc", preprocess: object = "p", **changes: object) -> str:
    backend = FakeBackend(log)
    study = config(**changes)
    cell = plan_study(study, backend)[index]
    return cell_key(cell, study, StudyImages.open(study, backend), sha, {"p": preprocess})


def test_keys_are_stable(log: Path, tmp_path: Path) -> None:
    """Names and paths that change no figure do not change the key."""
    base = key(log)
    assert len(base) == 64
    assert key(log) == base
    assert key(log, name="another name") == base
    assert key(log, models=[{"name": "fake", "label": "F"}]) == base
    assert key(log, models=[{"name": "fake", "weights": "/elsewhere/w.safetensors"}]) == base
    assert key(log, methods=[{"name": "minmax", "label": "MM"}, "percentile"]) == base
    assert key(log, batch_size=7, device="cpu", cache=True, skip_bad=True) == base
    assert key(log, seeds=[0, 13, 37]) == base
    assert key(log, id="embedded:digits-test[:100]") == base  # the same images in other words
    # FP32 has neither seed nor calibration
    assert key(log, 0) == key(log, 0, seeds=[5], calibration={"source": "embedded:digits-calibration", "n": 32})


@pytest.mark.parametrize(
    "changes",
    [
        {"sha": "abd"},
        {"preprocess": "q"},
        {"index": 2},
        {"index": 3},
        {"index": 5},
        {"models": [{"name": "fake2"}]},
        {"models": [{"name": "fake", "options": {"num_classes": 8}}]},
        {"methods": [{"name": "minmax", "options": {"head_bits": 8}}]},
        {"seeds": [1]},
        {"bits": ["W7A7"]},
        {"calibration": {"source": "embedded:digits-calibration", "n": 15}},
        {"id": "embedded:digits-test[0:99]"},
        {"ood": {"letters": "embedded:letters[0:40]"}},
        {"ood": {"letters": "embedded:letters[0:40]", "renamed": "embedded:digits-held-out[0:40]"}},
        {
            "ood": {
                "letters": {"source": "embedded:letters[0:40]", "group": "near"},
                "other": "embedded:digits-held-out[0:40]",
            }
        },
        {"fit": "embedded:digits-fit"},
        {"scores": ["msp"]},
    ],
    ids=str,
)
def test_keys_are_sensitive(log: Path, changes: dict) -> None:
    assert key(log, **changes) != key(log)


def test_keys_hold_the_methods_version(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    base = key(log)
    old = FakeBackend.method
    monkeypatch.setattr(FakeBackend, "method", lambda self, *a: replace(old(self, *a), version=2))
    assert key(log) != base


def test_an_option_written_out_is_the_default(log: Path) -> None:
    spelt = [{"name": "minmax"}, {"name": "percentile", "options": {"percentile": 99.9}}]
    assert key(log, 5, methods=spelt) == key(log, 5)


# ---- running ---------------------------------------------------------------------------------------------------------


def test_a_whole_study(out: Path, log: Path) -> None:
    summary = run(out, log)
    assert (summary.planned, summary.done, summary.ran, summary.failed) == (CELLS, CELLS, CELLS, [])
    with Store(out) as store:
        cells = store.cells()
        study = store.study()
    assert (study["name"], study["planned"]) == ("test", CELLS)
    assert study["environment"]["torch"]
    quantized = [*["W8A8"] * 2, *["W3A3"] * 2]
    assert [c.spec["bits"] for c in cells] == ["FP32", *quantized, *quantized]
    fp32, low = cells[0].result, cells[3].result
    assert fp32["change"] is None
    assert low["change"]["id"]["top1"] == pytest.approx(low["id"]["top1"] - fp32["id"]["top1"])
    assert low["calibration"]["source"] == "embedded:digits-calibration?n=16&seed=0"
    assert low["calibration"]["n"] == 16
    drawn = {c.spec["calibration"]["fingerprint"] for c in cells[1:]}
    assert len(drawn) == 2  # each seed draws its own images
    assert set(low["ood"]["letters"]) >= {"source", "fingerprint", "n", "skipped", "group", "msp", "energy"}
    assert low["ood"]["other"]["group"] == "near"
    assert low["seconds"]["calibration"] >= 0
    assert Counter(FakeBackend(log).ended()).most_common(1)[0][1] == 1
    assert log.read_text().count("load") == 1  # the model is loaded once


def test_scores_do_not_depend_on_the_threads_of_numpy(out: Path, log: Path) -> None:
    from threadpoolctl import threadpool_info

    threads: set[int] = set()

    class Watched(FakeBackend):
        def evaluate(self, *arguments, **settings):
            threads.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
            return super().evaluate(*arguments, **settings)

    run(out, log, backend=Watched(log), limit=1)
    assert threads == {1}


def test_run_again_runs_nothing(out: Path, log: Path) -> None:
    run(out, log)
    before = log.read_text().count("\n")
    summary = run(out, log)
    assert (summary.done, summary.ran) == (CELLS, 0)
    assert log.read_text().count("\n") == before + 1  # the checkpoint is hashed again, nothing else


def test_more_of_the_study_runs_only_what_is_new(out: Path, log: Path) -> None:
    run(out, log)
    summary = run(out, log, config(seeds=[0, 13, 37]))
    assert (summary.planned, summary.done, summary.ran) == (13, 13, 4)
    summary = run(out, log, config(seeds=[0]))
    assert (summary.planned, summary.done, summary.ran) == (5, 5, 0)
    with Store(out) as store:
        assert len(store.cells()) == 5  # the report shows the study as it is now
        assert len(store.cells(everything=True)) == 13


def test_new_labels_and_paths_reach_old_cells(out: Path, log: Path) -> None:
    run(out, log)
    named = [{"name": "minmax", "label": "MinMax"}, "percentile"]
    renamed = config(models=[{"name": "fake", "label": "The fake"}], methods=named, id="embedded:digits-test[:100]")
    assert run(out, log, renamed).ran == 0
    with Store(out) as store:
        cells = store.cells()
    assert cells[1].spec["model"] == cells[1].result["model"] == "The fake"
    assert cells[1].spec["method"] == cells[1].result["method"] == "MinMax"
    assert cells[1].result["id"]["source"] == "embedded:digits-test[:100]"
    assert cells[1].result["method_name"] == "minmax"
    assert run(out, log, config(seeds=[0, 13, 37])).ran == 4  # FP32 of the store serves as reference


def test_limit(out: Path, log: Path) -> None:
    summary = run(out, log, limit=4)
    assert (summary.ran, summary.done, summary.remaining) == (4, 4, CELLS - 4)
    summary = run(out, log)
    assert (summary.ran, summary.done, summary.remaining) == (5, CELLS, 0)


def test_two_models(out: Path, log: Path) -> None:
    summary = run(out, log, config(models=["fake", {"name": "fake2", "label": "second"}]))
    assert (summary.planned, summary.done) == (18, 18)


def test_a_cell_that_raises_is_recorded_and_the_rest_goes_on(out: Path, log: Path) -> None:
    backend = FakeBackend(log, broken=("minmax W3A3 13",))
    summary = run(out, log, backend=backend)
    assert (summary.done, summary.ran) == (CELLS - 1, CELLS)
    assert summary.failed == [("fake minmax W3A3 seed 13", "ValueError: minmax W3A3 13 is broken")]
    with Store(out) as store:
        (failed,) = [c for c in store.cells() if c.status == "failed"]
    assert "Traceback" in failed.error
    assert "is broken" in failed.error
    assert failed.result is None

    assert run(out, log).ran == 0  # failed cells are not tried again by themselves
    summary = run(out, log, retry_failed=True)
    assert (summary.ran, summary.done, summary.failed) == (1, CELLS, [])


def test_a_model_that_cannot_be_loaded(out: Path, log: Path) -> None:
    summary = run(out, log, config(models=["unloadable", "fake"]))
    assert (summary.done, len(summary.failed)) == (CELLS, CELLS)
    assert summary.failed[0] == ("unloadable FP32", "RuntimeError: no such weights")
    with pytest.raises(UnknownNameError, match="unknown model"):
        run(out, log, config(models=["unknown-model"]))


def test_fp32_that_fails_fails_its_cells(out: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(log)
    old = backend.load_model

    def nine(*arguments):
        model = old(*arguments)
        model.num_classes = 9
        return model

    monkeypatch.setattr(backend, "load_model", nine)
    summary = run(out, log, backend=backend)
    assert len(summary.failed) == CELLS
    assert "do not match the classes" in summary.failed[0][1]
    assert "could not be measured at FP32" in summary.failed[1][1]


def test_a_full_disk_stops_the_study(out: Path, log: Path) -> None:
    backend = FakeBackend(log, broken=("minmax W3A3 0",), error="full")
    with pytest.raises(OSError, match="No space left"):
        run(out, log, backend=backend)
    summary = run(out, log)
    assert (summary.done, summary.ran, summary.failed) == (CELLS, CELLS - 3, [])


def test_a_store_that_breaks_stops_the_study(out: Path, log: Path) -> None:
    out.mkdir()
    (out / "store.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(StorageError, match="damaged"):
        run(out, log)


def test_ctrl_c_leaves_the_store_whole(out: Path, log: Path) -> None:
    backend = FakeBackend(log, broken=("percentile W8A8 0",), error="interrupt")
    with pytest.raises(StudyInterrupted, match=r"stopped; 5 of 9 cells are finished .* again to carry on"):
        run(out, log, backend=backend)
    connection = sqlite3.connect(out / "store.sqlite")
    assert connection.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    assert run(out, log).ran == CELLS - 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration": {"source": "embedded:digits-test", "n": 16}}, "the calibration images .* share 100 images"),
        ({"calibration": {"source": "embedded:digits-calibration", "n": 999}}, "asks for 999 images"),
        ({"fit": "embedded:digits-test[50:60]"}, "the fit set .* share 10 images"),
        ({"id": "embedded:digits-tset"}, "did you mean 'digits-test'"),
        ({"id": "nothing"}, "has no kind"),
        ({"scores": ["mps"]}, "did you mean 'msp'"),
    ],
    ids=str,
)
def test_refusals_come_before_any_work(out: Path, log: Path, changes: dict, said: str) -> None:
    with pytest.raises(QuantlensError, match=said):
        run(out, log, config(**changes))
    assert not out.exists()
    assert not log.exists()


# ---- processes -------------------------------------------------------------------------------------------------------


def start(out: Path, log: Path, pause: float, settings: object = None, changes: object = None) -> subprocess.Popen:
    here, more = Path(__file__).parent, [json.dumps(x or {}) for x in (settings, changes)]
    return subprocess.Popen(
        [sys.executable, str(here / "study_fakes.py"), str(out), str(log), str(pause), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=surroundings(),
    )


def wait_for(log: Path, lines: int, process: subprocess.Popen, word: str = "end ") -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count(word) < lines:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.process
def test_kill_at_any_time_loses_nothing_and_repeats_nothing(out: Path, log: Path) -> None:
    """SIGKILL in the middle of a cell: that cell alone runs again, every finished one is there."""
    process = start(out, log, 0.4)
    wait_for(log, 4, process, "start ")  # FP32 and three cells are finished, the fourth is calibrating
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    backend = FakeBackend(log)
    finished = backend.ended()
    with Store(out) as store:
        stored = len(store.cells())
    assert stored in (len(finished), len(finished) - 1)
    assert 3 <= stored < CELLS

    summary = run(out, log)
    assert (summary.done, summary.ran) == (CELLS, CELLS - stored)
    counts = Counter(backend.ended())
    assert len(counts) == CELLS
    assert sum(counts.values()) - CELLS == len(finished) - stored  # at most the cell that was measured but not yet kept
    connection = sqlite3.connect(out / "store.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.process
def test_two_processes_share_a_store(out: Path, log: Path) -> None:
    first, second = start(out, log, 0.25), start(out, log, 0.25)
    for process in (first, second):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    counts = Counter(FakeBackend(log).ended())
    assert len(counts) == CELLS
    assert set(counts.values()) == {1}  # nothing twice
    pids = {line.rpartition(" ")[2] for line in log.read_text().splitlines() if line.startswith("end ")}
    assert len(pids) == 2  # and both had a share
    with Store(out) as store:
        assert store.counts() == {"done": CELLS, "failed": 0}


@pytest.mark.process
def test_workers_count_only_their_own_cells(out: Path, log: Path) -> None:
    other = start(out, log, 0.5)
    wait_for(log, 1, other, "start ")  # FP32 is finished, and a cell is running
    shown = Recorder()
    summary = run_study(config(), out, workers=2, progress=shown, backend=FakeBackend(log))
    said, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors.decode()
    theirs = int(said.decode().partition("(")[2].partition(" in this run")[0])
    assert theirs >= 2
    assert summary.ran == len(shown.seen) == CELLS - theirs
    assert (summary.done, shown.behind) == (CELLS, CELLS)


@pytest.mark.process
def test_two_studies_share_a_store(out: Path, log: Path) -> None:
    """Two that differ, in two processes: what they have in common runs once, and each counts its own cells."""
    both = {"methods": ["minmax"], "inspect": True}  # FP32, the inspection, and minmax at two widths and two seeds
    first = start(out, log, 0.2, None, {**both, "seeds": [0, 13], "name": "first"})
    second = start(out, log, 0.2, None, {**both, "seeds": [13, 37], "name": "second"})
    for process in (first, second):
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
        assert said.decode().startswith("6 of 6 cells done")
    counts = Counter(FakeBackend(log).ended())
    assert len(counts) == 2 + 3 * 2
    assert set(counts.values()) == {1}
    with Store(out) as store:
        assert len(store.cells(everything=True)) == 7
        assert len(store.inspections(everything=True)) == 1
        assert store.study()["name"] in ("first", "second")
        assert len(store.cells()) == 5  # the report shows the study that began last


@pytest.mark.process
def test_workers_end_with_a_driver_that_is_killed(out: Path, log: Path) -> None:
    """SIGKILL of the process that started two workers, and of nothing else; the same command again goes on."""
    driver = start(out, log, 0.4, {"workers": 2})
    wait_for(log, 3, driver, "start ")
    driver.kill()
    driver.wait()
    pids = {int(line.rpartition(" ")[2]) for line in log.read_text().splitlines()}
    workers = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid) and pid != driver.pid]
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)
    finished = len(FakeBackend(log).ended())
    assert 1 <= finished < CELLS
    summary = run(out, log)
    assert (summary.done, summary.failed) == (CELLS, [])
    counts = Counter(FakeBackend(log).ended())
    assert (len(counts), set(counts.values())) == (CELLS, {1})  # a worker ends after its cell, which it keeps


@pytest.mark.process
def test_a_dead_process_is_waited_for_and_replaced(out: Path, log: Path) -> None:
    """A study that meets a cell of a process which then dies takes the cell over."""
    first = start(out, log, 3.0)
    wait_for(log, 1, first, "start ")
    second = start(out, log, 0.0)
    wait_for(log, CELLS - 1, second)  # all but the cell that the first one holds
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors.decode()
    assert b"waiting for 1 cells" in errors
    counts = Counter(FakeBackend(log).ended())
    assert len(counts) == CELLS
    assert set(counts.values()) == {1}


@pytest.mark.process
def test_workers(out: Path, log: Path) -> None:
    study, cells = config(inspect=True), CELLS + 1
    run(out, log, study, limit=1)
    shown = Recorder()
    broken = FakeBackend(log, broken=("percentile W3A3 13",))
    summary = run_study(study, out, workers=2, progress=shown, backend=broken)
    assert (summary.done, summary.ran) == (cells - 1, cells - 1)
    assert set(Counter(broken.ended()).values()) == {1}
    assert (len(shown.seen), shown.behind) == (cells - 1, cells)
    assert "fake inspection W8A8" in shown.seen
    assert summary.failed == [("fake percentile W3A3 seed 13", "ValueError: percentile W3A3 13 is broken")]
    summary = run(out, log, study, workers=2, retry_failed=True, limit=3)
    assert (summary.done, summary.ran, summary.failed) == (cells, 1, [])


@pytest.mark.process
def test_a_killed_worker_is_replaced_by_the_others(out: Path, log: Path) -> None:
    """SIGKILL of one of two workers in the middle of a cell: the other takes the cell over, and says so."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            lines = log.read_text().splitlines() if log.exists() else []
            for line in [line for line in lines if line.startswith("start")][:1]:
                killed.append(int(line.rpartition(" ")[2]))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    shown = Recorder()
    summary = run_study(config(), out, workers=2, progress=shown, backend=FakeBackend(log, pause=0.3))
    thread.join()
    assert killed
    assert (summary.done, summary.ran, summary.failed) == (CELLS, CELLS, [])
    assert set(Counter(FakeBackend(log).ended()).values()) == {1}
    assert shown.said[-1].startswith("1 of 2 workers ended with exit code -9")


def test_what_stops_a_worker_reaches_the_caller(out: Path, log: Path) -> None:
    with pytest.raises(QuantlensError, match="the disk is full"):
        run(out, log, backend=FakeBackend(log, broken=("minmax W8A8 0", "minmax W8A8 13"), error="full"), workers=2)


# ---- figures and display ---------------------------------------------------------------------------------------------


class Recorder(Quiet):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.said: list[str] = []
        self.lefts: list[float | None] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def finished(self, kind, what, seconds, error=None) -> None:
        super().finished(kind, what, seconds, error)
        self.seen.append(what)
        self.lefts.append(self.left())


def test_progress(out: Path, log: Path) -> None:
    shown = Recorder()
    run_study(config(), out, progress=shown, backend=FakeBackend(log))
    assert len(shown.seen) == CELLS
    assert shown.behind == shown.total == CELLS
    assert shown.lefts[-1] == 0
    assert all(left is not None and left >= 0 for left in shown.lefts)
    again = Recorder()
    run_study(config(), out, progress=again, backend=FakeBackend(log))
    assert (again.seen, again.behind) == ([], CELLS)
    assert [duration(s) for s in (7.6, 185, 8040)] == ["8 s", "3 min 05 s", "2 h 14 min"]
