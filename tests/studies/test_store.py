"""The store: whole after every write, driven by one process, and clear about what is wrong."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from quantlens.errors import StorageError
from quantlens.studies.store import Store, now

SPEC = {"model": "m", "method": "minmax", "bits": "W4A4", "seed": 0}


def test_cells_come_back(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.put("a", SPEC, "done", {"id": {"top1": 0.5}}, seconds=2.5)
        assert store.put("b", {**SPEC, "seed": 1}, "failed", None, "Traceback …", 1)
    with Store(tmp_path) as store:
        first, second = store.cells()
        assert (first.key, first.spec, first.result, first.seconds) == ("a", SPEC, {"id": {"top1": 0.5}}, 2.5)
        assert (second.status, second.error) == ("failed", "Traceback …")
        assert first.created <= second.created <= now()


def test_what_is_done_is_never_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.put("a", SPEC, "failed", None, "first")
    assert store.put("a", SPEC, "done", {"n": 1})
    assert not store.put("a", SPEC, "failed", None, "late")
    assert not store.put("a", SPEC, "done", {"n": 2})
    assert [c.result for c in store.cells()] == [{"n": 1}]
    with pytest.raises(StorageError):
        store.put("b", SPEC, "running")
    with pytest.raises(ValueError):  # NaN is no JSON
        store.put("b", SPEC, "done", {"x": float("nan")})
    assert len(store.cells()) == 1
    store.close()


def test_large_results_are_compressed(tmp_path: Path) -> None:
    result = {"per_class": [{"class": k, "name": f"class {k}", "n": 50, "top1": 0.5} for k in range(5000)]}
    with Store(tmp_path) as store:
        store.put("a", SPEC, "done", result)
        assert store.cells()[0].result == result
    assert os.path.getsize(tmp_path / "store.sqlite") < 120_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store.sqlite"]  # the last one out folds the log in


def planned(**specs: dict) -> list[tuple[str, dict]]:
    return [
        (identity, {**SPEC, "checkpoint_sha256": None, "preprocess": None, **spec}) for identity, spec in specs.items()
    ]


def test_the_current_study_filters(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.path.is_file() is False
    store.begin("first", {"seeds": [0]}, {"torch": "2"}, planned(i1={}, i2={}))
    store.begin("first", {"seeds": [0]}, {"torch": "2"}, planned(i1={}, i2={}))
    assert store.study()["id"] == 1
    store.bind({"i1": "a", "i2": "b"})
    store.put("b", SPEC, "failed", None, "later")
    store.put("a", SPEC, "failed", None, "no")
    assert [c.key for c in store.cells()] == ["a", "b"]  # in the order of the plan
    assert store.counts() == {"done": 0, "failed": 2}
    assert [cell.error for cell in store.failures()] == ["no", "later"]
    assert store.statuses(["a", "c"]) == {"a": "failed"}
    store.begin("second", {"seeds": [1]}, {"torch": "2"}, planned(i2={}, i3={}))
    assert [c.key for c in store.cells()] == ["b"]
    assert [c.key for c in store.cells(everything=True)] == ["b", "a"]
    study = store.study()
    assert (study["name"], study["config"], study["planned"]) == ("second", {"seeds": [1]}, 2)
    store.close()


def test_labels_are_those_of_the_plan(tmp_path: Path) -> None:
    """A cell stays as it was measured; it is shown as the current study calls it, twice if that names it twice."""
    spec = {
        **SPEC,
        "architecture": "m",
        "method_name": "minmax",
        "calibration": None,
        "id": {"source": "old"},
        "ood": {},
    }
    result = {"model": "m", "method": "minmax", "id": {"source": "old", "top1": 0.5}, "ood": {}}
    with Store(tmp_path) as store:
        store.put("a", {**spec, "checkpoint_sha256": "abc", "preprocess": {"size": 8}}, "done", result)
        store.bind({"i": "a"})
        new = {**spec, "model": "M", "id": {"source": "new"}}
        store.begin("study", {}, {}, planned(i=new) + planned(i={**new, "model": "N"}))
        first, second = store.cells()
        assert (first.spec["model"], second.spec["model"]) == ("M", "N")
        assert (first.spec["checkpoint_sha256"], first.spec["preprocess"]) == ("abc", {"size": 8})
        assert first.result["id"] == {"source": "new", "top1": 0.5}
        assert store.cell("a").spec["model"] == store.cell("a").result["model"] == "m"


def test_one_process_drives(tmp_path: Path) -> None:
    with Store(tmp_path) as first, Store(tmp_path) as second:
        with first.driving():
            first.put("a", SPEC, "done", {})
            with pytest.raises(StorageError, match=r"another process runs a study on .*; wait until it has ended"):
                second.driving().__enter__()
            assert [c.key for c in second.cells()] == ["a"]
            assert second.put("b", SPEC, "done", {})  # `quantlens bench --store` writes beside a study
        with second.driving():
            pass


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="quantlens study"):
        Store(tmp_path / "absent").cells()
    assert list(tmp_path.iterdir()) == []


def test_damaged_store(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put("a", SPEC, "done", {"text": "x" * 20_000})
    path = tmp_path / "store.sqlite"
    whole = path.read_bytes()
    path.write_bytes(b"this is no database at all" * 1000)
    with pytest.raises(StorageError, match="damaged"):
        Store(tmp_path).cells()
    with pytest.raises(StorageError, match="damaged"):
        Store(tmp_path).put("b", SPEC, "done", {})
    path.write_bytes(whole[:4096])
    with pytest.raises(StorageError, match="damaged"):
        Store(tmp_path).cells()
    path.write_bytes(whole)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE cells SET result = x'00'")
    connection.commit()
    connection.close()
    with pytest.raises(StorageError, match="cell a"):
        Store(tmp_path).cells()


def test_newer_store(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put("a", SPEC, "done", {})
    connection = sqlite3.connect(tmp_path / "store.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match="newer quantlens"):
        Store(tmp_path).cells()


def test_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Store(tmp_path / "file").put("a", SPEC, "done", {})


def test_full_disk(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put("a", SPEC, "done", {"n": 1})
        connection = store._connect(write=True)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then says what it says of a full disk
        with pytest.raises(StorageError, match="is full; free some space"):
            store.put("b", SPEC, "failed", None, "x" * 100_000)
        connection.execute("PRAGMA max_page_count = 1000000")
        assert [c.key for c in store.cells()] == ["a"]
        assert store.put("b", SPEC, "done", {})


def test_two_connections_wait_for_each_other(tmp_path: Path) -> None:
    """A reader never waits, a writer waits its turn (here: until the lock is given up)."""
    import threading

    with Store(tmp_path) as first, Store(tmp_path) as second:
        first.put("a", SPEC, "done", {})
        connection = first._connect(write=True)
        connection.execute("BEGIN IMMEDIATE")
        assert [c.key for c in second.cells()] == ["a"]
        timer = threading.Timer(0.3, lambda: None)
        timer.start()
        done: list[bool] = []
        writer = threading.Thread(target=lambda: done.append(Store(tmp_path).put("b", SPEC, "done", {})))
        writer.start()
        timer.join()
        assert done == []
        connection.execute("COMMIT")
        writer.join(10)
        assert done == [True]
        assert [c.key for c in second.cells()] == ["a", "b"]


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root and setpriv")
def test_read_only_store(tmp_path: Path) -> None:
    directory = tmp_path / "study"
    with Store(directory) as store:
        store.put("a", SPEC, "done", {"n": 1})
    code = (
        "import sys; from quantlens.studies.store import Store; from quantlens.errors import StorageError\n"
        "store = Store(sys.argv[1]); print(store.cells()[0].result)\n"
        "try: store.put('b', {}, 'done', {})\n"
        "except StorageError as e: print('refused:', e)\n"
    )
    for place in (directory, tmp_path, *tmp_path.parents):
        if place.name.startswith(("pytest", "popen")) or place in (directory, tmp_path):  # popen-gw0: a worker's own
            place.chmod(0o755)
    (directory / "store.sqlite").chmod(0o644)
    run = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", code, str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "{'n': 1}" in run.stdout, run.stderr
    assert "refused: the store" in run.stdout
