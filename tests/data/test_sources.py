"""The SOURCE grammar and every kind of folder."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantlens.data import Preprocess, available_sources, load_images, open_source
from quantlens.data.folders import imagenet_class_names, imagenet_wnids
from quantlens.data.sources import open_calibration, with_sample
from quantlens.errors import BadImageError, QuantlensError, UnknownNameError


def names(spec: str) -> list[str]:
    return list(open_source(spec).names)


def test_images_are_sorted_and_unlabelled(folder: Path) -> None:
    (folder / ".hidden.jpg").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    source = open_source(f"images:{folder}")
    assert source.names == sorted(source.names)
    assert len(source) == 10
    assert source.names[0] == "deeper/im7.jpg"
    assert source.labels is None
    assert (source.kind, source.spec, source.name) == ("images", f"images:{folder}", "pictures")
    assert source.image(0).size == (47, 44)


@pytest.mark.parametrize("ends", ["0:4", "7:", ":3", "-2:", ":-3", "2:-2", ":", "-100:200", " 1 : 4 "])
def test_slices_are_python_slices(ends: str, folder: Path) -> None:
    everything = names(f"images:{folder}")
    a, b = (int(e) if e.strip() else None for e in ends.split(":"))
    assert names(f"images:{folder}[{ends}]") == everything[a:b]


def test_samples_are_seeded_prefixes_drawn_from_the_slice(folder: Path) -> None:
    everything = names(f"images:{folder}")
    five = names(f"images:{folder}?n=5&seed=3")
    assert len(set(five)) == 5
    assert set(five) <= set(everything)
    assert names(f"images:{folder}?n=5&seed=3") == five
    assert names(f"images:{folder}?n=2&seed=3") == five[:2]
    assert names(f"images:{folder}?n=5") == names(f"images:{folder}?n=5&seed=0")
    assert len({tuple(names(f"images:{folder}?n=5&seed={s}")) for s in range(5)}) > 1
    assert set(names(f"images:{folder}[2:6]?n=4&seed=1")) == set(everything[2:6])


def test_a_folder_with_brackets_or_a_question_mark_in_its_name(tmp_path: Path, folder: Path) -> None:
    odd = tmp_path / "set[a]"
    folder.rename(odd)
    assert len(open_source(f"images:{odd}")) == 10
    assert len(open_source(f"images:{odd}[1:3]")) == 2
    question = tmp_path / "why?"
    odd.rename(question)
    assert len(open_source(f"images:{question}?n=3")) == 3


@pytest.mark.parametrize("name", ["im[0:4]", "im?n=3", "im[::2]?n=1&seed=2", "plain"])
def test_a_name_that_looks_like_the_grammar_is_reached_by_a_slash(name: str, tmp_path: Path, folder: Path) -> None:
    odd = folder.rename(tmp_path / name)
    assert len(open_source(f"images:{odd}/")) == 10
    assert len(open_source(f"images:{odd}/[1:3]")) == 2
    assert len(open_source(f"images:{odd}/[1:6]?n=4")) == 4
    parquet = pytest.importorskip("pyarrow.parquet")
    file = odd / name
    parquet.write_table(pytest.importorskip("pyarrow").table({"image": [b"x"] * 5}), file)
    assert len(open_source(f"parquet:{file}/")) == 5
    assert len(open_source(f"parquet:{file}/[:2]")) == 2


def test_links_that_lead_nowhere_are_skipped_and_counted(folder: Path) -> None:
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "circle").symlink_to(folder)
    images = load_images(f"images:{folder}", Preprocess((3, 16, 16)), skip_bad=True)
    assert len(images) == 10
    assert [name for name, _ in images.skipped] == ["gone.jpg", "loop.jpg"]
    assert "symbolic links" in dict(images.skipped)["loop.jpg"]
    with pytest.raises(BadImageError, match=r"gone\.jpg: it cannot be read: no such file"):
        load_images(f"images:{folder}", Preprocess((3, 16, 16)))


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        ("?n=11", "there are 10"),
        ("[20:30]", "empty"),
        ("[3:3]", "empty"),
        ("?n=0", "at least 1"),
        ("?n=two", "whole number"),
        ("?n=-1", "whole number"),
        ("?n=2&n=3", "twice"),
        ("?seed=1", "number of images"),
        ("?", "query"),
        ("[5]", r"not a slice"),
        ("[0:10:2:1]", r"not a slice"),
        ("?n=5[:4]", r"goes before it: write 'images:[^']*\[:4\]\?n=5'"),
        ("?[2:]", r"goes before it: write 'images:[^']*\[2:\]'"),
    ],
)
def test_bad_slices_and_samples_say_what_is_wrong(tail: str, words: str, folder: Path) -> None:
    with pytest.raises(QuantlensError, match=words):
        open_source(f"images:{folder}{tail}")


def test_unknown_names_are_named_with_a_suggestion(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'imagefoldr'.*'imagefolder'"):
        open_source(f"imagefoldr:{folder}")
    with pytest.raises(UnknownNameError, match=r"'sed'.*'seed'"):
        open_source(f"images:{folder}?n=2&sed=1")
    with pytest.raises(UnknownNameError, match="split"):
        open_source(f"images:{folder}?split=train")
    with pytest.raises(UnknownNameError, match="digits-tset"):
        open_source("embedded:digits-tset")
    with pytest.raises(QuantlensError, match="no kind"):
        open_source(str(folder))
    with pytest.raises(QuantlensError, match="names no dir"):
        open_source("images:")
    assert "imagenet" in available_sources()


@pytest.mark.parametrize("kind", ["images", "imagefolder", "imagenet", "coco", "cifar10", "cifar100"])
def test_missing_empty_and_not_a_folder(kind: str, tmp_path: Path) -> None:
    with pytest.raises(QuantlensError, match="no folder"):
        open_source(f"{kind}:{tmp_path}/absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QuantlensError, match="empty"):
        open_source(f"{kind}:{tmp_path}/empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuantlensError, match="is a file"):
        open_source(f"{kind}:{tmp_path}/file")


def test_a_link_that_leads_to_itself_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "loop").symlink_to("loop")
    pre = Preprocess((3, 8, 8))
    found = load_images(f"images:{tmp_path}", pre, cache_dir=False, skip_bad=True)
    assert (found.names, [name for name, _ in found.skipped]) == (["a.png"], ["loop.png"])
    with pytest.raises(BadImageError, match=r"loop\.png"):
        load_images(f"images:{tmp_path}", pre, cache_dir=False)


@pytest.mark.parametrize("name", ["im?n=3", "im[0:4]", "im[0:1]?n=1&seed=2"])
def test_a_folder_whose_name_looks_like_a_slice_or_a_query(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for i in range(5):
        Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    assert len(open_source(f"images:{tmp_path / name}/")) == 5
    assert open_source(f"images:{tmp_path / name}/[1:4]?n=3").names[:3]
    assert len(open_source(f"images:{tmp_path}")) == 5


def test_linked_folders_are_followed_once(folder: Path) -> None:
    os.symlink(folder, folder / "deeper" / "loop")
    assert len(open_source(f"images:{folder}")) == 10


# --- imagefolder and imagenet ---


def build(root: Path, files: list[str]) -> Path:
    for k, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (k, k, k)).save(root / name)
    return root


def test_imagefolder_labels_are_ranks_of_folders(tmp_path: Path) -> None:
    root = build(tmp_path / "s", ["dog/2.png", "cat/1.png", "cat/deep/0.png", "emu/a.png"])
    source = open_source(f"imagefolder:{root}")
    assert source.class_names == ["cat", "dog", "emu"]
    assert source.names == ["cat/1.png", "cat/deep/0.png", "dog/2.png", "emu/a.png"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 2]
    assert open_source(f"imagefolder:{root}[2:]").labels.tolist() == [1, 2]
    build(root, ["loose.png"])
    with pytest.raises(QuantlensError, match=r"loose\.png lies outside"):
        open_source(f"imagefolder:{root}")


def test_imagenet_classes_come_in_the_order_of_timm() -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    assert list(imagenet_wnids()) == info.label_names()
    assert list(imagenet_class_names()) == info.label_descriptions()


def test_imagenet_subset_keeps_true_labels(tmp_path: Path) -> None:
    wnids = imagenet_wnids()
    assert (wnids[0], wnids[1], wnids[999]) == ("n01440764", "n01443537", "n15075141")
    root = build(tmp_path / "s", ["n15075141/x.png", "val/n01443537/ILSVRC2012_val_00000236.png"])
    source = open_source(f"imagenet:{root}")
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == {
        "n15075141/x.png": 999,
        "val/n01443537/ILSVRC2012_val_00000236.png": 1,
    }
    assert source.class_names[1].startswith("goldfish")
    flat = build(tmp_path / "f", ["n01443537_7.JPEG", "ILSVRC2012_val_00000293_n01440764.JPEG"])
    assert open_source(f"imagenet:{flat}").labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("goldfish/1.png", "no wnid in its name.*or its folder.*imagefolder:"),
        ("1.png", "no wnid in its name.*images:"),
        ("n00000001/1.png", "n00000001, which is not one of the 1000"),
        ("n01440764/n01443537_1.png", "named after n01443537 and lies in n01440764"),
    ],
)
def test_imagenet_mislabelled_files_are_named(file: str, words: str, tmp_path: Path) -> None:
    root = build(tmp_path / "s", ["n01440764/a.png", file])
    with pytest.raises(QuantlensError, match=words) as caught:
        open_source(f"imagenet:{root}")
    assert file in str(caught.value)


@pytest.mark.real
def test_real_imagenet_has_one_image_of_each_class(shared_data: Path) -> None:
    source = open_source(f"imagenet:{shared_data}/imagenet")
    assert source.labels.tolist() == list(range(1000))
    assert open_source(f"imagenet:{shared_data}/imagenet[500:510]").labels.tolist() == list(range(500, 510))


# --- fingerprints ---


def test_fingerprint_follows_names_and_sizes_not_the_place(folder: Path, tmp_path: Path) -> None:
    one = open_source(f"images:{folder}").fingerprint()
    folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert open_source(f"images:{moved}").fingerprint() == one
    assert open_source(f"images:{moved}[1:]").fingerprint() != one
    assert open_source(f"images:{moved}?n=10&seed=1").fingerprint() == one
    with open(moved / "im0.jpg", "ab") as file:
        file.write(b"\0")
    assert open_source(f"images:{moved}").fingerprint() != one


# --- CIFAR ---


def cifar_batch(rng: np.random.Generator, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, classes, n)


def pixel(flat: np.ndarray, y: int, x: int) -> tuple[int, ...]:
    """A record is 1024 red, 1024 green, 1024 blue values, row by row."""
    return tuple(int(flat[c * 1024 + y * 32 + x]) for c in range(3))


def test_cifar_binary_and_python_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, labels = cifar_batch(rng, 7, 10)
    binary, python = tmp_path / "b" / "cifar-10-batches-bin", tmp_path / "p"
    binary.mkdir(parents=True)
    python.mkdir()
    np.concatenate([labels[:, None].astype(np.uint8), data], 1).tofile(binary / "test_batch.bin")
    (binary / "batches.meta.txt").write_text("\n".join(f"class{k}" for k in range(10)) + "\n\n")
    for protocol in (2, 4):
        (python / "test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": labels.tolist()}, protocol))
        a, b = open_source(f"cifar10:{tmp_path}/b"), open_source(f"cifar10:{python}")
        assert a.labels.tolist() == b.labels.tolist() == labels.tolist()
        assert a.class_names == [f"class{k}" for k in range(10)]
        for k in range(7):
            image = a.image(k)
            assert image.getpixel((3, 17)) == pixel(data[k], 17, 3)
            assert np.array_equal(np.asarray(image), np.asarray(b.image(k)))
        assert a.fingerprint() == b.fingerprint()
    assert open_source(f"cifar10:{tmp_path}/b[2:4]").labels.tolist() == labels[2:4].tolist()


def test_cifar100_takes_the_fine_label_and_train_has_its_own_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    data, labels = cifar_batch(rng, 5, 100)
    records = np.concatenate([np.zeros((5, 1), np.uint8), labels[:, None].astype(np.uint8), data], 1)
    records.tofile(tmp_path / "train.bin")
    assert open_source(f"cifar100:{tmp_path}?split=train").labels.tolist() == labels.tolist()
    with pytest.raises(QuantlensError, match=r"neither test.bin nor test"):
        open_source(f"cifar100:{tmp_path}")
    with pytest.raises(UnknownNameError, match=r"'trian'.*'train'"):
        open_source(f"cifar100:{tmp_path}?split=trian")
    records.tofile(tmp_path / "test_batch.bin")
    with pytest.raises(QuantlensError, match="3073-byte records"):
        open_source(f"cifar10:{tmp_path}")


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["EVIL_FILE"],)


def test_cifar_pickle_may_not_call_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    monkeypatch.setenv("EVIL_FILE", str(victim))
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [0]}))
    with pytest.raises(QuantlensError, match=r"system.*binary version"):
        open_source(f"cifar10:{tmp_path}")
    assert not victim.exists()
    (tmp_path / "test_batch").write_bytes(b"\x80\x04garbage")
    with pytest.raises(QuantlensError, match="download it again"):
        open_source(f"cifar10:{tmp_path}")


def test_cifar_labels_of_the_other_data_set_are_noticed(tmp_path: Path) -> None:
    data, _ = cifar_batch(np.random.default_rng(0), 2, 10)
    np.concatenate([np.full((2, 1), 57, np.uint8), data], 1).tofile(tmp_path / "test_batch.bin")
    with pytest.raises(QuantlensError, match="other CIFAR"):
        open_source(f"cifar10:{tmp_path}")


# --- COCO ---


def write_coco(root: Path, split: str, listed: list[str]) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    content = {"images": [{"id": k, "file_name": n} for k, n in enumerate(listed)], "annotations": []}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def test_coco_reads_what_the_annotations_list(tmp_path: Path) -> None:
    build(tmp_path / "val2017", ["b.png", "a.png", "not-listed.png"])
    write_coco(tmp_path, "val2017", ["b.png", "a.png"])
    source = open_source(f"coco:{tmp_path}")
    assert source.names == ["a.png", "b.png"]
    assert source.labels is None
    build(tmp_path / "train2017", ["c.png"])
    write_coco(tmp_path, "train2017", ["c.png"])
    assert names(f"coco:{tmp_path}?split=train2017") == ["c.png"]
    assert names(f"coco:{tmp_path}") == ["a.png", "b.png"]
    with pytest.raises(UnknownNameError, match="'test2017'"):
        open_source(f"coco:{tmp_path}?split=test2017")


def test_coco_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    build(tmp_path / "val2017", ["a.png"])
    write_coco(tmp_path, "val2017", ["a.png", "b.png", "c.png"])
    with pytest.raises(QuantlensError, match=r"2 of the 3 images.*the first is b\.png"):
        open_source(f"coco:{tmp_path}")
    write_coco(tmp_path, "val2017", ["../../etc/passwd"])
    with pytest.raises(QuantlensError, match="outside the image folder"):
        open_source(f"coco:{tmp_path}")
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(QuantlensError, match="not a COCO instances file"):
        open_source(f"coco:{tmp_path}")


def test_opening_sources_imports_no_heavy_package(folder: Path, tmp_path: Path) -> None:
    root = build(tmp_path / "s", ["n01440764/a.png"])
    code = (
        "import sys; from quantlens.data import open_source\n"
        f"open_source('images:{folder}'); open_source('imagenet:{root}'); "
        "open_source('embedded:digits-test')\n"
        "print([m for m in ('torch', 'timm', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_select_keeps_names_and_labels_together(tmp_path: Path) -> None:
    root = build(tmp_path / "s", ["a/1.png", "a/2.png", "b/3.png"])
    picked = open_source(f"imagefolder:{root}").select([2, 0])
    assert picked.names == ["b/3.png", "a/1.png"]
    assert picked.labels.tolist() == [1, 0]
    assert picked.describe(0).endswith("b/3.png")


def test_a_step_makes_halves_that_share_no_image(tmp_path):
    for i in range(7):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    even, odd = (list(open_source(f"images:{tmp_path}{part}").names) for part in ("[::2]", "[1::2]"))
    assert even == ["0.png", "2.png", "4.png", "6.png"]
    assert odd == ["1.png", "3.png", "5.png"]
    assert list(open_source(f"images:{tmp_path}[1:6:3]").names) == ["1.png", "4.png"]
    with pytest.raises(QuantlensError, match="slice"):
        open_source(f"images:{tmp_path}[::0]")


def test_a_sample_is_added_to_what_a_source_says():
    assert with_sample("images:a[::2]", 32, 5) == "images:a[::2]?n=32&seed=5"
    assert with_sample("cifar10:a?split=train", 32, 5) == "cifar10:a?split=train&n=32&seed=5"


def test_calibration_images_are_a_sample_of_32_unless_said_otherwise(tmp_path):
    for i in range(40):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    whole = f"images:{tmp_path}"
    for text, n, seed, same in (
        (whole, None, 0, f"{whole}?n=32&seed=0"),
        (f"{whole}[:20]", None, 2, f"{whole}[:20]?n=20&seed=2"),  # there are no more
        (f"{whole}[1::2]", 8, 3, f"{whole}[1::2]?n=8&seed=3"),
        (f"{whole}?n=5&seed=1", None, 3, f"{whole}?n=5&seed=1"),
        (f"{whole}?n=5&seed=1", 5, 3, f"{whole}?n=5&seed=1"),
    ):
        found = open_calibration(text, n, seed)
        assert (found.spec, found.names) == (same, open_source(same).names)
    with pytest.raises(QuantlensError, match="leave one of them out"):
        open_calibration(f"{whole}?n=5", 6)
    with pytest.raises(QuantlensError, match="asks for 41 images and there are 40"):
        open_calibration(whole, 41)
