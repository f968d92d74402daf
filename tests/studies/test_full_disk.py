"""Disks that are really full, under the store and where workers work: the study stops in words, and loses nothing."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from study_fakes import FakeBackend, config, surroundings

from quantlens.errors import QuantlensError, StorageError
from quantlens.studies.runner import run_study
from quantlens.studies.store import Store

pytestmark = pytest.mark.process

HERE = Path(__file__).parent
CELLS = 9


def run(out: Path, log: Path, study=None, backend: FakeBackend | None = None, **settings):
    return run_study(study or config(), out, progress=False, backend=backend or FakeBackend(log), **settings)


def whole(out: Path, cells: int) -> None:
    """The store is sound and has so many finished cells, each with its per-image outputs."""
    with Store(out) as store:
        found = store.cells()
    assert [c.status for c in found] == ["done"] * cells
    assert sorted(p.name for p in (out / "outputs").iterdir()) == sorted(f"{c.key}.npz" for c in found)
    connection = sqlite3.connect(out / "store.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_store_on_a_disk_that_fills(small_disk, tmp_path: Path, workers: int) -> None:
    out, log = small_disk.path / "out", tmp_path / "log"
    filling = FakeBackend(log, broken=("minmax W3A3 0",), error=str(small_disk.path))
    with pytest.raises(QuantlensError, match=r"the disk that holds the store .* is full|No space left on device"):
        run(out, log, backend=filling, workers=workers)
    with pytest.raises(QuantlensError, match=r"the disk that holds the store .* is full"):
        run(out, log)  # nothing was freed
    small_disk.free()
    with Store(out) as store:
        assert 2 <= len(store.cells()) < CELLS
    summary = run(out, log)
    assert (summary.done, summary.failed) == (CELLS, [])
    whole(out, CELLS)
    counts = Counter(FakeBackend(log).ended())
    assert len(counts) == CELLS
    assert sum(counts.values()) - CELLS <= workers  # what was measured but found no room, and no more


def test_a_worker_whose_disk_is_full(small_disk, tmp_path: Path) -> None:
    """Its cache of decoded images, not the store: no cell counts as failed, as it would fail for every model."""
    out, log = tmp_path / "out", tmp_path / "log"
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 0, 90)).save(tmp_path / "photos" / f"{i}.png")
    study = config(cache=str(small_disk.path / "cache"), ood={"photos": f"images:{tmp_path / 'photos'}"})
    small_disk.fill()
    with pytest.raises(QuantlensError, match=r"the image cache .* (needs|cannot be written)"):
        run(out, log, study)
    with Store(out) as store:
        assert store.counts() == {"done": 0, "failed": 0}
    small_disk.free()
    assert run(out, log, study).done == CELLS
    whole(out, CELLS)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """`ulimit -f`, which stands for a full disk where nothing can be mounted: a real process that may not write more
    than so many bytes into a file."""
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, str(HERE / "study_fakes.py"), str(out), str(log), "0"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    process = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, env=surroundings())
    assert process.returncode == 1
    assert "StorageError: the disk that holds the store" in process.stderr
    with Store(out) as store:
        stored = len(store.cells())
    summary = run(out, log)
    assert (summary.done, summary.ran) == (CELLS, CELLS - stored)
    whole(out, CELLS)


def test_the_first_write_finds_no_room(small_disk, tmp_path: Path) -> None:
    small_disk.fill()
    with pytest.raises(StorageError, match=r"free some space|free space"):
        run(small_disk.path / "out", tmp_path / "log")
    assert not FakeBackend(tmp_path / "log").ended()
    small_disk.free()
    assert run(small_disk.path / "out", tmp_path / "log").done == CELLS
