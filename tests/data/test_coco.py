"""`coco:DIR` with boxes: what a file says, and what it cannot say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantlens.boxes import Boxes
from quantlens.data import Preprocess, as_image_set, load_images, open_source
from quantlens.errors import BadImageError, QuantlensError, QuantlensWarning

SQUARE = Preprocess((3, 16, 16), resize=(16, 16))


def content() -> dict[str, Any]:
    """Two pictures, listed in the other order than their names; the ids of images and categories have gaps."""
    return {
        "images": [
            {"id": 70, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.png", "width": 20, "height": 50},
        ],
        "annotations": [
            {"id": 1, "image_id": 70, "category_id": 18, "bbox": [1, 2, 10, 20], "area": 99.5, "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 4, "bbox": [0, 0, 20.5, 50], "iscrowd": 1},
            {"id": 5, "image_id": 70, "category_id": 4, "bbox": [30, 3, 4.5, 4], "area": None},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 4, "name": "cat"}, {"id": 9, "name": "cow"}],
    }


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Writes pictures and a changed file; gives their SOURCE."""

    def write(change: Callable[[dict[str, Any]], Any] = lambda file: None) -> str:
        (tmp_path / "val").mkdir(exist_ok=True)
        for name, size in (("a.png", (20, 50)), ("b.png", (40, 30))):
            Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "val" / name)
        file = content()
        change(file)
        (tmp_path / "instances_val.json").write_text(json.dumps(file))
        return f"coco:{tmp_path}"

    return write


def test_boxes_are_of_their_images_in_pixels(written: Callable[..., str]) -> None:
    source = open_source(written())
    assert source.names == ["a.png", "b.png"]
    assert source.sizes.tolist() == [[50, 20], [30, 40]]
    boxes = source.boxes
    assert (boxes.names, boxes.ids) == (("cat", "cow", "dog"), (4, 9, 18))
    assert boxes.image.tolist() == [1, 0, 1]
    assert boxes.labels.tolist() == [2, 0, 0]
    assert boxes.boxes.tolist() == [[1, 2, 11, 22], [0, 0, 20.5, 50], [30, 3, 34.5, 7]]
    assert boxes.crowd.tolist() == [False, True, False]
    assert boxes.area.tolist() == [99.5, 1025, 18]


def test_boxes_go_with_the_images_that_are_chosen(written: Callable[..., str]) -> None:
    spec = written()
    images = load_images(f"{spec}[1:]", SQUARE, cache_dir=False)
    assert images.names == ["b.png"]
    assert images.boxes.image.tolist() == [0, 0]
    assert images.sizes.tolist() == [[30, 40]]
    turned = load_images(spec, SQUARE, cache_dir=False).select(np.array([1, 0]))
    assert turned.boxes.image.tolist() == [0, 0, 1]
    assert turned.boxes.labels.tolist() == [2, 0, 0]
    assert turned.sizes.tolist() == [[30, 40], [50, 20]]


def test_a_picture_of_another_size_than_annotated_is_bad(written: Callable[..., str], tmp_path: Path) -> None:
    spec = written()
    cache = tmp_path / "cache"
    load_images(spec, SQUARE, cache_dir=cache)
    written(lambda file: file["images"][0].update(width=80))  # the decoded images of the cache were of another file
    with pytest.raises(BadImageError, match=r"b\.png: it is 40x30 and its annotations are of a picture of 80x30"):
        load_images(spec, SQUARE, cache_dir=cache)
    kept = load_images(spec, SQUARE, cache_dir=cache, skip_bad=True)
    assert kept.names == ["a.png"]
    assert kept.boxes.image.tolist() == [0]


def test_images_without_boxes_are_a_source_too(written: Callable[..., str]) -> None:
    source = open_source(written(lambda file: file.update(annotations=[])))
    assert len(source) == 2
    assert len(source.boxes) == 0


def test_boxes_without_area_are_left_out_with_a_warning(written: Callable[..., str]) -> None:
    spec = written(lambda file: file["annotations"][0].update(bbox=[1, 2, 10, 0]))
    with pytest.warns(QuantlensWarning, match="1 boxes without area are left out"):
        source = open_source(spec)
    assert source.boxes.image.tolist() == [0, 1]


def test_two_annotations_of_one_id_count_with_a_warning(written: Callable[..., str]) -> None:
    with pytest.warns(QuantlensWarning, match="1 annotations have the id of another; all of them count"):
        source = open_source(written(lambda file: file["annotations"][1].update(id=1)))
    assert len(source.boxes) == 3


