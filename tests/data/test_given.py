"""What a person gives as images in Python: data sets, loaders, PIL images, dictionaries, generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from quantlens.calibration import Calibration
from quantlens.calibration.images import MOST
from quantlens.data import Preprocess, as_image_set
from quantlens.data.given import peeked
from quantlens.errors import BadImageError, QuantlensError, QuantlensWarning

PRE = Preprocess((3, 8, 8), crop_pct=1.0)
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Pictures(Dataset):
    """Six pictures of PIL with labels, as torchvision's data sets give them."""

    def __init__(self, count: int = 6, transform: Callable[[Image.Image], Any] = lambda image: image) -> None:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (count, 12, 10, 3), dtype=np.uint8)
        self.images, self.transform, self.read = [Image.fromarray(p) for p in pixels], transform, list[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        self.read.append(row)
        return self.transform(self.images[row]), row % 3


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return zip(X, Y.tolist(), strict=True)


PIXELS = np.stack([PRE.resize_crop(image) for image in Pictures().images])


def uncollated(batch: list[Any]) -> list[Any]:
    return batch


@pytest.mark.parametrize(
    "given",
    [
        lambda: TensorDataset(X, Y),
        lambda: Stream(),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(TensorDataset(X, Y), batch_size=4, collate_fn=uncollated),
        lambda: {"pixel_values": X, "labels": Y},
        lambda: [{"pixel_values": X[:2], "labels": Y[:2]}, {"pixel_values": X[2:], "labels": Y[2:].tolist()}],
        lambda: [{"pixel_values": x, "label": int(y)} for x, y in zip(X, Y, strict=True)],
        lambda: DataLoader([{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)], batch_size=3),
        lambda: ((x, y, "path") for x, y in zip(X.split(2), Y.split(2), strict=True)),
        lambda: (list(X.numpy()), Y.numpy()),
        lambda: [(x.half().float(), y) for x, y in zip(X, Y, strict=True)] and list(zip(X, Y[:, None], strict=True)),
    ],
)
def test_values_with_labels(given: Callable[[], Any]) -> None:
    images = as_image_set(given(), PRE)
    assert torch.equal(images.tensor(), X)
    assert images.labels.tolist() == Y.tolist()


@pytest.mark.parametrize("given", [list(X), tuple(X), (x for x in X), [x[None] for x in X], [(x,) for x in X.split(3)]])
def test_values_without_labels(given: Any) -> None:
    images = as_image_set(given)
    assert torch.equal(images.tensor(), X)
    assert images.labels is None


@pytest.mark.parametrize(
    "given",
    [
        lambda: Pictures(),
        lambda: Pictures().images,
        lambda: (image for image in Pictures().images),
        lambda: (Pictures().images, [0, 1, 2, 0, 1, 2]),
        lambda: DataLoader(Pictures(), batch_size=4, collate_fn=uncollated),
        lambda: [{"image": image, "label": k % 3} for k, image in enumerate(Pictures().images)],
        lambda: [Pictures().images[:4], Pictures().images[4:]],
    ],
)
def test_pictures_are_prepared_as_the_model_wants_them(given: Callable[[], Any]) -> None:
    images = as_image_set(given(), PRE, "mine")
    assert np.array_equal(images.pixels, PIXELS)
    assert torch.equal(images.tensor(), PRE.normalize(PIXELS))
    assert images.labels is None or images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(QuantlensError, match="preprocess is missing"):
        as_image_set(given())


def test_several_labels_per_image() -> None:
    hot = torch.eye(6)[:, :4]
    assert as_image_set((X, hot)).labels.tolist() == hot.tolist()
    assert as_image_set([(x, h) for x, h in zip(X, hot, strict=True)]).labels.tolist() == hot.tolist()
    assert as_image_set((X, (Y == 1).float())).labels.tolist() == [0, 1, 0, 0, 1, 0]
    with pytest.raises(QuantlensError, match="0 and 1 for each class"):
        as_image_set((X, hot + 1))


def test_bad_pictures_are_named_or_skipped() -> None:
    images = [*Pictures().images, Image.new("F", (8, 8))]
    with pytest.raises(BadImageError, match=r"^mine/6: .*floating-point"):
        as_image_set(images, PRE, "mine")
    kept = as_image_set(list(zip(images[::-1], range(7), strict=True)), PRE, "mine", skip_bad=True)
    assert kept.labels.tolist() == [1, 2, 3, 4, 5, 6]
    assert [name for name, _ in kept.skipped] == ["mine/0"]
    assert np.array_equal(kept.pixels, PIXELS[::-1])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"\[2, 8, 8, 3\]; give \[N,3,H,W\]: the channels come last"),
        (np.zeros((2, 8, 8, 3), np.uint8), "uint8; give normalised float"),
        ({"train": X, "test": X}, "train, test; give one"),
        ([{"pixels": X, "name": 1}], "with pixels, name; it needs pixel_values"),
        ([*Pictures().images, X[0]], "mixes PIL images and Tensor|different sizes"),
        (["a.png", "b.png"], "a batch is a str"),
        ([X[0], X[0, :, :4]], "different sizes"),
        (object(), "cannot read images from a object"),
    ],
)
def test_what_cannot_be_images_is_named(given: Any, words: str) -> None:
    with pytest.raises(QuantlensError, match=words):
        as_image_set(given, PRE)


