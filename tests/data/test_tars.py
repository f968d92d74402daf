"""Source webdataset: tar files of samples."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantlens.data import Preprocess, load_images, open_source
from quantlens.data.tars import expand_braces
from quantlens.errors import BadImageError, QuantlensError


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path, picture) -> Path:
    """Two shards of three samples with .cls labels 0…5, each picture 20 + its label wide."""
    for part in range(2):
        members: dict[str, bytes] = {}
        for k in range(3 * part, 3 * part + 3):
            members |= {f"n{k:04d}.png": png(picture(20 + k, 24, seed=k)), f"n{k:04d}.cls": f"{k}\n".encode()}
        shard(tmp_path / f"set-{part:03d}.tar", members)
    return tmp_path


@pytest.mark.parametrize("path", ["", "set-{000..001}.tar", "set-{000,001}.tar"])
def test_shards_by_folder_and_braces(path: str, shards: Path) -> None:
    source = open_source(f"webdataset:{shards / path}")
    assert source.labels.tolist() == list(range(6))
    assert [source.image(k).width for k in (5, 0, 3)] == [25, 20, 23]
    assert source.names[4] == "set-001/n0004.png"
    assert open_source(f"webdataset:{shards / path}[1:5:2]").labels.tolist() == [1, 3]
    images = load_images(source, Preprocess((3, 16, 16)))
    assert images.labels.tolist() == list(range(6))
    assert images.fingerprint == open_source(f"webdataset:{shards}").fingerprint()


def test_labels_in_json_and_names(tmp_path: Path, picture) -> None:
    members = {}
    for k, name in enumerate(["dog", "cat", "dog"]):
        about = {"label": name, "rank": k + 5}
        members |= {
            f"a/{k}.seg.jpg": b"",
            f"a/{k}.jpg": png(picture(seed=k)),
            f"a/{k}.json": json.dumps(about).encode(),
        }
    file = shard(tmp_path / "a.tar", members)
    source = open_source(f"webdataset:{file}")
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], ["cat", "dog"])
    assert open_source(f"webdataset:{file}?label=rank").labels.tolist() == [5, 6, 7]
    assert source.image(0).size == (40, 30)
    with pytest.raises(BadImageError, match=r"a\.tar, a/a/0\.seg\.jpg"):
        load_images(f"webdataset:{file}?image=seg.jpg", Preprocess((3, 16, 16)))
    with pytest.raises(QuantlensError, match="no sample has a label"):
        open_source(f"webdataset:{file}?label=rnak")


def test_nothing_in_a_tar_file_is_unpacked_or_run(tmp_path: Path, picture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    members = {}
    for key in ("../../out", "/abs/x", "ünï/ code", "a.b/c", "d"):
        members |= {f"{key}.png": png(picture()), f"{key}.pkl": pickle.dumps(Bomb()), f"{key}.cls": b"1"}
    file = tmp_path / "in" / "odd.tar"
    file.parent.mkdir()
    shard(file, members)
    with tarfile.open(file, "a") as archive:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    source = open_source(f"webdataset:{file}")
    assert len(load_images(source, Preprocess((3, 16, 16)), cache_dir=False)) == 5
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "odd.tar"]
    for text in (f"pipe:touch {tmp_path}/ran", "https://example.org/a.tar"):
        with pytest.raises(QuantlensError, match="missing"):
            open_source(f"webdataset:{text}")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_web_dataset_is_refused(tmp_path: Path, picture) -> None:
    def refused(spec: object, words: str) -> None:
        with pytest.raises(QuantlensError, match=words):
            open_source(f"webdataset:{spec}")

    one = {"a.png": png(picture()), "a.cls": b"0"}
    whole = shard(tmp_path / "whole.tar", {**one, "b.png": png(picture(90, 90))})
    refused(whole, "1 of the 2 samples have no label, the first is whole/b.png")
    refused(shard(tmp_path / "packed.tar", one, "w:gz"), "gunzip")
    (tmp_path / "short.tar").write_bytes(whole.read_bytes()[:5000])
    refused(tmp_path / "short.tar", "copy it again")
    refused(shard(tmp_path / "texts.tar", {"a.txt": b"x"}), "no picture")
    refused(tmp_path / "no-{0..3}.tar", "4 of 4 tar files are missing")
    refused(shard(tmp_path / "bad.tar", {"a.png": b"x", "a.json": b"{"}), "not JSON")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no .tar file")


def test_braces() -> None:
    assert expand_braces("a{08..11}b{x,y}") == [f"a{n}b{c}" for n in ("08", "09", "10", "11") for c in "xy"]
    assert expand_braces("a{9..11}") == ["a9", "a10", "a11"]
    assert expand_braces("plain{0}") == ["plain{0}"]


def test_the_pictures_are_those_of_the_library(shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    theirs = list(
        webdataset.WebDataset(str(shards / "set-000.tar"), shardshuffle=False).decode("pil").to_tuple("png", "cls")
    )
    source = open_source(f"webdataset:{shards / 'set-000.tar'}")
    assert [label for _, label in theirs] == source.labels.tolist()
    for k, (image, _) in enumerate(theirs):
        assert np.array_equal(np.asarray(source.image(k)), np.asarray(image))
