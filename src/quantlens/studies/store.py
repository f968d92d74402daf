"""The store of a study: one SQLite file, `DIR/store.sqlite`, to which every finished cell is written at once.

Several processes of one machine may work on one store: a *claim* says which process runs which cell, and a claim
whose process is gone is taken over. The file is in WAL mode, so a reader never waits for a writer and a process that
is killed leaves the store whole. (WAL needs shared memory: keep the store on a local disk, not on a network share.)

Tables
    cells     a finished cell: key, spec, status, result, error, created, seconds; or what was found out of a model
              ("which layer hurts"), under a key that begins with `INSPECTION`
    study     the configurations that were run here: id, name, config, environment, created; the last is the current
    plan      the cells of the current study in order, each by its identity (see `cells.identity`)
    bindings  identity -> key: which cell answers for a planned identity (known once the checkpoint has been hashed)
    claims    key -> owner: the cells that run now
    artefacts exported files by fingerprint: what each is, and its evaluation (see `benchmarks`)
    timings   latency of artefacts: one row per run, artefact, batch size and thread count
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantlens.errors import StorageError

FORMAT = 2
"""Version of the file's layout (`PRAGMA user_version`). 1 had no artefacts and timings; such a store is read, and the
first write adds the tables."""

BUSY_SECONDS = 30.0
STALE_SECONDS = 180.0
"""A claim of another machine counts as abandoned when its heart has not beaten for so long."""

INSPECTION = "inspection-"
"""How the keys of inspections begin; those of cells with figures are hashes alone."""

SHARED_MEMORY = 64 << 10
"""Bytes of disk without which SQLite cannot work: twice what its shared-memory file begins with."""

COMPRESS_ABOVE = 64 * 1024
"""Results whose JSON is longer than this many bytes are stored as zlib-compressed JSON."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS cells (
    key TEXT PRIMARY KEY, spec TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
    result BLOB, error TEXT, created TEXT NOT NULL, seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS study (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, config TEXT NOT NULL, environment TEXT NOT NULL,
    created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS plan (position INTEGER PRIMARY KEY, identity TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS bindings (identity TEXT PRIMARY KEY, key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY, owner TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, started REAL NOT NULL,
    heartbeat REAL NOT NULL);
CREATE TABLE IF NOT EXISTS artefacts (
    fingerprint TEXT PRIMARY KEY, facts TEXT NOT NULL, result BLOB, created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS timings (
    run TEXT NOT NULL, fingerprint TEXT NOT NULL, batch INTEGER NOT NULL, threads INTEGER NOT NULL,
    timing TEXT NOT NULL, PRIMARY KEY (run, fingerprint, batch, threads));
"""


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


@dataclass(frozen=True)
class Owner:
    """A process that runs cells. `host` names the machine and the process namespace in which `pid` has a meaning."""

    name: str
    host: str
    pid: int
    started: float

    @staticmethod
    def me() -> Owner:
        import psutil

        host = machine()
        pid = os.getpid()
        started = psutil.Process(pid).create_time()
        return Owner(f"{host}/{pid}/{started:.2f}", host, pid, started)


def machine() -> str:
    """Host name and, where there is one, the process namespace (two containers may share a host name)."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}{namespace and ' ' + namespace}"


def to_json(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, no NaN (raises ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def now() -> str:
    """The present in UTC, ISO 8601 with microseconds (so texts compare as times do)."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Store:
    """The store in directory `directory`. Opening touches nothing: the first write makes the file, and reading a store
    that does not exist raises `StorageError`. Use it as a context manager, or call `close()`.

    Not to be shared between threads: give each thread its own.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.path = self.directory / "store.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._writable = False

    # ---- opening and closing -------------------------------------------------------------------------------------

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call twice; a later call opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._writable = False

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what SQLite and the file system say into one sentence with a cure."""
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(self._explain(str(error))) from error
        except OSError as error:
            raise StorageError(
                f"the store {self.path} cannot be written: {error.strerror or error}; choose another directory with "
                "--out, or free space"
            ) from error

    def _explain(self, message: str) -> str:
        low = message.lower()
        again = "run the same command again afterwards: finished cells are kept"
        if "disk is full" in low or ("disk i/o" in low and self._no_room()):
            return f"the disk that holds the store {self.path} is full; free some space and {again}"
        if "readonly" in low or "read-only" in low:
            return f"the store {self.path} is read-only; give write permission to it and its directory, and {again}"
        if "not a database" in low or "malformed" in low or "corrupt" in low:
            return f"the store {self.path} is damaged ({message}); move it away and run the study again"
        if "locked" in low or "busy" in low:
            return (
                f"the store {self.path} was kept locked by another process for {BUSY_SECONDS:.0f} s; end that process "
                f"and {again}"
            )
        if "unable to open" in low:
            return f"the store {self.path} cannot be opened; check that its directory exists and can be written"
        if "disk i/o" in low:
            return f"the disk that holds the store {self.path} reports an error ({message}); check the disk and {again}"
        return f"the store {self.path} cannot be used ({message}); move it away and run the study again"

    def _no_room(self) -> bool:
        """Whether the disk is full: SQLite calls it an I/O error where there is no room for its shared memory."""
        try:
            return shutil.disk_usage(self.directory).free < SHARED_MEMORY
        except OSError:
            return False

    def _connect(self, write: bool) -> sqlite3.Connection:
        if self._connection is not None and (self._writable or not write):
            return self._connection
        self.close()
        if write:
            self.directory.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                connection.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
                self._check_format(connection)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                if connection.execute("PRAGMA user_version").fetchone()[0] < FORMAT:
                    connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
            except BaseException:
                connection.close()
                raise
        else:
            connection = self._connect_reading()
        self._connection, self._writable = connection, write
        return connection

    def _connect_reading(self) -> sqlite3.Connection:
        if not self.exists():
            raise StorageError(
                f"there is no study in {self.directory} ({self.path.name} is missing); run `quantlens study STUDY.yaml "
                f"--out {self.directory}` first"
            )
        location = self.path.resolve().as_uri()
        # A WAL file can be read in place only where SQLite may write its shared-memory file; elsewhere nobody
        # writes, and "immutable" is true.
        modes = ("mode=ro", "immutable=1") if not os.access(self.directory, os.W_OK) else ("mode=rw", "mode=ro")
        last: sqlite3.Error | None = None
        for mode in modes:
            connection = sqlite3.connect(f"{location}?{mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                connection.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
                self._check_format(connection)
                connection.execute("SELECT count(*) FROM cells").fetchone()
                return connection
            except sqlite3.OperationalError as error:
                connection.close()
                last = error
            except BaseException:
                connection.close()
                raise
        assert last is not None
        raise last

    def _check_format(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > FORMAT:
            raise StorageError(
                f"the store {self.path} was written by a newer quantlens (format {version}, this one reads {FORMAT}); "
                "install that version"
            )

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is in the file, or none."""
        with self._errors():
            connection = self._connect(write=True)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self._errors():
            return self._connect(write=False).execute(query, parameters).fetchall()

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
        """Write a finished cell and give up its claim, in one transaction.

        `status` is "done" (with `result`) or "failed" (with `error`, the traceback). A cell that is done already is
        left as it is. Returns whether the cell was written.
        """
        if status not in ("done", "failed"):
            raise ValueError(f"status must be 'done' or 'failed', not {status!r}")
        with self.writing() as connection:
            before = connection.execute("SELECT status FROM cells WHERE key = ?", (key,)).fetchone()
            connection.execute("DELETE FROM claims WHERE key = ?", (key,))
            if before is not None and before[0] == "done":
                return False
            connection.execute(
                "INSERT OR REPLACE INTO cells (key, spec, status, result, error, created, seconds) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (key, to_json(dict(spec)), status, packed(result), error, now(), float(seconds)),
            )
        return True

    def cells(self, *, everything: bool = False) -> list[Cell]:
        """The finished cells of the current study in its order; with `everything` those of earlier ones too.
        Inspections are apart, in `inspections`."""
        return self._cells(everything, "NOT LIKE")

    def inspections(self, *, everything: bool = False) -> list[Cell]:
        """The finished inspections, as `cells` gives cells: each result is {"inspection": Inspection.to_dict()}."""
        return self._cells(everything, "LIKE")

    def _cells(self, everything: bool, like: str) -> list[Cell]:
        columns = "c.key, c.spec, c.status, c.result, c.error, c.created, c.seconds"
        wanted = f"c.key {like} '{INSPECTION}%'"
        if not everything and self.rows("SELECT 1 FROM plan LIMIT 1"):
            query = (
                f"SELECT {columns} FROM plan p JOIN bindings b ON b.identity = p.identity "
                f"JOIN cells c ON c.key = b.key WHERE {wanted} ORDER BY p.position"
            )
        else:
            query = f"SELECT {columns} FROM cells c WHERE {wanted} ORDER BY c.created, c.rowid"
        return [self._cell(row) for row in self.rows(query)]

    def cell(self, key: str) -> Cell | None:
        """The finished cell of that key."""
        columns = "key, spec, status, result, error, created, seconds"
        rows = self.rows(f"SELECT {columns} FROM cells WHERE key = ?", (key,))
        return self._cell(rows[0]) if rows else None

    def _cell(self, row: tuple[Any, ...]) -> Cell:
        key, spec, status, result, error, created, seconds = row
        try:
            return Cell(key, json.loads(spec), status, unpacked(result), error, created, seconds)
        except (zlib.error, ValueError) as problem:
            raise StorageError(
                f"the store {self.path} is damaged (cell {key[:12]}: {problem}); move it away and run the study again"
            ) from problem

    def spec(self, key: str) -> str | None:
        """The spec of a finished cell as canonical JSON text."""
        rows = self.rows("SELECT spec FROM cells WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def finished(self, keys: Iterable[str], retry_before: str | None = None) -> set[str]:
        """Those of `keys` that need not run: done, or failed (not before the time `retry_before`, if one is given)."""
        wanted = set(keys)
        rows = self.rows("SELECT key, status, created FROM cells")
        return {key for key, status, at in rows if key in wanted and not _again(status, at, retry_before)}

    def rewrite(self, key: str, spec: Mapping[str, Any], result: Mapping[str, Any] | None) -> None:
        """Give a finished cell the labels and paths that the present study uses (see `runner.relabelled`)."""
        with self.writing() as connection:
            connection.execute(
                "UPDATE cells SET spec = ?, result = ? WHERE key = ?", (to_json(dict(spec)), packed(result), key)
            )

    # ---- the study -----------------------------------------------------------------------------------------------

    def begin(
        self,
        name: str,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        identities: Sequence[str],
    ) -> None:
        """Make this configuration, with its planned cells in order, the current study. The same configuration again
        (in the same environment) adds no row."""
        row = (name, to_json(dict(config)), to_json(dict(environment)))
        with self.writing() as connection:
            last = connection.execute("SELECT name, config, environment FROM study ORDER BY id DESC LIMIT 1").fetchone()
            if last != row:
                connection.execute(
                    "INSERT INTO study (name, config, environment, created) VALUES (?, ?, ?, ?)", (*row, now())
                )
            planned = [i for (i,) in connection.execute("SELECT identity FROM plan ORDER BY position")]
            if planned != list(identities):
                connection.execute("DELETE FROM plan")
                connection.executemany("INSERT INTO plan (position, identity) VALUES (?, ?)", enumerate(identities))

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

    def planned(self) -> list[str]:
        """The identities of the current study's cells, in its order."""
        return [identity for (identity,) in self.rows("SELECT identity FROM plan ORDER BY position")]

    def counts(self, identities: Iterable[str] | None = None) -> dict[str, int]:
        """{"done", "failed"}: how many cells of the current study are finished; or of those with these identities, as
        another study may have begun on this store since."""
        wanted = set(self.planned() if identities is None else identities)
        rows = self.rows("SELECT b.identity, c.status FROM bindings b JOIN cells c ON c.key = b.key")
        return {"done": 0, "failed": 0, **Counter(status for identity, status in rows if identity in wanted)}

    def last(self) -> int:
        """A mark: the number of the newest row (see `since`)."""
        return int(self.rows("SELECT coalesce(max(rowid), 0) FROM cells")[0][0])

    def since(self, mark: int) -> list[tuple[int, str, dict[str, Any], float, str | None]]:
        """(mark, key, spec, seconds, traceback or None) of the cells finished after a mark, oldest first."""
        rows = self.rows("SELECT rowid, key, spec, seconds, error FROM cells WHERE rowid > ? ORDER BY rowid", (mark,))
        return [(number, key, json.loads(spec), seconds, error) for number, key, spec, seconds, error in rows]

    def failures(self, identities: Iterable[str] | None = None) -> list[tuple[dict[str, Any], str]]:
        """(spec, traceback) of the failed cells of the current study, or of those with these identities, in order."""
        rows = self.rows(
            "SELECT b.identity, c.spec, c.error FROM bindings b JOIN cells c ON c.key = b.key WHERE c.status = 'failed'"
        )
        failed = {identity: (json.loads(spec), error or "") for identity, spec, error in rows}
        return [failed[i] for i in (self.planned() if identities is None else identities) if i in failed]

    # ---- claims --------------------------------------------------------------------------------------------------

    def claim(self, key: str, owner: Owner, retry_before: str | None = None) -> str:
        """Try to take a cell: "mine" (run it now), "done" or "failed" (it is finished), or "taken" (another living
        process runs it). A cell that failed before the time `retry_before` is taken again."""
        with self.writing() as connection:
            finished = connection.execute("SELECT status, created FROM cells WHERE key = ?", (key,)).fetchone()
            if finished is not None and not _again(finished[0], finished[1], retry_before):
                return str(finished[0])
            held = connection.execute(
                "SELECT owner, host, pid, started, heartbeat FROM claims WHERE key = ?", (key,)
            ).fetchone()
            if held is not None and held[0] != owner.name and not _abandoned(*held[1:]):
                return "taken"
            connection.execute(
                "INSERT OR REPLACE INTO claims (key, owner, host, pid, started, heartbeat) VALUES (?, ?, ?, ?, ?, ?)",
                (key, owner.name, owner.host, owner.pid, owner.started, time.time()),
            )
        return "mine"

    def taken(self, key: str, owner: Owner) -> bool:
        """Whether another living process holds this cell."""
        rows = self.rows("SELECT owner, host, pid, started, heartbeat FROM claims WHERE key = ?", (key,))
        return bool(rows) and rows[0][0] != owner.name and not _abandoned(*rows[0][1:])

    def beat(self, owner: Owner) -> None:
        """Say that this owner still lives."""
        with self.writing() as connection:
            connection.execute("UPDATE claims SET heartbeat = ? WHERE owner = ?", (time.time(), owner.name))

    def release(self, owner: Owner) -> None:
        """Give up every claim of this owner."""
        with self.writing() as connection:
            connection.execute("DELETE FROM claims WHERE owner = ?", (owner.name,))


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


def _again(status: str, created: str, retry_before: str | None) -> bool:
    return status == "failed" and retry_before is not None and created < retry_before


def _abandoned(host: str, pid: int, started: float, heartbeat: float) -> bool:
    """Whether the process that holds a claim is gone. On this machine that is known; elsewhere the heartbeat tells."""
    import psutil

    if host != machine():
        return time.time() - heartbeat > STALE_SECONDS
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) > 1.0 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return time.time() - heartbeat > STALE_SECONDS
