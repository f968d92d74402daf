"""The on-disk cache: decoded once, whole or absent, never silently in memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantlens.data import Preprocess, cache as cache_module, cache_directory, load_images, open_source
from quantlens.data.sources import FileSource
from quantlens.errors import BadImageError, QuantlensWarning, StorageError

PRE = Preprocess((3, 24, 24), crop_pct=0.9)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch):
    """Call it, and every later attempt to read an image fails the test."""

    def forbid() -> None:
        def image(self: FileSource, index: int):
            raise AssertionError(f"{self.names[index]} was read")

        monkeypatch.setattr(FileSource, "image", image)

    return forbid


def entry(directory: Path, suffix: str) -> Path:
    (found,) = (directory / "images").glob(f"*.{suffix}")
    return found


def entries(cache_dir: Path | None = None) -> int:
    return len(list(cache_directory(cache_dir).glob("*.json")))


def test_second_use_reads_no_image(folder: Path, tmp_path: Path, no_decoding) -> None:
    fresh = load_images(f"images:{folder}", PRE, cache_dir=False)
    first = load_images(f"images:{folder}", PRE, cache_dir=tmp_path / "c")
    no_decoding()
    second = load_images(f"images:{folder}", PRE, cache_dir=tmp_path / "c")
    assert isinstance(second.pixels, np.memmap)
    assert np.array_equal(first.pixels, fresh.pixels)
    assert np.array_equal(second.pixels, fresh.pixels)
    assert second.names == fresh.names
    assert second.fingerprint == fresh.fingerprint


def test_other_normalisation_shares_the_entry_other_size_does_not(folder: Path, tmp_path: Path, no_decoding) -> None:
    load_images(f"images:{folder}", PRE, cache_dir=tmp_path)
    load_images(f"images:{folder}", Preprocess((3, 20, 20)), cache_dir=tmp_path)
    assert entries(tmp_path) == 2
    no_decoding()
    load_images(f"images:{folder}", Preprocess((3, 24, 24), mean=(0.5,) * 3, crop_pct=0.9), cache_dir=tmp_path)
    assert entries(tmp_path) == 2


def test_only_what_a_slice_needs_is_decoded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = FileSource.image
    monkeypatch.setattr(FileSource, "image", lambda self, k: (read.append(self.names[k]), original(self, k))[1])
    images = load_images(f"images:{folder}[2:5]", PRE, cache_dir=tmp_path)
    assert sorted(read) == images.names == open_source(f"images:{folder}").names[2:5]


def test_a_changed_file_is_decoded_again(folder: Path, tmp_path: Path, picture) -> None:
    before = load_images(f"images:{folder}", PRE, cache_dir=tmp_path).pixels.copy()
    file = folder / "im3.jpg"
    stat = file.stat()
    picture(43, 36, seed=99).save(file, quality=90)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = load_images(f"images:{folder}", PRE, cache_dir=tmp_path)
    row = after.names.index("im3.jpg")
    changed = [k for k in range(10) if not np.array_equal(before[k], after.pixels[k])]
    assert changed == [row]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no-sidecar", "bad-json", "pickle", "version"])
def test_a_damaged_entry_is_built_again(damage: str, folder: Path, tmp_path: Path) -> None:
    expected = load_images(f"images:{folder}", PRE, cache_dir=tmp_path).pixels.copy()
    data, side = entry(tmp_path, "npy"), entry(tmp_path, "json")
    content = bytearray(data.read_bytes())
    if damage == "flip":
        content[128 + 7 * 1728 + 5] ^= 1
        data.write_bytes(content)
    elif damage == "cut":
        data.write_bytes(content[:-1])
    elif damage == "empty":
        data.write_bytes(b"")
    elif damage == "no-sidecar":
        side.unlink()
    elif damage == "bad-json":
        side.write_text("[1, 2")
    elif damage == "pickle":
        np.save(data, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        side.write_text(json.dumps({**json.loads(side.read_text()), "format": -1}))
    again = load_images(f"images:{folder}", PRE, cache_dir=tmp_path)
    assert np.array_equal(again.pixels, expected)
    assert np.array_equal(load_images(f"images:{folder}", PRE, cache_dir=tmp_path).pixels, expected)
    assert entries(tmp_path) == 1


def test_full_disk_is_an_error_with_the_cure(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(StorageError, match=r"QUANTLENS_CACHE.*--no-cache"):
            load_images(f"images:{folder}", PRE, cache_dir=tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("quantlens.files.os.fsync", full)
        with pytest.raises(StorageError, match=r"no space left.*QUANTLENS_CACHE.*--no-cache"):
            load_images(f"images:{folder}", PRE, cache_dir=tmp_path)
    assert list((tmp_path / "images").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        load_images(f"images:{folder}", PRE, cache_dir=tmp_path / "file")


def test_a_default_folder_that_may_not_be_written_is_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *given: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.delenv("QUANTLENS_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *given, **options: str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.warns(QuantlensWarning, match="kept in memory; set QUANTLENS_CACHE"):
        found = load_images(f"images:{folder}", PRE)
    assert np.array_equal(found.pixels, load_images(f"images:{folder}", PRE, cache_dir=False).pixels)
    with pytest.raises(StorageError, match="cannot be written"):
        load_images(f"images:{folder}", PRE, cache_dir=tmp_path / "own")
    monkeypatch.setenv("QUANTLENS_CACHE", str(tmp_path / "own"))
    with pytest.raises(StorageError, match="cannot be written"):
        load_images(f"images:{folder}", PRE)


def test_environment_variable_and_no_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLENS_CACHE", str(tmp_path / "env"))
    load_images(f"images:{folder}", PRE, cache_dir=False)
    assert not (tmp_path / "env").exists()
    load_images(f"images:{folder}", PRE)
    assert cache_directory() == tmp_path / "env" / "images"
    assert entries() == 1


def test_skipped_images_are_remembered_by_the_cache(folder: Path, tmp_path: Path, no_decoding) -> None:
    (folder / "im4.jpg").write_bytes(b"")
    (folder / "im0.jpg").write_bytes(b"junk")
    with pytest.raises(BadImageError, match=r"im0\.jpg.*--skip-bad"):
        load_images(f"images:{folder}", PRE, cache_dir=tmp_path)
    assert entries(tmp_path) == 0
    first = load_images(f"images:{folder}", PRE, cache_dir=tmp_path, skip_bad=True)
    no_decoding()
    second = load_images(f"images:{folder}", PRE, cache_dir=tmp_path, skip_bad=True)
    assert len(first) == len(second) == len(second.pixels) == 8
    assert [name for name, _ in second.skipped] == ["im0.jpg", "im4.jpg"]
    assert second.skipped == first.skipped
    assert np.array_equal(first.pixels, second.pixels)
    with pytest.raises(BadImageError, match=r"im0\.jpg"):
        load_images(f"images:{folder}", PRE, cache_dir=tmp_path)


def test_an_abandoned_load_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(f"images:{folder}", PRE, cache_dir=tmp_path, progress=interrupt)
    assert list((tmp_path / "images").iterdir()) == []


def test_stale_temporary_files_are_swept(folder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    old, young = directory / f".{'a' * 32}.npy.abc", directory / f".{'a' * 32}.npy.def"
    for path in (old, young):
        path.mkdir()
        (path / "x.npy").write_bytes(b"x")
    os.utime(old, (1, 1))
    load_images(f"images:{folder}", PRE, cache_dir=tmp_path)
    assert not old.exists()
    assert young.exists()


def test_two_processes_at_once(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, zlib; from quantlens.data import Preprocess, load_images\n"
        f"s = load_images('images:{folder}', Preprocess((3, 24, 24), crop_pct=0.9), "
        f"cache_dir={str(tmp_path)!r})\n"
        "print(len(s), zlib.crc32(s.pixels.tobytes()))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate()[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(outputs) == 1
    assert entries(tmp_path) == 1
    assert not list((tmp_path / "images").glob(".*"))


def test_the_file_is_an_ordinary_npy(folder: Path, tmp_path: Path) -> None:
    images = load_images(f"images:{folder}", PRE, cache_dir=tmp_path)
    with open(entry(tmp_path, "npy"), "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((10, 3, 24, 24), False, np.dtype("uint8"))
    assert np.array_equal(np.load(entry(tmp_path, "npy")), images.pixels)
