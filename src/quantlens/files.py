"""Writing a file whole or not at all, knowing beforehand whether it can be written, and finding those of others."""

import errno
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantlens.errors import StorageError


@contextmanager
def _refusal(path: Path, what: str) -> Iterator[None]:
    """What the system refuses as a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        named = f"{what} {path}".strip()
        raise StorageError(
            f"cannot write {named}: {error.strerror or error}; free some room or choose another place"
        ) from error


def write_whole(path: Path, content: bytes | str | Iterator[bytes], *, what: str = "") -> Path:
    """Write ``content`` (text as UTF-8, or piece by piece) beside ``path``, then put it in its place. Returns the path.

    A device or a pipe (``/dev/null``, ``/dev/stdout``) is written to as it is. what: what it is, for the error ("the
    report"). Raises StorageError where that cannot be done; nothing is left then.
    """
    content = content.encode() if isinstance(content, str) else content
    parts = [content] if isinstance(content, bytes) else content
    with _refusal(path, what):
        if _is_stream(path):
            with open(path, "wb") as stream:
                stream.writelines(parts)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            with open(Path(folder) / path.name, "wb") as stream:
                stream.writelines(parts)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(stream.name, path)
    return path


def check_writable(path: Path | str | None, *, what: str = "") -> None:
    """Find out, before anything is computed, whether :func:`write_whole` could write ``path`` (None: nothing to find).

    what: what it is, for the error. Nothing is left behind, folders neither. Raises StorageError.
    """
    if path is None:
        return
    path = Path(path)
    with _refusal(path, what):
        if _is_stream(path):
            return
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        tempfile.TemporaryFile(dir=folder).close()


_BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
}


def mistaken(path: Path) -> str:
    """What a file is that was taken for a model's: empty, a web page, a pointer of Git LFS, text …; nothing where its
    first bytes do not tell. Raises OSError."""
    with path.open("rb") as stream:
        first = stream.read(64).lstrip()
    if not first:
        return "empty"
    if found := next((what for beginning, what in _BEGINNINGS.items() if first.startswith(beginning)), None):
        return found
    if first.startswith(b"<") and (path.suffix != ".xml" or re.match(rb"<(!doctype|html)", first, re.IGNORECASE)):
        return "a web page: what was downloaded is not the file itself"
    if path.suffix not in (".xml", ".json") and re.fullmatch(rb"[\t\n\r -~]+", first):
        return f"text, which begins with {first[:32].decode()!r}"
    return ""


def _is_stream(path: Path) -> bool:
    """Whether a path is a device or a pipe, which a file must not replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def package_file(package: str, relative: str) -> Path:
    """A data file of an installed package, found without importing it, which may take seconds. Raises StorageError."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise StorageError(f"the data file {relative} of the package {package} is missing; install that package again")
