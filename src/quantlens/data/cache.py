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

FORMAT_VERSION = 2
CHECKED_IMAGES = 512  # so many images, evenly spaced, have their CRC compared when an entry is opened
STALE_SECONDS = 24 * 3600  # a temporary folder this old was left by a process that was killed
CURE = (
    "free some space, set QUANTLENS_CACHE to a folder on another disk, or use --no-cache to keep the images in memory"
)


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


def _remove_stale(directory: Path) -> None:
    for path in directory.glob(f".{'[0-9a-f]' * 32}.*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path)
