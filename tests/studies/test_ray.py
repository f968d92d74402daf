"""The same study on a Ray cluster: the same cells and figures, and nothing lost when workers or drivers are killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image
from study_fakes import FakeBackend, config

from quantlens.errors import QuantlensError, StorageError
from quantlens.studies.config import ResourcesSpec
from quantlens.studies.runner import run_study
from quantlens.studies.store import Store

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'quantlens[cluster]'")

pytestmark = pytest.mark.process

HERE = Path(__file__).parent
CELLS = 9


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """One cluster of two processors for all tests, whose workers find `study_fakes`; its address."""
    from quantlens.studies.executors.local import environment

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), before]))
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
    with environment(quiet):
        context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield context.address_info["gcs_address"]
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(autouse=True)
def _cluster_where_needed(request: pytest.FixtureRequest) -> None:
    """Starting one takes seconds."""
    if request.node.get_closest_marker("process"):
        request.getfixturevalue("cluster")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def run(out: Path, backend: FakeBackend, study=None, **settings):
    settings = {"executor": "ray", "workers": 2, "progress": False, **settings}
    return run_study(study or config(), out, backend=backend, **settings)


def figures(out: Path) -> dict[str, tuple]:
    """Key -> spec and result without what tells when and where it ran; of inspections too."""
    with Store(out) as store:
        cells = [*store.cells(), *store.inspections()]
    ignored = ("seconds", "environment")
    return {c.key: (c.spec, {k: v for k, v in c.result.items() if k not in ignored}) for c in cells}


def test_the_same_cells_and_figures_wherever_they_ran(tmp_path: Path, log: Path) -> None:
    broken, study = ("percentile W3A3 13",), config(inspect=True)
    summary = run(tmp_path / "ray", FakeBackend(log, broken=broken), study)
    assert (summary.done, summary.ran) == (CELLS, CELLS + 1)
    assert summary.failed == [("fake percentile W3A3 seed 13", "ValueError: percentile W3A3 13 is broken")]

    summary = run(tmp_path / "ray", FakeBackend(log), study, retry_failed=True, workers=1)
    assert (summary.ran, summary.done, summary.failed) == (1, CELLS + 1, [])
    assert set(Counter(FakeBackend(log).ended()).values()) == {1}

    run(tmp_path / "local", FakeBackend(tmp_path / "log2"), study, executor="local", workers=1)
    assert figures(tmp_path / "ray") == figures(tmp_path / "local")
    assert len(figures(tmp_path / "ray")) == CELLS + 1
    names = {path.name for path in (tmp_path / "local" / "outputs").iterdir()}
    for name in names:
        ours, theirs = ((tmp_path / who / "outputs" / name).read_bytes() for who in ("ray", "local"))
        assert len(ours) == len(theirs)
    assert len(names) == CELLS


def test_cells_begin_while_fp32_is_measured(tmp_path: Path, log: Path) -> None:
    summary = run(tmp_path / "out", FakeBackend(log, patience=60.0))
    assert (summary.done, summary.failed) == (CELLS, [])
    lines = [line.rpartition(" pid ")[0] for line in log.read_text().splitlines()]
    assert next(i for i, line in enumerate(lines) if line.startswith("start")) < lines.index("end fake fp32 FP32 0")
    run(tmp_path / "local", FakeBackend(tmp_path / "log2"), executor="local", workers=1)
    assert figures(tmp_path / "out") == figures(tmp_path / "local")


def test_cells_that_wait_for_an_fp32_that_fails_say_so(tmp_path: Path, log: Path) -> None:
    summary = run(tmp_path / "out", FakeBackend(log, broken=("fp32",), patience=60.0))
    assert summary.done == 0
    told = dict(summary.failed)
    assert len(told) == CELLS
    assert told.pop("fake FP32") == "ValueError: fp32 is broken"
    assert all("could not be measured at FP32 (ValueError: fp32 is broken)" in text for text in told.values())
    assert len(FakeBackend(log).ended()) <= 1  # only what had begun was measured


def test_a_killed_worker_is_replaced_and_its_cell_retried(tmp_path: Path, log: Path) -> None:
    backend = FakeBackend(log, broken=("percentile W8A8 0",), error="kill once")
    summary = run(tmp_path / "out", backend)
    assert (summary.done, summary.ran, summary.failed) == (CELLS, CELLS, [])
    starts = Counter(line.rpartition(" pid ")[0] for line in log.read_text().splitlines() if line.startswith("start"))
    assert starts.pop("start fake percentile W8A8 0") == 2  # the cell that was running ran again, and no other
    assert set(starts.values()) == {1}
    assert set(Counter(backend.ended()).values()) == {1}


def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path, log: Path, cluster: str) -> None:
    out = tmp_path / "out"
    ray_settings = {"executor": "ray", "workers": 2, "address": cluster}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "study_fakes.py"), str(out), str(log), "0.5", json.dumps(ray_settings)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not log.exists() or log.read_text().count("start ") < 4:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = {int(line.rpartition(" ")[2]) for line in log.read_text().splitlines()}
    workers = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert workers
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]  # they end with their driver
    with Store(out) as store:
        stored = len(store.cells())
    assert 2 <= stored < CELLS

    again = FakeBackend(tmp_path / "log2")
    summary = run(out, again, executor="local", workers=1)  # whichever executor goes on
    assert (summary.done, summary.ran) == (CELLS, CELLS - stored)
    assert len(again.ended()) == CELLS - stored  # what was finished is not run again
    connection = sqlite3.connect(out / "store.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_what_stops_a_worker_stops_the_study(tmp_path: Path, log: Path) -> None:
    """A model that cannot be loaded fails its own cells; a disk that is full stops everything."""
    backend = FakeBackend(log, broken=("minmax W8A8 0",), error="full")
    with pytest.raises(QuantlensError, match="the disk is full"):
        run(tmp_path / "out", backend, config(models=["unloadable", "fake"]), workers=1)
    with Store(tmp_path / "out") as store:
        assert store.counts() == {"done": 1, "failed": CELLS}
        assert store.failures()[0].error.strip().endswith("RuntimeError: no such weights")


def test_the_store_on_a_disk_that_fills(small_disk, tmp_path: Path, log: Path) -> None:
    """While two workers run: what found room is kept, and the same command goes on once there is some."""
    out, study = small_disk.path / "out", config(inspect=True)
    filling = FakeBackend(log, broken=("minmax W3A3 0",), error=str(small_disk.path))
    with pytest.raises(QuantlensError, match=r"the disk that holds the store .* is full|No space left on device"):
        run(out, filling, study)
    small_disk.free()
    with Store(out) as store:
        stored = [c.key for c in (*store.cells(), *store.inspections())]
    assert 2 <= len(stored) < CELLS
    again = FakeBackend(tmp_path / "log2")
    summary = run(out, again, study)
    assert (summary.done, summary.ran, summary.failed) == (CELLS + 1, CELLS + 1 - len(stored), [])
    assert len(again.ended()) == CELLS + 1 - len(stored)  # what was finished is not run again
    connection = sqlite3.connect(out / "store.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_worker_whose_disk_is_full(small_disk, tmp_path: Path, log: Path) -> None:
    """The cache of decoded images where workers run: the study stops, and no cell counts as failed."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40), (60, 0, 90)).save(tmp_path / "photos" / "one.png")
    study = config(cache=str(small_disk.path / "cache"), ood={"photos": f"images:{tmp_path / 'photos'}"})
    small_disk.fill()
    with pytest.raises(QuantlensError, match=r"the image cache .* (needs|cannot be written)"):
        run(tmp_path / "out", FakeBackend(log), study)
    with Store(tmp_path / "out") as store:
        assert store.counts() == {"done": 0, "failed": 0}
    small_disk.free()
    assert run(tmp_path / "out", FakeBackend(log), study, limit=2).done == 2


