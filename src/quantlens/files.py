"""Writing a file whole or not at all."""

from __future__ import annotations

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
