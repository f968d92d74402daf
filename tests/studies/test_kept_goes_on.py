"""A study whose store an earlier release wrote (kept/README.md, format 2) goes on where it was."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from quantlens.studies.config import StudyConfig, parse_config
from quantlens.studies.runner import run_study
from quantlens.studies.store import FORMAT, Store


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).parent / "kept", tmp_path / "kept"))


def version(directory: Path) -> int:
    connection = sqlite3.connect(directory / "store.sqlite")
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.close()
    return int(found)


def config(directory: Path, **changes: object) -> StudyConfig:
    with Store(directory) as store:
        return parse_config({**store.study()["config"], **changes})


def test_it_is_read_and_left_as_it_is(kept: Path) -> None:
    with Store(kept) as store:
        assert [cell.spec["method"] for cell in store.cells()] == ["fp32", "minmax", "repq-vit"]
        assert store.counts() == {"done": 3, "failed": 0}
        assert store.study()["planned"] == 3
        assert store.inspections() == store.failures() == []
    assert version(kept) == 2


def test_no_finished_cell_is_run_again(kept: Path) -> None:
    connection = sqlite3.connect(kept / "store.sqlite")  # a process that was killed left its claim
    connection.execute("INSERT INTO claims VALUES ('key', 'owner', 'host', 1, 1.0, 1.0)")
    connection.commit()
    connection.close()
    with Store(kept) as store:
        before = {cell.key: cell for cell in store.cells(everything=True)}
    more = config(kept, methods=[{"name": "minmax", "label": "MinMax"}], seeds=[0, 13])
    summary = run_study(more, kept, progress=False)
    assert (summary.planned, summary.done, summary.ran, summary.failed) == (3, 3, 1, [])
    assert version(kept) == FORMAT
    with Store(kept) as store:
        after = {cell.key: cell for cell in store.cells(everything=True)}
        shown = store.cells()
    assert {key: after[key] for key in before} == before
    assert [(c.spec["method"], c.spec["seed"]) for c in shown] == [("fp32", 0), ("MinMax", 0), ("MinMax", 13)]
    assert shown[1].key in before
    assert shown[1].result["method"] == "MinMax"
    assert shown[2].result["fp32"] == shown[1].result["fp32"]