def test_a_second_driver_is_refused(tmp_path: Path, log: Path) -> None:
    with Store(tmp_path / "out") as store, store.driving(), pytest.raises(StorageError, match="another process runs"):
        run(tmp_path / "out", FakeBackend(log))
    assert not log.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": 1, "gpus_per_worker": 0.5}, "asks for 0.5 GPU, but the largest node .* has 0"),
        ({"workers": 1, "gpus_per_worker": 1.5}, "a part of one GPU, or whole ones"),
        ({"executor": "local", "address": "auto"}, "add --executor ray"),
        ({"executor": "rey"}, "did you mean 'ray'"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, log: Path, settings: dict, said: str) -> None:
    with pytest.raises(QuantlensError, match=said):
        run(tmp_path / "out", FakeBackend(log), **settings)


def nodes(*resources: dict) -> object:
    """A stand-in for ray with these nodes."""
    from types import SimpleNamespace

    total: Counter = Counter()
    for one in resources:
        total.update(one)
    listed = [{"Alive": True, "Resources": one} for one in resources]
    return SimpleNamespace(cluster_resources=lambda: dict(total), nodes=lambda: listed)


def test_how_a_cluster_is_divided() -> None:
    from quantlens.studies.executors.ray import Share, share

    gpus = nodes({"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4})
    assert share(gpus, None, ResourcesSpec(), "auto", 100) == Share(8, 1, 1.0)
    assert share(gpus, None, ResourcesSpec(gpu=0.25), "auto", 100) == Share(32, 1, 0.25)
    assert share(gpus, None, ResourcesSpec(gpu=0.25, cpu=4), "auto", 100) == Share(8, 4, 0.25)
    assert share(gpus, None, ResourcesSpec(cpu=4), "cpu", 100) == Share(8, 4, 0.0)
    assert share(gpus, None, ResourcesSpec(), "auto", 3) == Share(3, 1, 1.0)
    assert share(nodes({"CPU": 2}), 2, ResourcesSpec(), "auto", 19) == Share(2, 1, 0.0)
    assert share(nodes({"CPU": 8}, {"CPU": 4}), 1, ResourcesSpec(), "auto", 19) == Share(1, 8, 0.0)
    with pytest.raises(QuantlensError, match="asks for 9 CPU"):
        share(nodes({"CPU": 8}, {"CPU": 8}), 1, ResourcesSpec(cpu=9), "auto", 19)


def test_a_worker_keeps_to_the_seeds_it_has_calibrated_on(tmp_path: Path, log: Path) -> None:
    """Two workers in turn: each goes through the cells of its seed; one nobody has begun comes before a shared one. A
    worker that is alone takes them in order."""
    from quantlens.studies.progress import Quiet
    from quantlens.studies.runner import Driver
    from quantlens.studies.session import Session

    session = Session(config(seeds=[0, 13, 37]), tmp_path / "out", FakeBackend(log), Quiet())
    (group,) = session.groups
    group.left = [task for task in group.left if task.cell.needs_fp32]
    driver = Driver(session, [None, None])
    for place in driver.places:
        place.group = group
    cells, ran = len(group.left), ([], [])
    for turn in range(cells):
        place = driver.places[turn % 2]
        task = driver.choose(group, place)
        ran[turn % 2].append(task.cell.seed)
        place.seeds.add(task.cell.seed)
        group.left.remove(task)
    per_seed = cells // 3
    assert ran[0][:per_seed] == [0] * per_seed
    assert ran[1][:per_seed] == [13] * per_seed
    assert set(ran[0][per_seed:] + ran[1][per_seed:]) == {37}
    assert driver.choose(group, driver.places[0]) is None

    group.left = group.tasks[1:4]
    driver.places.pop()
    assert driver.choose(group, driver.places[0]) is group.left[0]
