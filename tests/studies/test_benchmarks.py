"""Exported files in the store: joined by fingerprint, and added to stores of before there were any."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from quantlens.errors import StorageError
from quantlens.studies.benchmarks import evaluated, put_artefact, put_timings, timed
from quantlens.studies.store import FORMAT, Store

MACHINE = {"cpu": "one"}


def facts(name: str) -> dict[str, Any]:
    return {"fingerprint": name, "file": f"{name}.onnx", "bits": "W8A8"}


def timing(name: str, batch: int = 1) -> dict[str, Any]:
    return {"label": name, "fingerprint": name, "batch": batch, "threads": 1, "median_ms": 2.0}


def first_format(directory: Path) -> Path:
    """A store as the first format had it, with one cell."""
    with Store(directory) as store:
        store.put("a", {"bits": "FP32"}, "done", {"id": {"top1": 0.5}})
    path = directory / "store.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "DROP TABLE artefacts; DROP TABLE timings; ALTER TABLE plan DROP COLUMN spec; PRAGMA user_version = 1;"
        )
    return path


def test_evaluations_and_timings_meet_in_either_order(tmp_path):
    with Store(tmp_path) as store:
        put_timings(store, [timing("a"), timing("b"), timing("a", 8)], [facts("a"), facts("b")], MACHINE)
        put_artefact(store, facts("b"), {"id": {"top1": 0.25}})
        put_artefact(store, facts("c"), {"id": {"top1": 0.5}})
        put_timings(store, [timing("b")], [facts("b")], MACHINE)
    with Store(tmp_path) as store:
        rows = timed(store)
        assert [(t.facts["file"], t.place) for t in rows] == [
            ("a.onnx", ("one", 1, 1)),
            ("b.onnx", ("one", 1, 1)),
            ("a.onnx", ("one", 8, 1)),
            ("b.onnx", ("one", 1, 1)),
        ]
        assert [t.result for t in rows] == [None, {"id": {"top1": 0.25}}, None, {"id": {"top1": 0.25}}]
        assert len({t.run for t in rows}) == 2
        put_artefact(store, facts("b"), {"id": {"top1": 0.75}})
        assert [(f["file"], r["id"]["top1"]) for f, r in evaluated(store)] == [("c.onnx", 0.5), ("b.onnx", 0.75)]


def test_a_run_is_kept_whole_or_not_at_all(tmp_path):
    with Store(tmp_path) as store:
        with pytest.raises(ValueError):  # NaN is no JSON
            put_timings(store, [timing("a"), timing("b") | {"median_ms": float("nan")}], [facts("a")], MACHINE)
        assert timed(store) == []


def test_stores_of_the_first_format_are_read_and_added_to(tmp_path):
    path = first_format(tmp_path)
    with Store(tmp_path) as store:
        assert timed(store) == []
        assert evaluated(store) == []
        assert store.cells()[0].result == {"id": {"top1": 0.5}}
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone()[0] == 1, "reading changes nothing"
    with Store(tmp_path) as store:
        put_artefact(store, facts("a"), {"id": {"top1": 0.25}})
        assert len(evaluated(store)) == len(store.cells()) == 1
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone()[0] == FORMAT


def test_a_newer_store_is_left_alone(tmp_path):
    path = first_format(tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    with pytest.raises(StorageError, match="newer quantlens"):
        put_artefact(Store(tmp_path), facts("a"), {})
    with pytest.raises(StorageError, match="newer quantlens"):
        timed(Store(tmp_path))