def test_large_sets_are_kept_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("quantlens.data.cache.KEPT_BYTES", 2 * X[0].nbytes)
    images = as_image_set(zip(X, Y, strict=True), PRE, cache_dir=tmp_path)
    assert torch.equal(images.tensor(), X)
    assert isinstance(images.values.numpy().base, object)
    assert images.fingerprint == as_image_set((X, Y)).fingerprint
    assert images.labels.tolist() == Y.tolist()
    assert not list((tmp_path / "images").iterdir())
    with pytest.raises(QuantlensError, match="different sizes"):
        as_image_set([*X, X[0, :, :4]], PRE, cache_dir=tmp_path)


# ---- calibration -----------------------------------------------------------------------------------------------------


def calibrated(given: Any, **settings: Any) -> torch.Tensor:
    return torch.cat(list(Calibration.of(given, PRE, **settings)))


@pytest.mark.parametrize(
    "given",
    [
        lambda: X.numpy(),
        lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: [(X[:4], torch.rand(4)), (X[4:], torch.rand(2))],
        lambda: [{"pixel_values": X}],
        lambda: {"pixel_values": X, "labels": None},
        lambda: (x for x in X),
        lambda: list(X),
        lambda: X.half().double().where(torch.zeros(1).bool(), X.double()),
    ],
)
def test_calibration_takes_every_container(given: Callable[[], Any]) -> None:
    calibration = Calibration.of(given(), PRE, seed=3)
    assert torch.equal(torch.cat(list(calibration)), X)
    assert calibration.info() == Calibration.of(X, PRE).info()


def test_calibration_by_pictures_and_data_sets() -> None:
    data = Pictures(50)
    expected = np.stack([PRE.resize_crop(image) for image in data.images])
    assert torch.equal(calibrated(data.images), PRE.normalize(expected))
    drawn = np.random.RandomState(5).permutation(50)[:32]
    assert torch.equal(calibrated(data, seed=5), PRE.normalize(expected[drawn]))
    assert sorted(data.read) == sorted(drawn.tolist())
    values = TensorDataset(PRE.normalize(expected))
    assert torch.equal(calibrated(values, seed=5), PRE.normalize(expected[drawn]))
    assert len(calibrated(values)) == 50


def test_an_endless_iterable_is_read_as_far_as_needed() -> None:
    read = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal read
        while True:
            read += 1
            yield torch.zeros(100, 3, 8, 8)

    with pytest.warns(QuantlensWarning, match=f"the first {MOST} images"):
        assert len(Calibration.of(endless(), PRE)) == MOST
    assert read == 12  # 11 hold enough, one more says that it goes on


def test_a_wrong_size_is_told_before_all_is_read() -> None:
    def wrong() -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 3, 16, 16)
        raise AssertionError("read on")

    with pytest.raises(QuantlensError, match=r"\[2, 3, 16, 16\] .* \[N, 3, 8, 8\]"):
        Calibration.of(wrong(), PRE)
    with pytest.raises(QuantlensError, match=r"\[6, 3, 16, 16\] .* \[N, 3, 8, 8\]"):
        Calibration.of(as_image_set(torch.zeros(6, 3, 16, 16)), PRE)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (lambda: X, (3, 8, 8)),
        (lambda: X.numpy(), (3, 8, 8)),
        (lambda: (X, Y), (3, 8, 8)),
        (lambda: (x for x in X), (3, 8, 8)),
        (lambda: DataLoader(TensorDataset(X, Y), batch_size=2), (3, 8, 8)),
        (lambda: TensorDataset(X, Y), (3, 8, 8)),
        (lambda: [{"pixel_values": X}], (3, 8, 8)),
        (lambda: iter(Pictures().images), None),
        (lambda: Pictures(), None),
        (lambda: "embedded:digits-test", None),
        (lambda: iter([]), None),
        (lambda: None, None),
    ],
)
def test_the_size_is_seen_without_losing_an_image(given: Callable[[], Any], size: tuple[int, ...] | None) -> None:
    images, found = peeked(given())
    assert found == size
    if size is not None:
        assert torch.equal(calibrated(images), X)


@pytest.mark.parametrize("place", [lambda x: x.to("meta"), lambda x: x.to_sparse()])
def test_tensors_without_plain_values_are_named(place) -> None:
    images = place(torch.ones(2, 3, 8, 8))
    preprocess = Preprocess((3, 8, 8))
    for call in (
        lambda: Calibration.of(images, preprocess),
        lambda: as_image_set((images, [0, 1]), preprocess, "the ID set"),
    ):
        with pytest.raises(QuantlensError, match=r"are (on the meta device|sparse).*; give a plain tensor"):
            call()


def test_pictures_of_datasets_in_a_format_of_arrays() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (quantlens[hf])")
    pictures = [Image.fromarray(np.full((9, 8, 3), shade, np.uint8)) for shade in (20, 200)]
    plain = datasets.Dataset.from_dict({"image": pictures, "label": [1, 0]}).cast_column("image", datasets.Image())
    expected = list(Calibration.of(plain, Preprocess((3, 8, 8)), seed=0))
    for kind in ("torch", "numpy"):
        found = list(Calibration.of(plain.with_format(kind), Preprocess((3, 8, 8)), seed=0))
        assert torch.equal(torch.cat(found), torch.cat(expected))
