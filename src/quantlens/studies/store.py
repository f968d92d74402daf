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

import json
import os
import re
import shutil
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantlens.errors import StorageError

FORMAT = 3
"""Version of the file's layout. 1 had no artefacts and timings, 2 no labels in its plan, and claims of several
processes. Both are read as they are; the first write brings them to 3."""

INSPECTION = "inspection-"
"""How the keys of inspections begin; those of cells with metrics are hashes alone."""

COMPRESS_ABOVE = 64 * 1024
"""Results whose JSON is longer than this many bytes are stored as zlib-compressed JSON."""

BUSY_SECONDS = 30.0
"""How long a writer waits for another one, such as `quantlens bench --store` beside a study."""

SHARED_MEMORY = 64 << 10
"""Bytes of disk without which SQLite cannot work: twice what its shared-memory file begins with."""

OF_THE_MODEL = ("checkpoint_sha256", "preprocess")
"""Keys of a spec that are known once the model has been loaded; a plan has None there."""

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
_PLANNED = "plan p JOIN bindings b ON b.identity = p.identity JOIN cells c ON c.key = b.key"

_AGAIN = "run the same command again afterwards: finished cells are kept"
_PROBLEMS = {
    "disk is full": f"the disk that holds the store {{path}} is full; free some space and {_AGAIN}",
    "read-?only": f"the store {{path}} is read-only; give write permission to it and its directory, and {_AGAIN}",
    "not a database|malformed|corrupt": "the store {path} is damaged ({message}); move it away and run the study again",
    "locked|busy": f"the store {{path}} was kept locked by another process for {BUSY_SECONDS:.0f} s; end that process "
    f"and {_AGAIN}",
    "unable to open": "the store {path} cannot be opened; check that its directory exists and can be written",
    "disk i/o": f"the disk that holds the store {{path}} reports an error ({{message}}); check the disk and {_AGAIN}",
    "": "the store {path} cannot be used ({message}); move it away and run the study again",
}
"""What SQLite says -> the sentence with a cure."""


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


