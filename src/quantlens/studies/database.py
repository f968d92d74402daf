"""One SQLite file of a study: opened when it is needed, written in whole transactions, its errors in one sentence."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantlens.errors import StorageError

BUSY_SECONDS = 30.0
"""How long a writer waits for another one, such as `quantlens bench --store` beside a study."""

SHARED_MEMORY = 64 << 10
"""Bytes of disk without which SQLite cannot work: twice what its shared-memory file begins with."""


class Database:
    """The file `directory/store.sqlite`. Opening touches nothing: the first write makes the file, and reading one that
    does not exist raises `StorageError`. Use it as a context manager, or call `close()`.

    The file is in WAL mode: a reader never waits for a writer, and a process that is killed leaves it whole. (WAL needs
    shared memory: keep it on a local disk, not on a network share.) Not to be shared between threads.
    """

    FORMAT = 0
    """Version of the file's layout (`PRAGMA user_version`)."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.path = self.directory / "store.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._writable = False

    def __enter__(self) -> Any:
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

    def lay_out(self, connection: sqlite3.Connection, version: int) -> None:
        """Inside a transaction: bring a file of an older layout (0: a new file) to `FORMAT`."""

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

    @contextmanager
    def locked(self, refusal: str) -> Iterator[None]:
        """Inside, no other process is inside, on the same directory: it raises StorageError(refusal) at once.

        SQLite locks the empty file `store.lock`; the system gives the lock up with the process, however that ends.
        """
        with self._errors():
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = sqlite3.connect(self.directory / "store.lock", timeout=0, isolation_level=None)
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                lock.close()
                if "locked" in str(error):
                    raise StorageError(refusal) from None
                raise
        try:
            yield
        finally:
            lock.close()

    # ---- opening -------------------------------------------------------------------------------------------------

    def _connect(self, write: bool) -> sqlite3.Connection:
        if self._connection is not None and (self._writable or not write):
            return self._connection
        self.close()
        self._connection = self._connect_writing() if write else self._connect_reading()
        self._writable = write
        return self._connection

    def _connect_writing(self) -> sqlite3.Connection:
        self.directory.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            self._version(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            if self._version(connection) < self.FORMAT:
                with _transaction(connection):
                    self.lay_out(connection, self._version(connection))
                    connection.execute(f"PRAGMA user_version = {self.FORMAT}")
        except BaseException:
            connection.close()
            raise
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
                self._version(connection)
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

    def _version(self, connection: sqlite3.Connection) -> int:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > self.FORMAT:
            raise StorageError(
                f"the store {self.path} was written by a newer quantlens (format {version}, this one reads "
                f"{self.FORMAT}); install that version"
            )
        return version

    # ---- errors --------------------------------------------------------------------------------------------------

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
