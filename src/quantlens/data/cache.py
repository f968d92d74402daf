"""The on-disk cache of decoded images: a list of files is decoded once per preprocessing, for all later uses.

An entry is two files, named after a hash of what determines the pixels (preprocessing, Pillow's version, and
of every selected file its path, size and time of change, so that a changed file is decoded anew):

    KEY.npy    uint8 [N,3,H,W], read as a memory map, never unpickled; zeros at its end stand for those left out
    KEY.json   names of the images left out and why, a CRC-32 per image, versions

Both are written under a temporary name and renamed, the JSON file last, so that a reader sees a whole entry
or none and two processes that write the same entry do each other no harm. An entry that is damaged is built
again.

The folder is `cache_dir`, else the environment variable QUANTLENS_CACHE, else the user's cache folder.
"""

import errno
import io
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from quantlens.data.sources import sha256_of
from quantlens.errors import StorageError
from quantlens.files import write_whole

FORMAT_VERSION = 3  # raised when other pixels come out of the same files
CHECKED_IMAGES = 512  # so many images, evenly spaced, have their CRC compared when an entry is opened
STALE_SECONDS = 24 * 3600  # a temporary folder this old was left by a process that was killed
CURE = (
    "free some space, set QUANTLENS_CACHE to a folder on another disk, or use --no-cache to keep the images in memory"
)


KEPT_BYTES = 1 << 30
"""Images that no file holds are kept in memory up to this size, and beyond it in a temporary file."""


class ReadOnlyError(StorageError):
    """The cache folder may not be written."""


Skipped = list[tuple[int, str]]
"""(position in the list, why it cannot be read) of images left out."""

Entry = tuple[np.ndarray, Skipped]
"""One cached list: pixels uint8 [N,3,H,W], and the images left out."""


def cache_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where decoded images are kept: `cache_dir`, QUANTLENS_CACHE or the user's cache folder, and `images`
    below it.
    """
    base = cache_dir or os.environ.get("QUANTLENS_CACHE")
    if not base:
        import platformdirs

        base = platformdirs.user_cache_dir("quantlens", appauthor=False)
    return Path(base).expanduser() / "images"


def cache_key(identity: Iterable[str], image_key: dict[str, Any]) -> str:
    """32 hex digits that stand for these files, in this order, with this preprocessing and this decoder."""
    decoder = f"{PIL.__version__}/{features.version('jpg')}"
    return sha256_of([json.dumps([FORMAT_VERSION, decoder, image_key], sort_keys=True), *identity])[:32]


def read_entry(directory: Path, key: str, total: int, image_shape: tuple[int, ...]) -> Entry | None:
    """The entry `key` of a list of `total` images, or None where there is none or it is damaged."""
    try:
        side = json.loads((directory / f"{key}.json").read_text(encoding="utf-8"))
        pixels = np.load(directory / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        skipped = [(int(position), str(reason)) for position, reason in side["skipped"]]
        checks, kept = side["crc32"], total - len(skipped)
        whole = (side["format"], pixels.dtype, pixels.shape) == (FORMAT_VERSION, np.uint8, (total, *image_shape))
        if not whole or len(checks) != kept:
            return None
        rows = np.unique(np.linspace(0, kept - 1, min(kept, CHECKED_IMAGES)).astype(np.int64))
        if any(zlib.crc32(pixels[row].tobytes()) != checks[row] for row in rows):
            return None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return pixels[:kept], skipped


def write_entry(
    directory: Path,
    key: str,
    total: int,
    image_shape: tuple[int, ...],
    images: Iterator[np.ndarray],
    skipped: Skipped,
) -> Entry:
    """Write the entry `key` of a list of `total` images and return it. images: uint8 of that shape, one by one; each
    that does not come is in `skipped` in the end.

    Raises StorageError, naming the folder and the cure, where the disk is full or may not be written. Written
    as a plain stream: a memory map would end the process with SIGBUS on a full disk.
    """
    checks: list[int] = []
    size = int(np.prod(image_shape))
    needed = total * size

    def content() -> Iterator[bytes]:
        header = io.BytesIO()
        whole = {"descr": "|u1", "fortran_order": False, "shape": (total, *image_shape)}
        np.lib.format.write_array_header_1_0(header, whole)
        yield header.getvalue()
        for image in images:
            data = image.tobytes()
            checks.append(zlib.crc32(data))
            yield data
        yield from (bytes(size) for _ in skipped)

    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory)
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB left")
        write_whole(directory / f"{key}.npy", content())
        side = {"format": FORMAT_VERSION, "pillow": PIL.__version__, "skipped": skipped, "crc32": checks}
        write_whole(directory / f"{key}.json", json.dumps(side))
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = (getattr(cause, "strerror", None) or str(error)).lower()
        read_only = getattr(cause, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
        kind = ReadOnlyError if read_only else StorageError
        raise kind(f"the image cache {directory} cannot be written ({reason}); {CURE}") from error
    entry = read_entry(directory, key, total, image_shape)
    if entry is None:
        raise StorageError(f"the image cache {directory} did not keep what was written to it; {CURE}")
    return entry


class Rows:
    """Arrays [n, ...] of one shape and type, put together along the first axis as they come: in memory up to
    KEPT_BYTES, beyond that in a file without a name in the cache's folder (`cache_dir` False: in memory). Raises
    ValueError, naming both shapes, for an array that does not fit, and StorageError where the disk is full."""

    def __init__(self, cache_dir: str | os.PathLike[str] | bool | None = None) -> None:
        self.cache_dir, self._parts, self._bytes = cache_dir, list[np.ndarray](), 0
        self._file: Any = None

    def append(self, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows)
        if self._parts and (rows.shape[1:], rows.dtype) != (self._parts[0].shape[1:], self._parts[0].dtype):
            raise ValueError(f"{list(self._parts[0].shape[1:])} and {list(rows.shape[1:])}")
        self._bytes += rows.nbytes
        if self._file is not None:
            self._write([rows])
            return
        self._parts.append(rows)
        if self._bytes > KEPT_BYTES and len(self._parts) > 1 and self.cache_dir is not False:
            directory = cache_directory(None if isinstance(self.cache_dir, bool) else self.cache_dir)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - as long as its memory map
            except OSError as error:
                raise StorageError(
                    f"{directory} cannot be written ({(error.strerror or str(error)).lower()})"
                ) from error
            self._write(self._parts)
            self._parts = [self._parts[0][:0]]

    def _write(self, parts: list[np.ndarray]) -> None:
        assert self._file is not None
        try:
            for part in parts:
                self._file.write(part.data)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StorageError(f"images of {self._bytes / 1e9:.1f} GB cannot be kept ({reason}); {CURE}") from error

    def whole(self) -> np.ndarray:
        """All rows; of a file, a memory map that may be written and does not change it."""
        if self._file is None:
            return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        self._file.flush()
        first = self._parts[0]
        return np.memmap(self._file, first.dtype, "c").reshape(-1, *first.shape[1:])


def _remove_stale(directory: Path) -> None:
    for path in directory.glob(f".{'[0-9a-f]' * 32}.*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path)
