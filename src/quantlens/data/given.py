"""Images that a person gives in Python -> an ImageSet: arrays, PIL images, data sets, loaders, and batches of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from quantlens.boxes import Boxes
from quantlens.data.cache import Rows
from quantlens.data.images import CacheDir, ImageSet, Progress, load_images
from quantlens.data.labels import as_labels
from quantlens.data.preprocess import Preprocess
from quantlens.data.sources import CALIBRATION_IMAGES, FINGERPRINT_DIGITS, Source, SourceSpec, as_rgb
from quantlens.errors import BadImageError, QuantlensError, QuantlensWarning

if TYPE_CHECKING:
    import torch

IMAGE_KEYS = ("pixel_values", "image", "images", "img", "jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("labels", "label", "fine_label", "cls", "target", "targets", "y")
"""Keys of a batch that is a dictionary, in the order in which they are looked for."""


def as_image_set(
    x: Any,
    preprocess: Preprocess | None = None,
    name: str = "tensor",
    *,
    cache_dir: CacheDir = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
    most: int | None = None,
    check: Callable[[torch.Tensor], None] | None = None,
) -> ImageSet:
    """Anything a person may give as images, as an ImageSet.

    - an ImageSet: itself, with `preprocess`'s normalisation where one is given (its sizes must agree);
    - a Source, a SOURCE text or a `datasets.Dataset`: loaded with `preprocess`, which is then needed;
    - float tensors or arrays [N,C,H,W], already normalised, used as they are; PIL images, which `preprocess` prepares;
      pairs of either with labels; dictionaries with `pixel_values` or `image`, and `labels`;
    - a pair of images and `Boxes`, in pixels of the pictures, or of the images that are tensors;
    - an iterable of these or of single images (DataLoader, list, generator), or a map-style `Dataset`: read once, so
      that FP32 and quantized models see the same images in the same order; what is large is kept in a temporary file.

    `name` is the source's name in results. most: read no more images (with a warning where there are more), and no
    labels. check: called with the first float batch. Raises QuantlensError where shapes, types or labels do not fit.
    """
    if isinstance(x, ImageSet):
        return _with_preprocess(x, preprocess)
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Boxes):
        images = as_image_set(x[0], preprocess, name, cache_dir=cache_dir, progress=progress)
        pictures = _are_images(x[0]) and isinstance(x[0][0], Image.Image)
        return images.with_boxes(x[1], [as_rgb(one).size[::-1] for one in x[0]] if pictures else images.sizes)
    x = opened(x, name)
    if isinstance(x, (Source, str)):
        if preprocess is None:
            raise QuantlensError(
                f"{x if isinstance(x, str) else x.spec}: preprocess is missing; give the model's own, model.preprocess"
            )
        return load_images(x, preprocess, cache_dir=cache_dir, skip_bad=skip_bad, progress=progress)
    reader = _Reader(name, preprocess, skip_bad, Rows(cache_dir), check)
    reader.read(_items(x, name), most, progress, _count(x))
    return reader.image_set()


def _with_preprocess(images: ImageSet, preprocess: Preprocess | None) -> ImageSet:
    if preprocess is None or images.pixels is None or images.preprocess == preprocess:
        return images
    assert images.preprocess is not None
    if images.preprocess.image_key() != preprocess.image_key():
        raise QuantlensError(
            f"{images.source} was prepared as {images.preprocess.image_key()} and the model expects "
            f"{preprocess.image_key()}; load the images with the model's own preprocess"
        )
    return replace(images, preprocess=preprocess)


def opened(x: Any, name: str) -> Any:
    """A `datasets.Dataset` of pictures as a Source, which is cached; all else as it is."""
    x = _as_pictures(x)
    if not type(x).__module__.startswith("datasets.") or not hasattr(x, "_fingerprint") or x.format["type"] is not None:
        return x
    from quantlens.data.hub import of_dataset

    return of_dataset(x, SourceSpec(name, "hf", name, slice(None), None, 0, {}), name)


def _as_pictures(x: Any) -> Any:
    """A `datasets.Dataset` whose pictures are to come as arrays, with pictures; all else as it is."""
    if not type(x).__module__.startswith("datasets.") or not hasattr(x, "_fingerprint"):
        return x
    pictures = any(type(feature).__name__ == "Image" for feature in (x.features or {}).values())
    return x.with_format(None) if pictures and x.format["type"] in ("torch", "numpy", "tensorflow", "jax") else x


def drawn(x: Any, seed: int) -> Any:
    """Of a map-style data set the usual number of calibration images, drawn by the seed as of a SOURCE; all else as it
    is."""
    x = opened(x, "calibration images")
    if not isinstance(x, Source) and not is_map_style(x):
        return x
    rows = np.random.RandomState(seed % 2**32).permutation(len(x))[:CALIBRATION_IMAGES]
    return x.select(rows) if isinstance(x, Source) else [x[int(row)] for row in rows]


def check_values(images: torch.Tensor, name: str) -> None:
    """Raise QuantlensError for a tensor without values of its own for every place."""
    import torch

    if images.is_meta or images.layout != torch.strided:
        what = "on the meta device, without values" if images.is_meta else "sparse"
        raise QuantlensError(f"{name} are {what}; give a plain tensor of values")


def is_map_style(x: Any) -> bool:
    """Whether it is a data set that is read by index: one of torch or datasets, or one like them."""
    if isinstance(x, list | tuple | str | bytes | Mapping | ImageSet) or _dims(x) is not None:
        return False
    indexed = hasattr(type(x), "__getitem__") and hasattr(type(x), "__len__")
    from torch.utils.data import Dataset, IterableDataset

    known = isinstance(x, Dataset) and not isinstance(x, IterableDataset)
    return indexed and (known or not isinstance(x, Iterable) or hasattr(x, "_fingerprint"))


def peeked(x: Any) -> tuple[Any, tuple[int, ...] | None]:
    """(the same images, the shape [C, H, W] of the first where they are float values). An iterator is read by one
    item, and what is given back begins with it."""
    if x is None or isinstance(x, str | Source | ImageSet):
        return x, None if not isinstance(x, ImageSet) or x.values is None else tuple(x.values.shape[1:])
    x = _as_pictures(x)
    if is_map_style(x):
        first = [x[0]] if len(x) else []
    elif _dims(x) is not None or isinstance(x, list | tuple | Mapping) or not isinstance(x, Iterable):
        first = [next(iter(_items(x, "calibration images")), None)]
    else:
        iterator = iter(x)
        first = [item for item in [next(iterator, None)] if item is not None]
        x = chain(first, iterator)
    if not first or first[0] is None:
        return x, None
    values = _parts(next(_flat(first[0])), "calibration images")[0]
    while isinstance(values, list | tuple) and values:
        values = values[0]
    dims = _dims(values)
    return x, tuple(int(side) for side in values.shape[-3:]) if dims in (3, 4) else None


# ---- one item after the other ----------------------------------------------------------------------------------------


def _dims(x: Any) -> int | None:
    """Dimensions of a tensor or an array of numbers; None for anything else."""
    import torch

    numbers = isinstance(x, torch.Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind in "biufc")
    return x.ndim if numbers else None


def _is_image(x: Any) -> bool:
    return isinstance(x, Image.Image) or _dims(x) == 3


def _are_images(x: Any) -> bool:
    return isinstance(x, list | tuple) and len(x) > 0 and _is_image(x[0]) and (len(x) == 1 or _is_image(x[1]))


def _is_pair(x: Any) -> bool:
    """Images and their labels, not two batches."""
    if not isinstance(x, tuple | list) or len(x) != 2:
        return False
    first, second = x
    images = _dims(first) == 4 or _are_images(first) or (isinstance(x, tuple) and _is_image(first))
    return images and not _is_image(second) and not _are_images(second) and _dims(second) != 4


def _items(x: Any, name: str) -> Iterable[Any]:
    """What is given, item by item: batches or single images, with or without labels."""
    if isinstance(x, Mapping) and not any(key in x for key in IMAGE_KEYS):
        keys = ", ".join(map(str, x)) or "nothing"
        raise QuantlensError(f"{name}: a {type(x).__name__} with {keys}; give one, or a batch with pixel_values")
    if _dims(x) == 4 or isinstance(x, Image.Image | Mapping) or _is_pair(x):
        return [x]
    if _dims(x) is not None:
        raise QuantlensError(f"{name}: images have shape {list(x.shape)}; give [N,3,H,W]")
    if is_map_style(x):
        return (x[row] for row in range(len(x)))
    if isinstance(x, Iterable) and not isinstance(x, str | bytes):
        return x
    raise QuantlensError(
        f"{name}: cannot read images from a {type(x).__name__}; give a SOURCE such as imagenet:DIR, a float tensor "
        "[N,3,H,W], a pair (tensor, labels), PIL images, a data set, or an iterable of them"
    )


def _count(x: Any) -> int | None:
    """How many images there are, where that is known beforehand."""
    data = getattr(x, "dataset", x)  # of a DataLoader
    return len(data) if is_map_style(data) or (isinstance(data, list) and _are_images(data)) else None


def _flat(item: Any) -> Iterator[Any]:
    """A batch that nobody collated (a list of samples) sample by sample; any other as it is."""
    single = isinstance(item, list) and bool(item)
    if single and (isinstance(item[0], Mapping) or (isinstance(item[0], tuple) and item[0] and _is_image(item[0][0]))):
        yield from item
    else:
        yield item


def _parts(item: Any, name: str) -> tuple[Any, Any]:
    """(images, labels or None) of an item; images: PIL, an array, or a list of either."""
    if isinstance(item, Mapping):
        key = next((key for key in IMAGE_KEYS if item.get(key) is not None), None)
        if key is None:
            raise QuantlensError(
                f"{name}: a batch is a {type(item).__name__} with {', '.join(map(str, item))}; it needs pixel_values"
            )
        return item[key], next((item[k] for k in LABEL_KEYS if item.get(k) is not None), None)
    if isinstance(item, tuple | list) and item and not _are_images(item):
        return item[0], item[1] if len(item) > 1 else None
    if isinstance(item, tuple | list) and len(item) == 1:
        return list(item), None
    return item, None


class _Reader:
    """Reads items into rows: pixels of pictures, or values of tensors."""

    def __init__(self, name: str, preprocess: Preprocess | None, skip_bad: bool, rows: Rows, check: Any):
        self.name, self.preprocess, self.skip_bad, self.rows, self.check = name, preprocess, skip_bad, rows, check
        self.labels: list[Any] = []
        self.names: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self.seen = self.items = 0
        self.channels = 3 if preprocess is None else preprocess.input_size[0]

    def read(self, items: Iterable[Any], most: int | None, progress: Progress | None, total: int | None) -> None:
        for item in chain.from_iterable(map(_flat, items)):
            if most is not None and len(self.names) >= most:
                warnings.warn(
                    f"{self.name}: the first {most} images are taken, and no more are read; give fewer, or a data set "
                    "or SOURCE, of which the seed draws some",
                    QuantlensWarning,
                    stacklevel=4,
                )
                return
            self.items += 1
            images, labels = _parts(item, self.name)
            self._add(images, labels if most is None else None, most)
            if progress is not None and total is not None:
                progress(self.seen, max(total, self.seen))

    def _add(self, images: Any, labels: Any, most: int | None) -> None:
        """Keep the images of one item that can be read, and their labels and names, up to `most` images in all."""
        pictures = isinstance(images, Image.Image) or (
            isinstance(images, list | tuple) and bool(images) and isinstance(images[0], Image.Image)
        )
        places, block = self._pictures(images) if pictures else self._values(images)
        count = len(block) if not pictures else 1 if isinstance(images, Image.Image) else len(images)
        labels = self._labels(labels, count) or [None] * count
        places = places[: None if most is None else most - len(self.names)]
        self.labels += [labels[place] for place in places]
        self.names += [f"{self.name}/{self.seen + place}" for place in places]
        self.seen += count
        try:
            if places:
                self.rows.append(block[: len(places)])
        except ValueError as error:
            raise QuantlensError(
                f"{self.name}: images of different sizes {error}; resize all images to one size (PIL images are "
                "resized as the model wants them)"
            ) from error

    def _pictures(self, images: Any) -> tuple[Sequence[int], np.ndarray]:
        """(places of those that can be read, uint8 [N,C,H,W] of them)."""
        if self.preprocess is None:
            raise QuantlensError(f"{self.name}: preprocess is missing; give the model's own, model.preprocess")
        found: dict[int, np.ndarray] = {}
        for row, image in enumerate([images] if isinstance(images, Image.Image) else images):
            try:
                if not isinstance(image, Image.Image):
                    raise QuantlensError(f"{self.name}: a batch mixes PIL images and {type(image).__name__}")
                found[row] = self.preprocess.resize_crop(as_rgb(image))
            except (BadImageError, OSError) as error:
                if not self.skip_bad:
                    raise BadImageError(f"{self.name}/{self.seen + row}: {error}") from error
                self.skipped.append((f"{self.name}/{self.seen + row}", str(error)))
        return list(found), np.stack(list(found.values())) if found else np.empty(0, np.uint8)

    def _values(self, images: Any) -> tuple[Sequence[int], np.ndarray]:
        """(all places, float32 [N,C,H,W] on the CPU), checked."""
        import torch

        if isinstance(images, list | tuple) and images and all(_dims(image) == 3 for image in images):
            shapes = {tuple(image.shape) for image in images}
            if len(shapes) > 1:
                raise QuantlensError(f"{self.name}: images of different sizes {sorted(shapes)}; resize all to one size")
            images = torch.stack([torch.as_tensor(image) for image in images])
        elif isinstance(images, list) and images and isinstance(images[0], list):
            images = np.asarray(images)
        if _dims(images) is None:
            raise QuantlensError(
                f"{self.name}: a batch is a {type(images).__name__}; each must be a float tensor [B,3,H,W], PIL "
                "images, a pair (images, labels) or a dictionary with pixel_values"
            )
        tensor = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images.detach()
        shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        tensor = tensor[None] if tensor.ndim == 3 else tensor
        wanted = f"[N,{self.channels},H,W]"
        last = tensor.ndim == 4 and tensor.shape[3] == self.channels != tensor.shape[1]
        if not tensor.is_floating_point():
            raise QuantlensError(
                f"{self.name}: images are {dtype}; give normalised float values {wanted}, (x / 255 - mean) / std, or "
                "PIL images (Image.fromarray), which are prepared as the model wants them"
            )
        if tensor.ndim != 4 or tensor.shape[1] != self.channels:
            hint = ": the channels come last, permute(0, 3, 1, 2) puts them first" if last else ""
            raise QuantlensError(f"{self.name}: images have shape {shape}; give {wanted}{hint}")
        check_values(tensor, self.name)
        values = tensor.to(device="cpu", dtype=torch.float32).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise QuantlensError(f"{self.name}: the images hold NaN or infinity; look at the transform that made them")
        if self.check is not None and not self.names:
            self.check(values)
        return range(len(values)), values.numpy()

    def _labels(self, given: Any, count: int) -> list[Any] | None:
        """One label per image: whole numbers, names, or rows of 0 and 1; None where what is given is neither."""
        import torch

        if given is None:
            return None
        if isinstance(given, list | tuple) and given and isinstance(given[0], torch.Tensor):
            given = torch.stack(list(given)) if len({tuple(g.shape) for g in given}) == 1 else None
        labels = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given, dtype=object)
        try:
            labels = np.asarray(labels.tolist())
        except ValueError:
            return None
        if labels.dtype.kind == "U" and labels.shape in ((count,), ()):
            return [str(label) for label in np.atleast_1d(labels)]
        if labels.dtype.kind not in "iubf":
            return None  # boxes …
        if labels.ndim == 0 and count == 1:
            labels = labels[None]
        if labels.ndim == 1 and count == 1 and len(labels) > 1:
            labels = labels[None]
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        fitting = labels.ndim in (1, 2) and len(labels) == count
        bits = bool(np.isin(labels, (0, 1)).all())
        if not fitting or not (bits or (labels.ndim == 1 and labels.dtype.kind in "iu")):
            raise QuantlensError(
                f"{self.name}: labels have shape {list(labels.shape)} and type {labels.dtype}; give one whole number "
                f"for each of the {count} images, or 0 and 1 for each class"
            )
        return list(labels.astype(np.int64))

    def image_set(self) -> ImageSet:
        if not self.items:
            raise QuantlensError(
                f"{self.name}: the iterable gives no batch; give at least one (a generator can be read only once)"
            )
        if not self.names:
            raise QuantlensError(f"{self.name}: there is no image in it that can be read; give at least one")
        given = [label is not None for label in self.labels]
        if any(given) and not all(given):
            raise QuantlensError(
                f"{self.name}: some batches have labels and some have none; give labels for all or for none"
            )
        labels, names = as_labels(self.labels if all(given) else None, None, self.name)
        return self._of(self.rows.whole(), labels, names)

    def _of(self, whole: np.ndarray, labels: np.ndarray | None, class_names: list[str] | None) -> ImageSet:
        import torch

        digest = hashlib.sha256(str(tuple(whole.shape)).encode())
        digest.update(whole.data)
        pixels = whole.dtype == np.uint8
        return ImageSet(
            names=self.names,
            labels=labels,
            source=self.name,
            fingerprint=digest.hexdigest()[:FINGERPRINT_DIGITS],
            preprocess=self.preprocess if pixels else None,
            pixels=whole if pixels else None,
            values=None if pixels else torch.from_numpy(whole),
            class_names=class_names,
            skipped=self.skipped,
        )
