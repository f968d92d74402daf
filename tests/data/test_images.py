"""ImageSet, load_images, as_image_set."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantlens.data import Preprocess, as_image_set, load_images, open_source
from quantlens.data.images import ImageSet, _ahead
from quantlens.errors import BadImageError, QuantlensError, QuantlensWarning, UnknownNameError

PRE = Preprocess((3, 24, 24), crop_pct=0.9)


def test_batches_cover_the_set_in_order(folder: Path) -> None:
    images = load_images(f"images:{folder}", PRE, cache_dir=False)
    batches = list(images.batches(4))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert all(y is None for _, y in batches)
    whole = torch.cat([x for x, _ in batches])
    assert whole.dtype == torch.float32
    assert torch.equal(whole, images.tensor())
    assert torch.equal(images.tensor(3, 6), whole[3:6])
    source = open_source(f"images:{folder}")
    assert torch.equal(whole[7], PRE(source.image(7)))


def test_labels_travel_with_the_batches() -> None:
    images = load_images("embedded:digits-test[10:20]", Preprocess((3, 32, 32), crop_pct=1.0))
    source = open_source("embedded:digits-test")
    got = torch.cat([y for _, y in images.batches(3)])
    assert got.dtype == torch.int64
    assert got.tolist() == source.labels[10:20].tolist() == images.labels.tolist()
    assert images.class_names == source.class_names
    assert images.group == "id"


def test_batches_of_a_cached_set_hold_one_batch_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 images of 3x96x96 are 11 MB as bytes and 44 MB as floats; a batch of 8 is 0.9 MB."""
    root = tmp_path / "many"
    root.mkdir()
    from PIL import Image

    for k in range(400):
        Image.new("RGB", (8, 8), (k % 256, 0, 0)).save(root / f"{k:03d}.bmp")
    images = load_images(f"images:{root}", Preprocess((3, 96, 96)), cache_dir=tmp_path / "c")
    tracemalloc.start()
    total = sum(float(x.sum()) for x, _ in images.batches(8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(total)
    assert peak < 2_000_000


def test_decoding_holds_a_few_images_in_memory(tmp_path: Path) -> None:
    from PIL import Image

    root = tmp_path / "many"
    root.mkdir()
    for k in range(300):
        Image.new("RGB", (8, 8), (k % 256, 0, 0)).save(root / f"{k:03d}.bmp")
    tracemalloc.start()
    load_images(f"images:{root}", Preprocess((3, 96, 96)), cache_dir=tmp_path / "c", workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 3 * 96 * 96 / 3


def test_progress(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_images(
        f"images:{folder}[:4]", PRE, cache_dir=tmp_path, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bad_image_is_named_or_skipped(folder: Path) -> None:
    (folder / "im2.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    with pytest.raises(BadImageError, match=r"im2\.jpg: .*; repair or remove it, or use --skip-bad"):
        load_images(f"images:{folder}", PRE, cache_dir=False)
    images = load_images(f"images:{folder}", PRE, cache_dir=False, skip_bad=True)
    assert len(images) == len(images.pixels) == 9
    assert [name for name, _ in images.skipped] == ["im2.jpg"]
    assert "im2.jpg" not in images.names
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(QuantlensError, match="none of the 10 images"):
        load_images(f"images:{folder}", PRE, cache_dir=False, skip_bad=True)


def test_labels_stay_with_their_images_when_one_is_skipped(tmp_path: Path, picture) -> None:
    for name in ("a/1", "b/2", "c/3"):
        (tmp_path / name).parent.mkdir()
        picture().save(tmp_path / f"{name}.png")
    (tmp_path / "b" / "2.png").write_bytes(b"")
    images = load_images(f"imagefolder:{tmp_path}", PRE, cache_dir=False, skip_bad=True)
    assert images.names == ["a/1.png", "c/3.png"]
    assert images.labels.tolist() == [0, 2]
    assert images.class_names == ["a", "b", "c"]


def test_many_workers_give_what_one_gives(folder: Path) -> None:
    one = load_images(f"images:{folder}", PRE, cache_dir=False, workers=1)
    many = load_images(f"images:{folder}", PRE, cache_dir=False, workers=8)
    assert np.array_equal(one.pixels, many.pixels)


def test_check_labels() -> None:
    images = load_images("embedded:digits-test", Preprocess((3, 32, 32), crop_pct=1.0))
    assert images.check_labels(8) is images.labels
    with pytest.raises(QuantlensError, match="the set has 8 classes, the model 7"):
        images.check_labels(7)
    with pytest.raises(QuantlensError, match="label 7 and the model has 7 classes"):
        replace(images, class_names=None).check_labels(7)
    with pytest.raises(QuantlensError, match="no labels"):
        load_images("embedded:letters", Preprocess((3, 32, 32), crop_pct=1.0)).check_labels(8)


def test_batches_for_a_gpu_are_read_one_ahead() -> None:
    read: list[int] = []

    def batch(start: int) -> torch.Tensor:
        read.append(start)
        return torch.full((1,), start)

    found = _ahead(batch, range(0, 10, 2))
    for place in range(5):
        assert int(next(found)) == 2 * place
        assert len(read) <= place + 2
    assert list(found) == []
    assert read == [0, 2, 4, 6, 8]
    assert list(_ahead(batch, range(0))) == []


# --- as_image_set ---

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    "given",
    [
        X,
        X.numpy(),
        [X[:4], X[4:]],
        (x for x in X.split(2)),
        torch.utils.data.DataLoader(X, batch_size=4),
        X.double(),
    ],
    ids=["tensor", "array", "list", "generator", "loader", "double"],
)
def test_tensors_are_used_as_they_are(given) -> None:
    images = as_image_set(given, name="mine")
    assert torch.equal(images.tensor(), X)
    assert torch.equal(torch.cat([x for x, _ in images.batches(4)]), X)
    assert images.labels is None
    assert images.source == "mine"
    assert images.fingerprint == as_image_set(X).fingerprint
    assert torch.equal(torch.cat([x for x, _ in images.batches(4)]), X)


@pytest.mark.parametrize(
    "given",
    [
        (X, Y),
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4),
        (X, Y.tolist()),
    ],
    ids=["pair", "pairs", "loader", "list"],
)
def test_labels_are_kept(given) -> None:
    images = as_image_set(given)
    assert torch.equal(images.tensor(), X)
    assert images.labels.tolist() == Y.tolist()


def test_a_pair_of_image_batches_is_two_batches() -> None:
    assert torch.equal(as_image_set((X[:3], X[3:])).tensor(), X)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((X * 255).to(torch.uint8), "uint8; give normalised float"),
        (X[0], r"shape \[3, 8, 8\]; give \[N,3,H,W\]"),
        (X[:, :1], r"shape \[6, 1, 8, 8\]"),
        ([], "no batch"),
        (X[:0], "no image"),
        ((X, Y[:3]), "one whole number for each of the 6"),
        ((X, Y.float()), "one whole number"),
        ([X, X[:, :, :4]], "different sizes"),
        ([(X, Y), X], "some have none"),
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
        (7, "from a int"),
        ([{"pixels": X}], "batch is a dict"),
    ],
)
def test_what_cannot_be_images_is_refused(given, words: str) -> None:
    with pytest.raises(QuantlensError, match=words):
        as_image_set(given)


def test_sources_are_loaded_with_the_models_preprocess(folder: Path) -> None:
    spec = f"images:{folder}"
    expected = load_images(spec, PRE, cache_dir=False)
    for given in (spec, open_source(spec)):
        assert torch.equal(as_image_set(given, PRE, cache_dir=False).tensor(), expected.tensor())
    with pytest.raises(QuantlensError, match="preprocess is missing"):
        as_image_set(spec)
    with pytest.raises(UnknownNameError, match="source kind"):
        as_image_set("imagen:x", PRE)


def test_an_image_set_takes_another_models_normalisation_but_not_its_size(folder: Path) -> None:
    images = load_images(f"images:{folder}", PRE, cache_dir=False)
    assert as_image_set(images) is images
    assert as_image_set(images, PRE) is images
    half = Preprocess((3, 24, 24), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
    again = as_image_set(images, half)
    assert torch.equal(again.tensor(), load_images(f"images:{folder}", half, cache_dir=False).tensor())
    with pytest.raises(QuantlensError, match="was prepared as"):
        as_image_set(images, Preprocess((3, 32, 32)))


def named(labels, names) -> ImageSet:
    return ImageSet(
        ["a", "b", "c"], np.array(labels), "set", "0", values=torch.zeros(3, 3, 2, 2), class_names=list(names)
    )


def test_labels_follow_the_names_of_the_models_classes() -> None:
    model = ["Dog", "cat", "red_panda"]
    assert named([0, 1, 0], ["cat", "dog"]).in_classes_of(model).labels.tolist() == [1, 0, 1]
    found = named([0, 1, 2], ["cat", "dog", "Red Panda"]).in_classes_of(model)
    assert (found.labels.tolist(), found.class_names) == ([1, 0, 2], model)
    assert found.check_labels(3).tolist() == [1, 0, 2]
    several = named([[1, 0], [0, 1], [1, 1]], ["cat", "dog"]).in_classes_of(model)
    assert several.labels.tolist() == [[0, 1, 0], [1, 0, 0], [1, 1, 0]]


def test_labels_stay_where_names_say_nothing() -> None:
    for own, names in ((["x", "y"], None), (["x", "x"], ["x", "y"]), (["x", "y"], ["y", "y"]), (["x"], ["a", "b"])):
        images = named([0, 0, 0], own)
        assert images.in_classes_of(names) is images
    other = named([0, 1, 0], ["x", "y"])
    with pytest.warns(QuantlensWarning, match="names its classes otherwise than the model .'x', not 'a'") as told:
        again = other.in_classes_of(["a", "b"]).in_classes_of(["a", "b"])
    assert again is other
    assert len(told) == 1


def test_labels_that_are_names() -> None:
    images = as_image_set((torch.zeros(3, 3, 2, 2), ["cat", "dog", "cat"]))
    assert (images.labels.tolist(), images.class_names) == ([0, 1, 0], ["cat", "dog"])
    batches = [{"pixel_values": torch.zeros(1, 3, 2, 2), "label": [name]} for name in ("dog", "ant")]
    assert as_image_set(batches).in_classes_of(["dog", "ant", "cat"]).labels.tolist() == [0, 1]


def test_a_source_without_images(tmp_path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    columns = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    parquet.write_table(pa.table(columns), tmp_path / "none.parquet")
    with pytest.raises(QuantlensError, match=r"none\.parquet' holds no images"):
        load_images(f"parquet:{tmp_path / 'none.parquet'}", PRE, cache_dir=False)