class Store:
    """The store in `directory`. The first write makes the file; reading one that does not exist raises `StorageError`.
    Use it as a context manager, or call `close()`. Not to be shared between threads. In WAL mode a reader never waits
    for a writer, and a process that is killed leaves the file whole (keep it on a local disk, not on a network share).
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.path = self.directory / "store.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._writable = False

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call twice; a later call opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

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
        row = (key, to_json(spec), status, packed(result), error, now(), float(seconds))
        with self.writing() as connection:
            done = connection.execute("SELECT 1 FROM cells WHERE key = ? AND status = 'done'", (key,)).fetchone()
            if done is None:
                connection.execute(
                    "INSERT OR REPLACE INTO cells (key, spec, status, result, error, created, seconds) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
        return done is None

    def cells(self, *, everything: bool = False) -> list[Cell]:
        """The finished cells of the current study in its order, under its labels; with `everything` those of earlier
        ones too, as they were measured. Inspections are apart, in `inspections`."""
        return self._find(f"c.key NOT LIKE '{INSPECTION}%'", everything=everything)

    def inspections(self, *, everything: bool = False) -> list[Cell]:
        """The finished inspections, as `cells` gives cells: each result is {"inspection": Inspection.to_dict()}."""
        return self._find(f"c.key LIKE '{INSPECTION}%'", everything=everything)

    def failures(self) -> list[Cell]:
        """The failed cells of the current study, inspections among them, in its order."""
        return self._find("c.status = 'failed'")

    def cell(self, key: str) -> Cell | None:
        """The finished cell of that key, as it was measured."""
        return next(iter(self._find("c.key = ?", key, everything=True)), None)

    def _find(self, condition: str, *values: Any, everything: bool = False) -> list[Cell]:
        """The cells that meet a condition: those of the current study, or of all where there is no plan."""
        labels, tables, order = "NULL", "cells c", "c.created, c.rowid"
        if not everything and self.rows("SELECT 1 FROM plan LIMIT 1"):
            labels = "p.spec" if self.rows("SELECT 1 FROM pragma_table_info('plan') WHERE name = 'spec'") else "NULL"
            tables, order = _PLANNED, "p.position"
        columns = f"c.key, c.spec, c.status, c.result, c.error, c.created, c.seconds, {labels}"
        query = f"SELECT {columns} FROM {tables} WHERE {condition} ORDER BY {order}"
        return [self._cell(*row) for row in self.rows(query, values)]

    def _cell(self, key: str, spec: str, status: str, result: str | bytes | None, *rest: Any) -> Cell:
        *others, labels = rest
        known, found = json.loads(spec), self.read(result, f"cell {key[:12]}")
        if labels is not None:
            known = json.loads(labels) | {name: known.get(name) for name in OF_THE_MODEL}
            found = None if found is None else relabelled(found, known)
        return Cell(key, known, status, found, *others)

    def read(self, stored: str | bytes | None, what: str) -> Any:
        """The inverse of `packed`. Raises StorageError where that fails."""
        try:
            text = zlib.decompress(stored).decode() if isinstance(stored, bytes) else stored
            return None if text is None else json.loads(text)
        except (zlib.error, ValueError) as problem:
            raise StorageError(
                f"the store {self.path} is damaged ({what}: {problem}); move it away and start again"
            ) from problem

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
        row = (name, to_json(config), to_json(environment))
        with self.writing() as connection:
            last = connection.execute("SELECT name, config, environment FROM study ORDER BY id DESC LIMIT 1").fetchone()
            if last != row:
                connection.execute(
                    "INSERT INTO study (name, config, environment, created) VALUES (?, ?, ?, ?)", (*row, now())
                )
            connection.execute("DELETE FROM plan")
            connection.executemany(
                "INSERT INTO plan (position, identity, spec) VALUES (?, ?, ?)",
                [(i, identity, to_json(spec)) for i, (identity, spec) in enumerate(plan)],
            )

    def study(self) -> dict[str, Any]:
        """The current study: {"id", "name", "config", "environment", "created", "planned"}; {} when none was begun.
        `planned` is the number of its cells."""
        columns = ("id", "name", "config", "environment", "created", "planned")
        query = f"SELECT {', '.join(columns[:-1])}, (SELECT count(*) FROM plan) FROM study ORDER BY id DESC LIMIT 1"
        for row in self.rows(query):
            found = dict(zip(columns, row, strict=True))
            return found | {name: json.loads(found[name]) for name in ("config", "environment")}
        return {}

    def bind(self, keys: Mapping[str, str]) -> None:
        """Record which key answers for each planned identity."""
        with self.writing() as connection:
            connection.executemany("INSERT OR REPLACE INTO bindings (identity, key) VALUES (?, ?)", list(keys.items()))

    def counts(self) -> dict[str, int]:
        """{"done", "failed"}: how many cells of the current study are finished."""
        rows = self.rows(f"SELECT c.status, count(*) FROM {_PLANNED} GROUP BY c.status")
        return {"done": 0, "failed": 0, **dict(rows)}

    # ---- the file ------------------------------------------------------------------------------------------------

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Inside, this process alone runs a study on the store; a second one raises StorageError at once.

        SQLite locks the empty file `store.lock`; the system gives the lock up with the process, however that ends.
        """
        with self._errors():
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = sqlite3.connect(self.directory / "store.lock", timeout=0, isolation_level=None)
        refusal = f"another process runs a study on {self.directory} at this moment"
        try:
            with self._errors(locked=f"{refusal}; wait until it has ended, or choose another directory with --out"):
                lock.execute("BEGIN EXCLUSIVE")
            yield
        finally:
            lock.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is in the file, or none."""
        with self._errors():
            connection = self._connect(write=True)
            with _transaction(connection):
                yield connection

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self._errors():
            return self._connect(write=False).execute(query, parameters).fetchall()

    def _connect(self, write: bool) -> sqlite3.Connection:
        if self._connection is None or (write and not self._writable):
            self.close()
            self._connection = self._open_to_write() if write else self._open_to_read()
            self._writable = write
        return self._connection

    def _open_to_write(self) -> sqlite3.Connection:
        self.directory.mkdir(parents=True, exist_ok=True)
        return self._open("mode=rwc")

    def _open_to_read(self) -> sqlite3.Connection:
        if not self.path.is_file():
            raise StorageError(
                f"there is no study in {self.directory} ({self.path.name} is missing); run `quantlens study STUDY.yaml "
                f"--out {self.directory}` first"
            )
        # A WAL file can be read in place only where SQLite may write its shared-memory file; elsewhere nobody
        # writes, and "immutable" is true.
        first, second = ("mode=rw", "mode=ro") if os.access(self.directory, os.W_OK) else ("mode=ro", "immutable=1")
        try:
            return self._open(first)
        except sqlite3.OperationalError:
            return self._open(second)

    def _open(self, mode: str) -> sqlite3.Connection:
        location = f"{self.path.resolve().as_uri()}?{mode}"
        connection = sqlite3.connect(location, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > FORMAT:
                raise StorageError(
                    f"the store {self.path} was written by a newer quantlens (format {version}, this one reads "
                    f"{FORMAT}); install that version"
                )
            if mode == "mode=rwc":
                _prepare(connection, version)
            connection.execute("SELECT count(*) FROM cells").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _errors(self, **said: str) -> Iterator[None]:
        """Turn what SQLite and the file system say into one sentence with a cure. said: word -> another sentence."""
        try:
            yield
        except sqlite3.Error as error:
            message = str(error).lower()
            if "disk i/o" in message and self._no_room():
                message = "disk is full"
            sentences = {**said, **_PROBLEMS}
            found = next(sentence for pattern, sentence in sentences.items() if re.search(pattern, message))
            raise StorageError(found.format(path=self.path, message=error)) from error
        except OSError as error:
            raise StorageError(
                f"the store {self.path} cannot be written: {error.strerror or error}; choose another directory with "
                "--out, or free space"
            ) from error

    def _no_room(self) -> bool:
        """Whether the disk is full: SQLite calls it an I/O error where there is no room for its shared memory."""
        try:
            return shutil.disk_usage(self.directory).free < SHARED_MEMORY
        except OSError:
            return False


def _prepare(connection: sqlite3.Connection, version: int) -> None:
    """Before the first write: bring a new file, or one of an older layout, to `FORMAT`."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if version == FORMAT:
        return
    with _transaction(connection):
        columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(plan)")]
        if columns and "spec" not in columns:
            connection.execute("ALTER TABLE plan ADD COLUMN spec TEXT")
        for statement in ("DROP TABLE IF EXISTS claims", *_SCHEMA.split(";"), f"PRAGMA user_version = {FORMAT}"):
            connection.execute(statement)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def relabelled(result: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """A result under the labels and sources of a spec; its metrics are untouched."""
    if spec.get("inspects"):
        found = result["inspection"]
        images = {**found["images"], "source": spec["images"]["source"]}
        return {**result, "inspection": {**found, "model": spec["model"], "images": images}}
    labels = ("model", "method", "architecture", "method_name", "calibration")
    changed = {**result, **{name: spec[name] for name in labels}}
    changed["id"] = {**result["id"], "source": spec["id"]["source"]}
    changed["ood"] = {name: {**entry, "source": spec["ood"][name]["source"]} for name, entry in result["ood"].items()}
    for name, entry in (result.get("shift") or {}).items():
        changed["shift"] = {**changed["shift"], name: {**entry, "source": spec["shift"][name]["source"]}}
    if result.get("fit") and spec.get("fit"):
        changed["fit"] = {**result["fit"], "source": spec["fit"]["source"]}
    return changed


def packed(result: Mapping[str, Any] | None) -> str | bytes | None:
    """JSON text, or its zlib compression when it is long."""
    if result is None:
        return None
    text = to_json(result)
    return zlib.compress(text.encode(), 6) if len(text) > COMPRESS_ABOVE else text
