"""The on-disk cache of decoded images: a list of files is decoded once per preprocessing, for all later uses.

An entry is two files, named after a hash of what determines the pixels (preprocessing, Pillow's version, and
of every selected file its path, size and time of change, so that a changed file is decoded anew):

    KEY.npy    uint8 [N,3,H,W], read as a memory map, never unpickled
    KEY.json   names of the images left out and why, a CRC-32 per image, versions

Both are written under a temporary name and renamed, the JSON file last, so that a reader sees a whole entry
or none and two processes that write the same entry do each other no harm. An entry that is damaged is built
again.

The folder is `cache_dir`, else the environment variable QUANTLENS_CACHE, else the user's cache folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import features

from quantlens.errors import StorageError

FORMAT_VERSION = 1
CHECKED_IMAGES = 512  # so many images, evenly spaced, have their CRC compared when an entry is opened
STALE_SECONDS = 24 * 3600  # a temporary file this old was left by a process that was killed
_ENTRY = re.compile(r"[0-9a-f]{32}\.(npy|json)")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{32}\.tmp")
CURE = (
    "free some space, set QUANTLENS_CACHE to a folder on another disk, or use --no-cache to keep the images in memory"
)


class ReadOnlyError(StorageError):
    """The cache folder may not be written."""


@dataclass(frozen=True)
class CacheInfo:
    """What a cache folder holds: entries, images in them, and bytes on disk (temporary files included)."""

    directory: Path
    entries: int
    images: int
    bytes: int


@dataclass(frozen=True)
class Entry:
    """One cached list: `pixels` uint8 [N,3,H,W] and `skipped`, (position in the list, reason) of each image
    left out.
    """

    pixels: np.ndarray
    skipped: list[tuple[int, str]]


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
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, decoder, image_key], sort_keys=True).encode())
    for line in identity:
        digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def read_entry(directory: Path, key: str, total: int, image_shape: tuple[int, ...]) -> Entry | None:
    """The entry `key` of a list of `total` images, or None where there is none or it is damaged."""
    try:
        side = json.loads((directory / f"{key}.json").read_text(encoding="utf-8"))
        pixels = np.load(directory / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        skipped = [(int(position), str(reason)) for position, reason in side["skipped"]]
        checks = side["crc32"]
        whole = (
            side["format"] == FORMAT_VERSION
            and pixels.dtype == np.uint8
            and pixels.shape == (total - len(skipped), *image_shape)
            and len(checks) == len(pixels)
        )
        if not whole:
            return None
        rows = np.unique(np.linspace(0, len(pixels) - 1, min(len(pixels), CHECKED_IMAGES)).astype(np.int64))
        if any(zlib.crc32(np.ascontiguousarray(pixels[row]).data) != checks[row] for row in rows):
            return None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return Entry(pixels, skipped)


class EntryWriter:
    """Writes one entry image by image; `commit` makes it visible. A context manager: left without commit, it
    leaves nothing.

    Raises StorageError, naming the folder and the cure, where the disk is full or may not be written. Written
    as a plain stream: a memory map would end the process with SIGBUS on a full disk.
    """

    def __init__(self, directory: Path, key: str, total: int, image_shape: tuple[int, ...]):
        self.directory, self.key, self.total, self.image_shape = directory, key, total, image_shape
        self._checks: list[int] = []
        self._temporary: list[Path] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> EntryWriter:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.directory)
            needed = self.total * int(np.prod(self.image_shape))
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise StorageError(
                    f"the image cache {self.directory} needs {_megabytes(needed)} and its disk has "
                    f"{_megabytes(free)} left; {CURE}"
                )
            self._file = open(self._new_temporary(), "wb")
            self._file.write(_npy_header((self.total, *self.image_shape)))
        except OSError as error:
            self.__exit__()
            raise self._failure(error) from error
        return self

    def add(self, image: np.ndarray) -> None:
        """Append one image, uint8 of the entry's image shape."""
        if self._file is None or image.dtype != np.uint8 or image.shape != self.image_shape:
            raise ValueError(f"expected uint8 {self.image_shape} in an open entry, got {image.dtype} {image.shape}")
        data = np.ascontiguousarray(image)
        try:
            self._file.write(data.data)
        except OSError as error:
            raise self._failure(error) from error
        self._checks.append(zlib.crc32(data.data))

    def commit(self, skipped: list[tuple[int, str]]) -> None:
        """Finish the entry and make it visible to all processes."""
        assert self._file is not None
        side = {
            "format": FORMAT_VERSION,
            "pillow": PIL.__version__,
            "skipped": skipped,
            "crc32": self._checks,
        }
        side |= {"images": len(self._checks)}
        try:
            self._file.seek(0)
            self._file.write(_npy_header((len(self._checks), *self.image_shape)))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            text = self._new_temporary()
            text.write_text(json.dumps(side), encoding="utf-8")
            os.replace(self._temporary[0], self.directory / f"{self.key}.npy")
            os.replace(text, self.directory / f"{self.key}.json")
        except OSError as error:
            raise self._failure(error) from error

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        for path in self._temporary:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _new_temporary(self) -> Path:
        path = self.directory / f".{self.key}.{uuid.uuid4().hex}.tmp"
        self._temporary.append(path)
        return path

    def _failure(self, error: OSError) -> StorageError:
        reason = (error.strerror or str(error)).lower()
        kind = ReadOnlyError if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else StorageError
        return kind(f"the image cache {self.directory} cannot be written ({reason}); {CURE}")


def cache_info(cache_dir: str | os.PathLike[str] | None = None) -> CacheInfo:
    """Count what the cache folder holds."""
    directory = cache_directory(cache_dir)
    entries = images = size = 0
    for path in _own_files(directory):
        with suppress(OSError):
            size += path.stat().st_size
        if path.suffix == ".json":
            entries += 1
            with suppress(OSError, ValueError, KeyError, TypeError):
                images += int(json.loads(path.read_text(encoding="utf-8"))["images"])
    return CacheInfo(directory, entries, images, size)


def clear_cache(cache_dir: str | os.PathLike[str] | None = None) -> CacheInfo:
    """Remove every entry (and nothing else that may lie in the folder); returns what was there.

    Raises StorageError where a file cannot be removed.
    """
    info = cache_info(cache_dir)
    try:
        for path in _own_files(info.directory):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot remove {error.filename} ({(error.strerror or str(error)).lower()}); remove "
            f"{info.directory} by hand"
        ) from error
    return info


def _own_files(directory: Path) -> list[Path]:
    try:
        return sorted(p for p in directory.iterdir() if _ENTRY.fullmatch(p.name) or _TEMPORARY.fullmatch(p.name))
    except OSError:
        return []


def _remove_stale(directory: Path) -> None:
    for path in _own_files(directory):
        with suppress(OSError):
            if path.suffix == ".tmp" and time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of a version 1.0 .npy file of uint8 in C order, always 128 bytes, so that N can be put right at
    the end.
    """
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
