"""`coco:DIR`: the images that a COCO instances file lists, with their boxes."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quantlens.boxes import Boxes
from quantlens.data.folders import existing_directory
from quantlens.data.sources import FileSource, SourceSpec
from quantlens.errors import BadImageError, QuantlensError, QuantlensWarning, UnknownNameError

TOLERANCE = 1.0
"""Pixels by which a box may reach out of its picture: annotations are rounded."""


@dataclass(repr=False, eq=False)
class CocoSource(FileSource):
    """Image files with `boxes`, and the `sizes` of the pictures that those are of (None where the file has neither)."""

    def image(self, index: int) -> Image.Image:
        """Raises BadImageError too where the picture has not the size that the annotations are of."""
        image = super().image(index)
        if self.sizes is not None and image.size != tuple(self.sizes[index, ::-1]):
            height, width = self.sizes[index]
            raise BadImageError(
                f"it is {image.width}x{image.height} and its annotations are of a picture of {width}x{height}"
            )
        return image

    def identity(self) -> list[str]:
        sizes = [""] * len(self) if self.sizes is None else [f"\0{h}x{w}" for h, w in self.sizes.tolist()]
        return [line + size for line, size in zip(super().identity(), sizes, strict=True)]


def open_coco(spec: SourceSpec) -> CocoSource:
    """`coco:DIR`: the images an `instances_SPLIT.json` lists, and their boxes; `?split=val2017` where DIR has several.
    There are no labels: an image of COCO has many objects.

    Raises QuantlensError, in one sentence with the cure, for a file or boxes that cannot be right. Boxes without area
    are dropped with a warning, annotations of one id and categories of one name kept with one; crowds are kept.
    """
    root = existing_directory(spec)
    split, file = _annotations(spec, root)
    where = f"source {spec.text!r}: {file}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        listed = {str(image["file_name"]).replace("\\", "/"): image for image in content["images"]}
        several = len(content["images"]) - len(listed)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise QuantlensError(f"{where} is not a COCO instances file; download it again") from error
    if not listed:
        raise QuantlensError(f"{where} lists no images; choose another split")
    names = sorted(listed)
    outside = next((n for n in names if n.startswith("/") or ".." in n.split("/")), None)
    if outside is not None:
        raise QuantlensError(f"{where} lists {outside!r}, outside the image folder; repair the file")
    if several:
        raise QuantlensError(f"{where} lists {several} images more than once; repair the file")
    folders = [root / split, root / "images" / split, root / "images", root]
    folder = next((f for f in folders if (f / names[0]).is_file() or (f / names[-1]).is_file()), folders[0])
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise QuantlensError(
            f"source {spec.text!r}: {len(missing)} of the {len(names)} images of {file.name} are missing from "
            f"{folder}, the first is {missing[0]}; unpack them there, or use images:{spec.path}"
        )
    images = [listed[name] for name in names]
    sizes = _sizes(where, images, bool(content.get("annotations")))
    found = CocoSource(spec.text, spec.kind, f"{root.resolve().name}/{split}", names, root=folder)
    found.sizes, found.boxes = sizes, _boxes(where, content, images, sizes)
    return found


def _annotations(spec: SourceSpec, root: Path) -> tuple[str, Path]:
    """(split, path) of the instances file to read: the one asked for, the only one, or val2017."""
    files = {
        f.stem.removeprefix("instances_"): f for d in (root, root / "annotations") for f in d.glob("instances_*.json")
    }
    if not files:
        raise QuantlensError(
            f"source {spec.text!r}: no annotations/instances_*.json in {root}; unpack COCO's annotations there, or use "
            f"images:{spec.path}"
        )
    split = spec.options.get("split", "val2017" if len(files) > 1 else next(iter(files)))
    if split not in files:
        raise UnknownNameError(f"split in source {spec.text!r}:", split, files, "?split=NAME chooses one")
    return split, files[split]


def _sizes(where: str, images: Sequence[Mapping[str, Any]], needed: bool) -> np.ndarray | None:
    """int64 [N, 2], (height, width) of every picture; None where the file has none and none is needed."""
    found = [(image.get("height"), image.get("width")) for image in images]
    whole = [all(isinstance(v, int | float) and v > 0 and float(v).is_integer() for v in size) for size in found]
    if all(whole):
        return np.array(found, dtype=np.int64)
    if not needed:
        return None
    first = images[whole.index(False)]["file_name"]
    raise QuantlensError(
        f"{where} gives {whole.count(False)} of {len(images)} images no width and height, the first is {first}; boxes "
        "need them, so add them to the file"
    )


def _boxes(
    where: str, content: Mapping[str, Any], images: Sequence[Mapping[str, Any]], sizes: np.ndarray | None
) -> Boxes:
    """The boxes of the images in their order, classes numbered in the order of the categories' ids."""
    annotations = content.get("annotations") or []
    try:
        categories = {c["id"]: str(c["name"]) for c in content.get("categories") or []}
        ids = sorted(categories)
        place = {image["id"]: k for k, image in enumerate(images)} if annotations else {}
        rank = {category: k for k, category in enumerate(ids)}
        image = np.array([place.get(a["image_id"], -1) for a in annotations], dtype=np.int64)
        labels = np.array([rank.get(a["category_id"], -1) for a in annotations], dtype=np.int64)
        values = np.array([a["bbox"] for a in annotations] or np.empty((0, 4)), dtype=np.float64)
        if values.shape != (len(annotations), 4):
            raise ValueError(f"the bboxes are {list(values.shape)} numbers")
        corner, side = values[:, :2], values[:, 2:]
        area = np.array([a.get("area", np.nan) for a in annotations], dtype=np.float64)
        crowd = np.array([int(a.get("iscrowd") or 0) for a in annotations], dtype=bool)
        given = [a["id"] for a in annotations if a.get("id") is not None]
        repeated = len(given) - len(set(given))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise QuantlensError(
            f"{where} is not a COCO instances file: every annotation needs image_id, category_id and a bbox "
            f"[x, y, width, height], every image and category an id ({type(error).__name__}: {error})"
        ) from error
    if len(place) < len(images) and annotations:
        raise QuantlensError(f"{where} gives several images one id; repair the file")
    if len(categories) < len(content.get("categories") or []):
        raise QuantlensError(f"{where} gives several categories one id; repair the file")

    def refuse(wrong: Any, what: str, cure: str) -> None:
        if wrong.any():
            k = int(np.argmax(wrong))
            first = f"annotation {annotations[k].get('id', k)} of image {annotations[k]['image_id']}"
            raise QuantlensError(
                f"{where} has {wrong.sum()} of {len(wrong)} boxes {what}, the first is {first}; {cure}"
            )

    refuse(image < 0, "of images that it does not list", "repair the file")
    refuse(labels < 0, "of categories that it does not list", "add these categories, or correct their ids")
    refuse(~np.isfinite(np.hstack([corner, side])).all(axis=1), "with NaN or infinite numbers", "repair the file")
    refuse(
        (side < 0).any(axis=1), "with a negative width or height", "a bbox is [x, y, width, height]: repair the file"
    )
    refuse(area < 0, "with a negative area", "repair the file, or leave the area out")
    if sizes is not None:
        beyond = np.maximum(-corner, corner + side - sizes[image, ::-1]).max(axis=1, initial=0)
        cure = "clip them; a bbox is [x, y, width, height] in pixels of the picture"
        refuse(beyond > TOLERANCE, "that reach out of their picture by more than a pixel", cure)
    flat = (side == 0).any(axis=1)
    names = tuple(categories[i] for i in ids)
    used = [names[k] for k in np.unique(labels).tolist()]
    _warn_of_doubtful(where, int(flat.sum()), repeated, used)
    area = np.where(np.isfinite(area), area, side.prod(axis=1))
    return Boxes(image, np.hstack([corner, corner + side]), labels, crowd, area, names, tuple(ids)).take(~flat)


def _warn_of_doubtful(where: str, flat: int, repeated: int, used: Sequence[str]) -> None:
    """Of boxes without area, annotations with the id of another, and names of categories with boxes that come twice."""
    double = next((name for name in used if used.count(name) > 1), None)
    doubtful = {
        f"{flat} boxes without area are left out": flat > 0,
        f"{repeated} annotations have the id of another; all of them count": repeated > 0,
        f"several categories with boxes are named {double!r}, and models take them as one class": double is not None,
    }
    for told in (text for text, holds in doubtful.items() if holds):
        warnings.warn(f"{where}: {told}", QuantlensWarning, stacklevel=5)
