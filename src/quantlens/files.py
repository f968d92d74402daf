"""Writing a file whole or not at all, and knowing beforehand whether it can be written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from quantlens.errors import StorageError


def write_whole(path: Path, content: bytes | str | Iterator[bytes], *, what: str = "") -> None:
    """Write ``content`` (text as UTF-8, or piece by piece) beside ``path``, then put it in its place.

    what: what it is, for the error ("the report"). Raises StorageError where that cannot be done; nothing is left then.
    """
    if isinstance(content, bytes | str):
        content = iter([content.encode() if isinstance(content, str) else content])
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            temporary = stream.name
            stream.writelines(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        named = f"{what} {path}" if what else str(path)
        raise StorageError(
            f"cannot write {named}: {error.strerror or error}; free some room or choose another place"
        ) from error


def check_writable(path: Path | str | None, *, what: str = "") -> None:
    """Find out, before anything is computed, whether :func:`write_whole` could write ``path`` (None: nothing to find).

    what: what it is, for the error. Nothing is left behind, folders neither. Raises StorageError.
    """
    if path is None:
        return
    path = Path(path)
    folder = path.parent
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        named = f"{what} {path}" if what else str(path)
        raise StorageError(
            f"cannot write {named}: {error.strerror or error} ({folder}); choose another place"
        ) from error