@pytest.mark.parametrize(("category", "told"), [(1, True), (2, False)])
def test_two_categories_of_one_name_are_told_where_both_have_boxes(
    written: Callable[..., str], category: int, told: bool
) -> None:
    spec = written(lambda file: file["categories"][category].update(name="dog"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_source(spec)
    assert ["named 'dog', and models take them as one class" in str(w.message) for w in caught] == [True] * told


def test_a_crowd_is_one_by_its_number(written: Callable[..., str]) -> None:
    source = open_source(
        written(lambda file: [a.update(iscrowd=c) for a, c in zip(file["annotations"], "010", strict=True)])
    )
    assert sorted(source.boxes.crowd.tolist()) == [False, False, True]


def test_boxes_are_given_in_python_with_pictures_or_tensors() -> None:
    pictures = [Image.new("RGB", size, (9, 9, 9)) for size in ((20, 50), (40, 30))]
    boxes = Boxes([1, 0], [[0, 0, 5, 5], [1, 1, 9, 9]], [0, 2])
    images = as_image_set((pictures, boxes), SQUARE)
    assert images.sizes.tolist() == [[50, 20], [30, 40]]
    assert images.boxes.area.tolist() == [25, 64]
    assert as_image_set((np.zeros((2, 3, 8, 6), np.float32), boxes)).sizes.tolist() == [[8, 6], [8, 6]]
    with pytest.raises(QuantlensError, match="has 1 images, and boxes are of image 1"):
        as_image_set((pictures[:1], boxes), SQUARE)


def _first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda file: file["annotations"][0].update(changes)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "outside": (
        _first(bbox=[35, 2, 10, 20]),
        r"1 of 3 boxes that reach out of their picture.*annotation 1 of image 70",
    ),
    "left": (_first(bbox=[-4, 2, 10, 20]), "reach out of their picture by more than a pixel"),
    "nan": (_first(bbox=[float("nan"), 2, 10, 20]), "1 of 3 boxes with NaN or infinite numbers"),
    "negative": (_first(bbox=[20, 2, -10, 20]), "negative width or height"),
    "image": (_first(image_id=8), "1 of 3 boxes of images that it does not list, the first is annotation 1 of image 8"),
    "category": (_first(category_id=1), "1 of 3 boxes of categories that it does not list"),
    "three": (lambda file: [a.update(bbox=[1, 2, 3]) for a in file["annotations"]], "needs image_id, category_id"),
    "mixed": (_first(bbox=[1, 2, 3]), "needs image_id, category_id"),
    "null": (_first(bbox=None), "needs image_id, category_id"),
    "all null": (lambda file: [a.update(bbox=None) for a in file["annotations"]], "needs image_id, category_id"),
    "nested": (lambda file: [a.update(bbox=[[1, 2], [3, 4]]) for a in file["annotations"]], "needs image_id"),
    "area": (_first(area=-4), "1 of 3 boxes with a negative area"),
    "category twice": (lambda file: file["categories"].append(file["categories"][0]), "several categories one id"),
    "no bbox": (lambda file: file["annotations"][0].pop("bbox"), "needs image_id, category_id"),
    "no categories": (lambda file: file.pop("categories"), "boxes of categories that it does not list"),
    "no size": (lambda file: file["images"][0].pop("width"), r"gives 1 of 2 images no width and height.*b\.png"),
    "one id": (lambda file: file["images"][0].update(id=3), "several images one id|images that it does not list"),
    "twice": (lambda file: file["images"].append(file["images"][0]), "1 images more than once"),
    "no images": (lambda file: file.update(images=[]), "lists no images"),
    "empty": (lambda file: file.clear(), "not a COCO instances file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_right_is_refused_in_a_sentence(case: str, written: Callable[..., str]) -> None:
    change, message = BAD[case]
    with pytest.raises(QuantlensError, match=message) as caught:
        open_source(written(change))
    assert "\n" not in str(caught.value)


@pytest.mark.real
def test_the_real_annotations(shared_data: Path) -> None:
    source = open_source(f"coco:{shared_data}/coco?split=val2017")
    assert len(source.boxes) == 440
    assert len(source.boxes.names) == 80
    assert source.boxes.ids[-1] == 90
    sides = source.boxes.boxes[:, 2:] - source.boxes.boxes[:, :2]
    assert (sides > 0).all()
    np.testing.assert_allclose(source.boxes.area, sides.prod(axis=1), rtol=1e-3, atol=1)
