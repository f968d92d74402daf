"""Where activations wait while calibration images go through a network: in memory within a budget, in one temporary
file beyond it. And what glibc keeps of freed memory (with another C library, none of that has an effect)."""

import ctypes
import math
import platform
import tempfile
from bisect import insort
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantlens.errors import StorageError

MEMORY = 1 << 30
"""Bytes of activations that a store keeps in memory; what exceeds it goes to a temporary file."""


class ActivationStore(ExitStack):
    """Tensors that wait, at most ``budget`` bytes of them in memory (default: :data:`MEMORY`).

    The others share one temporary file without a name, in the folder that TMPDIR says: it is gone with the process,
    however that ends. A context manager, which gives the file back. :meth:`put` stores a tensor as it is;
    :meth:`empty` makes one to be filled row by row. Both raise StorageError where the disk is full.
    """

    def __init__(self, budget: int | None = None):
        super().__init__()
        self.left = MEMORY if budget is None else budget
        self.spilled = 0
        """bytes of the temporary file"""
        self._gaps: list[tuple[int, int]] = []  # (start, bytes) in it, by start, no two of them neighbours

    def put(self, value: Tensor) -> "StoredTensor":
        """Store ``value``; the store keeps a tensor that fits into memory itself, so it is not to be changed."""
        return StoredTensor(self, value.shape, value.dtype, value.device, value.detach())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "StoredTensor":
        """A tensor of that shape whose values are written later."""
        return StoredTensor(self, torch.Size(shape), dtype, device, None)

    # -- the file, given out in pieces; freed pieces are used again
    @cached_property
    def _file(self) -> Any:
        return self.enter_context(tempfile.TemporaryFile(prefix="quantlens-", buffering=0))

    def reserve(self, size: int) -> int:
        """The start of ``size`` bytes of the file that are nobody's."""
        for place, (start, free) in enumerate(self._gaps):
            if free >= size:
                self._gaps[place : place + 1] = [(start + size, free - size)] if free > size else []
                return start
        start, self.spilled = self.spilled, self.spilled + size
        return start

    def release(self, start: int, size: int) -> None:
        """Take back what :meth:`reserve` gave."""
        insort(self._gaps, (start, size))
        merged: list[tuple[int, int]] = []
        for begin, free in self._gaps:
            if merged and sum(merged[-1]) == begin:
                begin, free = merged[-1][0], merged.pop()[1] + free
            merged.append((begin, free))
        self._gaps = merged

    def write(self, start: int, value: Tensor) -> None:
        """Put a tensor into the file."""
        try:
            self._file.seek(start)
            rest = _bytes_of(value.cpu().contiguous())
            while len(rest):  # a write may take a part of what it is given
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise StorageError(
                f"no room for temporary activations in {tempfile.gettempdir()}: {error.strerror}; use fewer "
                "calibration images or set TMPDIR"
            ) from error

    def read(self, start: int, into: Tensor) -> None:
        """Fill a contiguous tensor on the CPU from the file."""
        self._file.seek(start)
        rest = _bytes_of(into)
        while len(rest):
            taken = self._file.readinto(rest)
            if not taken:
                raise StorageError("temporary activations are shorter than what was written")
            rest = rest[taken:]


def _bytes_of(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(value.detach().reshape(-1).view(torch.uint8).numpy())


class StoredTensor:
    """A tensor in an :class:`ActivationStore`. Reading gives it back bit for bit, on the device it was on."""

    def __init__(
        self, store: ActivationStore, shape: torch.Size, dtype: torch.dtype, device: torch.device, value: Tensor | None
    ):
        self.shape, self.dtype, self.device = shape, dtype, device
        self._store, self._bytes = store, math.prod(shape) * dtype.itemsize
        self._row = self._bytes // max(shape[0], 1) if shape else self._bytes
        self._value: Tensor | None = None
        self._start = 0
        if self._bytes <= store.left:
            store.left -= self._bytes
            self._value = torch.empty(shape, dtype=dtype, device=device) if value is None else value
        else:
            self._start = store.reserve(self._bytes)
            if value is not None:
                self.write(0, value)

    def read(self) -> Tensor:
        """The whole tensor."""
        return self._read(0, self.shape) if self._value is None else self._value

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` … ``last`` − 1 (indices of the first dimension)."""
        if self._value is not None:
            return self._value[first:last]
        return self._read(first * self._row, torch.Size((last - first, *self.shape[1:])))

    def pick(self, rows: Tensor) -> Tensor:
        """Rows by their numbers, int64 [m]."""
        if self._value is not None:
            return self._value.index_select(0, rows.to(self._value.device))
        return torch.cat([self.rows(0, 0), *(self.rows(row, row + 1) for row in rows.tolist())])

    def write(self, first: int, value: Tensor) -> None:
        """Put ``value`` [m, …] into rows ``first`` … ``first + m − 1``."""
        if self._value is not None:
            self._value[first : first + len(value)] = value
        else:
            self._store.write(self._start + first * self._row, value.to(self.dtype))

    def free(self) -> None:
        """Give the room back; the tensor is not to be read any more."""
        if self._value is not None:
            self._store.left += self._bytes
            self._value = None
        elif self._bytes:
            self._store.release(self._start, self._bytes)
        self._bytes = 0

    def _read(self, offset: int, shape: torch.Size) -> Tensor:
        found = torch.empty(shape, dtype=self.dtype)
        self._store.read(self._start + offset, found)
        return found.to(self.device)


# -- memory of the process ---------------------------------------------------------------------------------------------
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
