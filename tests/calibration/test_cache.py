"""Waiting activations come back bit for bit, from memory or from a file, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile

import pytest
import torch
from hypothesis import given, settings, strategies as st

from quantlens.calibration import ActivationStore
from quantlens.errors import StorageError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def _values(dtype, *shape):
    return (torch.arange(torch.Size(shape).numel()) % 2 if dtype == torch.bool else torch.randn(shape) * 50).to(dtype)


@pytest.mark.parametrize("budget", [1 << 20, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 2), (7,), (), (0, 4)])
def test_what_is_put_comes_back(budget, dtype, shape):
    value = _values(dtype, *shape).reshape(shape)
    with ActivationStore(budget) as store:
        stored = store.put(value)
        assert (store.spilled > 0) == (budget == 0 and value.numel() > 0)
        found = stored.read()
        assert found.dtype == dtype
        assert torch.equal(found, value)


@pytest.mark.parametrize("budget", [1 << 20, 0])
def test_rows_are_written_and_read_in_any_order(budget):
    value = torch.randn(10, 3, 4)
    with ActivationStore(budget) as store:
        stored = store.empty((10, 3, 4), torch.float32, torch.device("cpu"))
        for first, last in ((4, 10), (0, 4)):
            stored.write(first, value[first:last].transpose(1, 2).contiguous().transpose(1, 2))  # not contiguous
        assert torch.equal(stored.rows(2, 7), value[2:7])
        picked = torch.tensor([9, 0, 0, 5])
        assert torch.equal(stored.pick(picked), value[picked])
        assert stored.pick(picked[:0]).shape == (0, 3, 4)


def test_the_budget_holds_and_comes_back():
    with ActivationStore(100) as store:
        first, second = (store.put(torch.zeros(20)) for _ in range(2))
        assert (store.spilled, store.left) == (80, 20)
        assert torch.equal(first.read(), second.read())
        first.free()
        first.free()
        assert store.left == 100
        assert store.put(torch.zeros(25)).shape == (25,)
        assert (store.spilled, store.left) == (80, 0)


def test_room_in_the_file_is_used_again():
    """As many values as a pass moves along a graph need no more room than those that wait at one time."""
    with ActivationStore(0) as store:
        waiting = [store.put(torch.full((64,), float(i))) for i in range(3)]
        for i in range(3, 50):
            waiting.pop(0).free()
            waiting.append(store.put(torch.full((64 - i % 5,), float(i))))
        assert store.spilled <= 4 * 64 * 4
        assert [float(w.read()[0]) for w in waiting] == [47.0, 48.0, 49.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40))
def test_pieces_of_the_file_never_overlap(steps):
    file, held = ActivationStore(0), []
    for take, size in steps:
        if take or not held:
            start = file.reserve(size)
            assert all(start + size <= other or other + length <= start for other, length in held)
            held.append((start, size))
        else:
            file.release(*held.pop(size % len(held)))
    for piece in held:
        file.release(*piece)
    assert file._gaps == ([(0, file.spilled)] if file.spilled else [])
    file.close()


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ActivationStore(0) as store:
        store.put(torch.zeros(1000))
        assert list(tmp_path.iterdir()) == []  # the file has no name
    with contextlib.suppress(RuntimeError), ActivationStore(0) as store:
        store.put(torch.zeros(1000))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ActivationStore(0) as store:
        store._file = Full(store._file)
        with pytest.raises(StorageError, match=f"^no room for temporary activations in {tmp_path}: No space left on"):
            store.put(torch.zeros(10))
        with pytest.raises(StorageError, match=r"set TMPDIR$"):
            store.empty((10,), torch.float32, torch.device("cpu")).write(0, torch.zeros(10))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_device_is_told_by_the_system():
    with ActivationStore(0) as store, open("/dev/full", "r+b", buffering=0) as full:
        store._file = full
        with pytest.raises(StorageError, match="No space left on device"):
            store.put(torch.zeros(10))


def test_a_folder_that_cannot_be_written_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with ActivationStore(0) as store, pytest.raises(StorageError, match="/nowhere/at/all: No such file"):
        store.put(torch.zeros(10))


def test_a_write_may_take_a_part(monkeypatch):
    """The system takes at most 2 GiB at once, and less where the disk is nearly full."""

    class Slow:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            return self._file.write(data[:7])

        def readinto(self, data):
            return self._file.readinto(data[:5])

    value = torch.randn(9, 3)
    with ActivationStore(0) as store:
        store._file = Slow(store._file)
        assert torch.equal(store.put(value).read(), value)
