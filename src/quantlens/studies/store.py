"""The store of a study: one SQLite file, `DIR/store.sqlite`, to which every finished cell is written at once.

One process at a time runs a study on it (`Store.driving`) and alone writes its cells; others may read it meanwhile, and
write benchmarks.

Tables
    cells     a finished cell: key, spec, status, result, error, created, seconds; or what was found out of a model
              ("which layer hurts"), under a key that begins with `INSPECTION`
    study     the configurations that were run here: id, name, config, environment, created; the last is the current
    plan      the cells of the current study in order: each by its identity (`cells.identity`), with its present labels
    bindings  identity -> key: which cell answers for a planned identity (known once the checkpoint has been hashed)
    artefacts exported files by fingerprint: what each is, and its evaluation (see `benchmarks`)
    timings   latency of artefacts: one row per run, artefact, batch size and thread count
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from quantlens.errors import StorageError
from quantlens.studies.database import Database

FORMAT = 3
"""1 had no artefacts and timings, 2 no labels in its plan, and claims of several processes. Both are read as they are;
the first write brings them to 3."""

INSPECTION = "inspection-"
"""How the keys of inspections begin; those of cells with metrics are hashes alone."""

COMPRESS_ABOVE = 64 * 1024
"""Results whose JSON is longer than this many bytes are stored as zlib-compressed JSON."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS cells (
    key TEXT PRIMARY KEY, spec TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
    result BLOB, error TEXT, created TEXT NOT NULL, seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS study (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, config TEXT NOT NULL, environment TEXT NOT NULL,
    created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS plan (position INTEGER PRIMARY KEY, identity TEXT NOT NULL, spec TEXT);
CREATE TABLE IF NOT EXISTS bindings (identity TEXT PRIMARY KEY, key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS artefacts (
    fingerprint TEXT PRIMARY KEY, facts TEXT NOT NULL, result BLOB, created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS timings (
    run TEXT NOT NULL, fingerprint TEXT NOT NULL, batch INTEGER NOT NULL, threads INTEGER NOT NULL,
    timing TEXT NOT NULL, PRIMARY KEY (run, fingerprint, batch, threads));
"""
OF_THE_MODEL = ("checkpoint_sha256", "preprocess")
"""Keys of a spec that are known once the model has been loaded; a plan has None there."""

_COLUMNS = "c.key, c.spec, c.status, c.result, c.error, c.created, c.seconds"


@dataclass(frozen=True)
class Cell:
    """One finished cell: a model, a method, a precision and a seed, measured on stated images."""

    key: str
    spec: dict[str, Any]
    status: str
    result: dict[str, Any] | None
    error: str | None
    created: str
    seconds: float

    @property
    def done(self) -> bool:
        return self.status == "done"


def to_json(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, no NaN (raises ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def now() -> str:
    """The present in UTC, ISO 8601 with microseconds (so texts compare as times do)."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Store(Database):
    """The store in directory `directory` (see :class:`Database`)."""

    FORMAT = FORMAT

    def lay_out(self, connection: sqlite3.Connection) -> None:
        columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(plan)")]
        if columns and "spec" not in columns:
            connection.execute("ALTER TABLE plan ADD COLUMN spec TEXT")
        connection.execute("DROP TABLE IF EXISTS claims")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Inside, this process alone runs a study on the store; a second one raises StorageError."""
        refusal = (
            f"another process runs a study on {self.directory} at this moment; wait until it has ended, or choose "
            "another directory with --out"
        )
        with self.locked(refusal):
            yield

    # ---- cells ---------------------------------------------------------------------------------------------------

    def put(
        self,
        key: str,
        spec: Mapping[str, Any],
        status: str,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
        seconds: float = 0.0,
    ) -> bool:
        """Write a finished cell: `status` is "done" (with `result`) or "failed" (with `error`, the traceback). A cell
        that is done already is left as it is. Returns whether the cell was written."""
        if status not in ("done", "failed"):
            raise ValueError(f"status must be 'done' or 'failed', not {status!r}")
        row = (key, to_json(dict(spec)), status, packed(result), error, now(), float(seconds))
        with self.writing() as connection:
            before = connection.execute("SELECT status FROM cells WHERE key = ?", (key,)).fetchone()
            if before == ("done",):
                return False
            connection.execute(
                "INSERT OR REPLACE INTO cells (key, spec, status, result, error, created, seconds) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        return True

    def cells(self, *, everything: bool = False) -> list[Cell]:
        """The finished cells of the current study in its order, under its labels; with `everything` those of earlier
        ones too, as they were measured. Inspections are apart, in `inspections`."""
        return self._cells(everything, "NOT LIKE")

    def inspections(self, *, everything: bool = False) -> list[Cell]:
        """The finished inspections, as `cells` gives cells: each result is {"inspection": Inspection.to_dict()}."""
        return self._cells(everything, "LIKE")

    def _cells(self, everything: bool, like: str) -> list[Cell]:
        wanted = f"c.key {like} '{INSPECTION}%'"
        if not everything and self.rows("SELECT 1 FROM plan LIMIT 1"):
            return [self._cell(row, labels) for *row, labels in self._planned(f"AND {wanted}")]
        return [
            self._cell(row)
            for row in self.rows(f"SELECT {_COLUMNS} FROM cells c WHERE {wanted} ORDER BY c.created, c.rowid")
        ]

    def _planned(self, condition: str) -> list[tuple[Any, ...]]:
        """The finished cells of the current study that meet a condition, in order, each with its spec in the plan."""
        labels = "p.spec" if self.rows("SELECT 1 FROM pragma_table_info('plan') WHERE name = 'spec'") else "NULL"
        return self.rows(
            f"SELECT {_COLUMNS}, {labels} FROM plan p JOIN bindings b ON b.identity = p.identity "
            f"JOIN cells c ON c.key = b.key {condition} ORDER BY p.position"
        )

    def cell(self, key: str) -> Cell | None:
        """The finished cell of that key, as it was measured."""
        rows = self.rows(f"SELECT {_COLUMNS} FROM cells c WHERE c.key = ?", (key,))
        return self._cell(rows[0]) if rows else None

    def _cell(self, row: Sequence[Any], labels: str | None = None) -> Cell:
        key, spec, status, result, error, created, seconds = row
        try:
            known, found = json.loads(spec), unpacked(result)
        except (zlib.error, ValueError) as problem:
            raise StorageError(
                f"the store {self.path} is damaged (cell {key[:12]}: {problem}); move it away and run the study again"
            ) from problem
        if labels is not None:
            known = json.loads(labels) | {name: known.get(name) for name in OF_THE_MODEL}
            found = None if found is None else relabelled(found, known)
        return Cell(key, known, status, found, error, created, seconds)

    def statuses(self, keys: Iterable[str]) -> dict[str, str]:
        """Key -> "done" or "failed", for those of `keys` that are finished."""
        wanted = set(keys)
        return {key: status for key, status in self.rows("SELECT key, status FROM cells") if key in wanted}

    # ---- the study -----------------------------------------------------------------------------------------------

    def begin(
        self,
        name: str,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        plan: Sequence[tuple[str, Mapping[str, Any]]],
    ) -> None:
        """Make this configuration the current study. plan: (identity, spec) of its cells in order, the spec without
        what `OF_THE_MODEL` names. The same configuration again (in the same environment) adds no row."""
        row = (name, to_json(dict(config)), to_json(dict(environment)))
        planned = [(i, identity, to_json(dict(spec))) for i, (identity, spec) in enumerate(plan)]
        with self.writing() as connection:
            last = connection.execute("SELECT name, config, environment FROM study ORDER BY id DESC LIMIT 1").fetchone()
            if last != row:
                connection.execute(
                    "INSERT INTO study (name, config, environment, created) VALUES (?, ?, ?, ?)", (*row, now())
                )
            if planned != connection.execute("SELECT position, identity, spec FROM plan ORDER BY position").fetchall():
                connection.execute("DELETE FROM plan")
                connection.executemany("INSERT INTO plan (position, identity, spec) VALUES (?, ?, ?)", planned)

    def study(self) -> dict[str, Any]:
        """The current study: {"id", "name", "config", "environment", "created", "planned"}; {} when none was begun.
        `planned` is the number of its cells."""
        rows = self.rows("SELECT id, name, config, environment, created FROM study ORDER BY id DESC LIMIT 1")
        if not rows:
            return {}
        number, name, config, environment, created = rows[0]
        return {
            "id": number,
            "name": name,
            "config": json.loads(config),
            "environment": json.loads(environment),
            "created": created,
            "planned": self.rows("SELECT count(*) FROM plan")[0][0],
        }

    def bind(self, keys: Mapping[str, str]) -> None:
        """Record which key answers for each planned identity."""
        with self.writing() as connection:
            connection.executemany("INSERT OR REPLACE INTO bindings (identity, key) VALUES (?, ?)", list(keys.items()))

    def counts(self) -> dict[str, int]:
        """{"done", "failed"}: how many cells of the current study are finished."""
        rows = self.rows(
            "SELECT c.status FROM plan p JOIN bindings b ON b.identity = p.identity JOIN cells c ON c.key = b.key"
        )
        return {"done": 0, "failed": 0, **Counter(status for (status,) in rows)}

    def failures(self) -> list[Cell]:
        """The failed cells of the current study, inspections among them, in its order."""
        return [self._cell(row, labels) for *row, labels in self._planned("AND c.status = 'failed'")]


def relabelled(result: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """A result under the labels and sources of a spec; its metrics are untouched."""
    if spec.get("inspects"):
        found = result["inspection"]
        images = {**found["images"], "source": spec["images"]["source"]}
        return {**result, "inspection": {**found, "model": spec["model"], "images": images}}
    changed = dict(result)
    changed["model"], changed["method"] = spec["model"], spec["method"]
    changed["architecture"], changed["method_name"] = spec["architecture"], spec["method_name"]
    changed["calibration"] = None if spec["calibration"] is None else dict(spec["calibration"])
    changed["id"] = {**result["id"], "source": spec["id"]["source"]}
    changed["ood"] = {name: {**entry, "source": spec["ood"][name]["source"]} for name, entry in result["ood"].items()}
    if result.get("fit") and spec.get("fit"):
        changed["fit"] = {**result["fit"], "source": spec["fit"]["source"]}
    return changed


def packed(result: Mapping[str, Any] | None) -> str | bytes | None:
    """JSON text, or its zlib compression when it is long."""
    if result is None:
        return None
    text = to_json(dict(result))
    return zlib.compress(text.encode(), 6) if len(text) > COMPRESS_ABOVE else text


def unpacked(stored: str | bytes | None) -> dict[str, Any] | None:
    """The inverse of `packed`. Raises zlib.error or ValueError for what is neither."""
    text = zlib.decompress(stored).decode() if isinstance(stored, bytes) else stored
    return None if text is None else dict(json.loads(text))
