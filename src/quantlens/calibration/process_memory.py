"""What glibc keeps of freed memory. With another C library, nothing here has an effect."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

HELD = 1 << 28
"""Bytes of freed memory that the process keeps inside :func:`held_memory`."""

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt (malloc.h)."""


_glibc = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


def return_memory() -> None:
    """Give freed memory back to the system: glibc keeps what large tensors leave behind."""
    if _glibc is not None:
        _glibc.malloc_trim(0)


@contextmanager
def held_memory() -> Iterator[None]:
    """Freed memory stays with the process, up to :data:`HELD` bytes, and goes back at the end.

    A training step makes and frees hundreds of tensors of some MB. glibc gives each back to the system and asks for it
    again, and touching fresh pages takes several times as long as the arithmetic on them.
    """
    if _glibc is None:
        yield
        return
    _glibc.mallopt(MMAP_THRESHOLD, 1 << 25)  # the largest there is
    _glibc.mallopt(TRIM_THRESHOLD, HELD)
    _glibc.mallopt(TOP_PAD, HELD // 4)
    try:
        yield
    finally:
        _glibc.mallopt(TRIM_THRESHOLD, 1 << 26)  # twice the largest mmap threshold, where glibc's own rule ends
        _glibc.mallopt(TOP_PAD, 0)
        _glibc.malloc_trim(0)
