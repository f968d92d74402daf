"""Images ready for a model: decoded, resized and cropped once, normalised batch by batch."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image

from quantlens import _moved
from quantlens._version import __version__
from quantlens.boxes import Boxes
from quantlens.data import cache
from quantlens.data.corruptions import check_corruption, corrupt, corrupted_fingerprint, picture_seeds
from quantlens.data.preprocess import Preprocess
from quantlens.data.sources import FINGERPRINT_DIGITS, Source, open_source
from quantlens.errors import BadImageError, QuantlensError, QuantlensWarning

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]  # (images done, images in all)
CacheDir = str | os.PathLike[str] | bool | None


@dataclass(eq=False, repr=False)
class ImageSet:
    """N images of one size, in memory or as a memory map of the cache.

    Either `pixels` (uint8 [N,3,H,W], normalised with `preprocess` when used) or `values` (float32 [N,3,H,W],
    used as they are) is there. `labels` is int64 [N], int64 [N,L] of 0 and 1 where an image has several, or None.
    `boxes` are those of objects, or None, and `sizes` int64 [N, 2], (height, width), of the pictures that they are of.
    `skipped` has (name, reason) of every bad image that was left out.
    """

    names: list[str]
    labels: np.ndarray | None
    source: str
    fingerprint: str
    preprocess: Preprocess | None = None
    pixels: np.ndarray | None = None
    values: torch.Tensor | None = None
    class_names: list[str] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    group: str | None = None
    boxes: Boxes | None = None
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def tensor(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Images start..stop as normalised float32 [n,3,H,W]; the other images are not read."""
        if self.values is not None:
            return self.values[start:stop]
        assert self.pixels is not None
        assert self.preprocess is not None
        return self.preprocess.normalize(self.pixels[start:stop])

    def batches(
        self, batch_size: int = 64, device: str | torch.device = "cpu"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """(float32 [B,3,H,W], int64 [B] or None) for each batch in order; one batch at a time is in memory, for a GPU
        two, the second being read while it computes.

        The normalisation is done on the CPU, so that every device gets the same numbers.
        """
        import torch

        if batch_size < 1:
            raise QuantlensError(f"batch size {batch_size} is not a positive number; give 1 or more")
        starts, cuda = range(0, len(self), batch_size), torch.device(device).type == "cuda"

        def read(start: int) -> torch.Tensor:
            images = self.tensor(start, min(start + batch_size, len(self)))
            return images.pin_memory() if cuda and images.device.type == "cpu" else images

        for start, images in zip(starts, _ahead(read, starts) if cuda else map(read, starts), strict=True):
            labels = None if self.labels is None else torch.from_numpy(self.labels[start : start + len(images)].copy())
            yield images.to(device, non_blocking=cuda), None if labels is None else labels.to(device)

    def select(self, indices: np.ndarray) -> ImageSet:
        """Only these images, in this order; pixels of a memory map are copied."""
        chosen = hashlib.sha256(f"{self.fingerprint} {[int(i) for i in indices]}".encode()).hexdigest()
        return replace(
            self,
            names=[self.names[i] for i in indices],
            labels=None if self.labels is None else self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            values=None if self.values is None else self.values[indices],
            boxes=None if self.boxes is None else self.boxes.select(indices),
            sizes=None if self.sizes is None else self.sizes[indices],
            fingerprint=chosen[:FINGERPRINT_DIGITS],
        )

    def corrupted(self, name: str, severity: int, *, seed: int = 0, cache_dir: CacheDir = None) -> ImageSet:
        """The same images after a corruption (`corruptions.CORRUPTIONS`), whose random numbers come from each picture
        and the seed. They are kept in memory, what is large in a temporary file (as `cache.Rows` keeps rows).

        Raises UnknownNameError or QuantlensError where there is no such corruption, and for tensors.
        """
        name, severity = check_corruption(name, severity)
        given = self.pixels
        if given is None or self.preprocess is None:
            raise QuantlensError(
                f"{self.source} holds tensors, and {name} is for pictures; give PIL images or a SOURCE such as "
                "imagenet:DIR"
            )
        grey, bgr = given.shape[1] == 1, self.preprocess.channels == "bgr"

        def change(start: int) -> np.ndarray:
            pixels = given[start : start + CORRUPTED_TOGETHER].transpose(0, 2, 3, 1)
            colours = np.repeat(pixels, 3, axis=3) if grey else pixels[..., ::-1] if bgr else pixels
            found = corrupt(colours, name, severity, seeds=picture_seeds(colours, seed))
            if grey:
                found = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in found])[..., None]
            return (found[..., ::-1] if bgr else found).transpose(0, 3, 1, 2)

        rows, threads = cache.Rows(cache_dir), _threads()
        with ThreadPoolExecutor(threads, thread_name_prefix="quantlens-corrupt") as pool:
            for first in range(0, len(self), CORRUPTED_TOGETHER * threads):
                last = min(first + CORRUPTED_TOGETHER * threads, len(self))
                for found in pool.map(change, range(first, last, CORRUPTED_TOGETHER)):
                    rows.append(found)
        fingerprint = corrupted_fingerprint(self.fingerprint, (name, severity, seed))
        return replace(self, pixels=rows.whole(), fingerprint=fingerprint)

    def with_boxes(self, boxes: Boxes, sizes: Any = None) -> ImageSet:
        """The same with boxes, and the sizes [N, 2] of the pictures whose pixels they are in (by default the images'
        own). Raises QuantlensError where they are of other images."""
        sizes = np.tile(self.tensor(0, 1).shape[2:], (len(self), 1)) if sizes is None else np.asarray(sizes, np.int64)
        if sizes.shape != (len(self), 2) or boxes.image.max(initial=-1) >= len(self):
            last = boxes.image.max(initial=-1)
            raise QuantlensError(
                f"{self.source} has {len(self)} images, and boxes are of image {last} and {len(sizes)} sizes of "
                "pictures; give boxes of these images"
            )
        return replace(self, boxes=boxes, sizes=sizes)

    def in_classes_of(self, names: Sequence[str] | None) -> ImageSet:
        """The same images with labels that count a model's classes, where all class names of the set are among its
        names (in any order, in any case). A warning where they are as many, and other ones: they are taken in order."""
        own, labels = self.class_names, self.labels
        if own is None or names is None or labels is None or list(own) == list(names):
            return self
        ours, theirs = ([str(name).strip().casefold().replace("_", " ") for name in some] for some in (own, names))
        if ours == theirs or len({*ours}) < len(ours) or len({*theirs}) < len(theirs):
            return self
        if not {*ours} <= {*theirs}:
            if len(ours) == len(theirs) and sum(a == b for a, b in zip(ours, theirs, strict=True)) < len(ours) / 2:
                text = (
                    f"{self.source} names its classes otherwise than the model ({own[0]!r}, not {names[0]!r} …): they "
                    "are taken in their order"
                )
                if text not in TOLD.setdefault(self, set()):
                    TOLD[self].add(text)
                    warnings.warn(text, QuantlensWarning, stacklevel=2)
            return self
        place = np.array([theirs.index(name) for name in ours])
        several = np.zeros((len(labels), len(theirs)), dtype=labels.dtype)
        if labels.ndim == 2:
            several[:, place] = labels
        found = replace(self, labels=several if labels.ndim == 2 else place[labels], class_names=list(names))
        TOLD[found] = TOLD.setdefault(self, set())
        return found

    def check_labels(self, num_classes: int) -> np.ndarray:
        """The labels, after making sure that they can be classes of a model with `num_classes` outputs.

        Raises QuantlensError where there are no labels, one is out of range, or the set has other classes.
        """
        if self.class_names is not None and len(self.class_names) != num_classes:
            raise QuantlensError(
                f"the labels of {self.source} do not match the classes of the model: the set has "
                f"{len(self.class_names)} classes, the model {num_classes}; give images labelled with the model's "
                f"classes (imagenet:DIR for ImageNet models); the set's begin with {self.class_names[:3]}"
            )
        if self.labels is None:
            raise QuantlensError(
                f"{self.source} has no labels, and accuracy needs them; use a source with labels (imagenet, "
                "imagefolder, cifar10), or name the column that holds them (parquet, hf and webdataset: ?label=COLUMN)"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < num_classes:
            outside = next(int(y) for y in self.labels if not 0 <= y < num_classes)
            raise QuantlensError(
                f"{self.source} has label {outside} and the model has {num_classes} classes; "
                "use images of the classes that the model was trained on"
            )
        return self.labels

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else "labels"
        return f"<ImageSet {self.source}: {len(self)} images, {labels}, {len(self.skipped)} skipped>"


CORRUPTED_TOGETHER = 16
"""Pictures that one thread corrupts at a time."""

TOLD: WeakKeyDictionary[ImageSet, set[str]] = WeakKeyDictionary()
"""What has been said of a set, which is said once."""


def _ahead(read: Callable[[int], torch.Tensor], starts: Sequence[int]) -> Iterator[torch.Tensor]:
    """`read` of each start, by a thread that is one ahead of what is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="quantlens-batch") as pool:
        coming = pool.submit(read, starts[0]) if len(starts) else None
        for following in [*starts[1:], None]:
            if coming is None:
                return
            images = coming.result()
            coming = None if following is None else pool.submit(read, following)
            yield images


def load_images(
    source: Source | str,
    preprocess: Preprocess,
    *,
    cache_dir: CacheDir = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    keep_corrupted: bool = False,
) -> ImageSet:
    """Decode, resize and crop the images of `source`, or take them from the on-disk cache.

    `cache_dir` is a folder, None for the default one (`quantlens.data.cache`), or False for no cache: then N*3*H*W
    bytes are held in memory. Sets that ship or are made are never cached on disk; of corrupted images the clean ones
    are, and the corruption is done anew (:meth:`ImageSet.corrupted`) unless `keep_corrupted` has them cached too.
    `progress(done, total)` is called after each decoded image. `workers` threads decode (as many as there are
    processors by default).

    Raises BadImageError, naming the file, for an image that cannot be read; with `skip_bad` it is left out
    and recorded in `skipped`. Raises StorageError where the cache cannot be written: the disk is full, or a
    folder of your own may not be written; with the user's default one that is a warning, and there is no cache.
    """
    if isinstance(source, str):
        source = open_source(source)
    identity = source.identity() if cache_dir is not False else None
    key = None if identity is None else cache.cache_key(identity, preprocess.image_key())
    bad: cache.Skipped = []
    decoded = _decoded(source, preprocess, bad, skip_bad, progress, workers)
    pixels, bad = _entry(decoded, bad, len(source), preprocess.input_size, cache_dir, key)
    if bad and not skip_bad:
        raise _bad_image(source, *bad[0])
    skipped = [(source.names[k], reason) for k, reason in bad]
    if skipped:
        source = source.select(np.delete(np.arange(len(source)), [k for k, _ in bad]))
    if not len(source):
        raise QuantlensError(
            f"none of the {len(skipped)} images of {source.spec} can be read; the first is "
            f"{skipped[0][0]}: {skipped[0][1]}"
        )
    found = ImageSet(
        names=list(source.names),
        labels=source.labels,
        source=source.spec,
        fingerprint=source.clean_fingerprint(),
        preprocess=preprocess,
        pixels=pixels,
        class_names=source.class_names,
        skipped=skipped,
        group=source.group,
        boxes=source.boxes,
        sizes=source.sizes,
    )
    if source.corruption is None:
        return found
    return _corrupted(found, source, cache_dir, identity if keep_corrupted else None)


def _corrupted(images: ImageSet, source: Source, cache_dir: CacheDir, identity: list[str] | None) -> ImageSet:
    """The images of a source as its corruption leaves them. identity: its own, where they are kept in the cache."""
    assert source.corruption is not None
    assert images.preprocess is not None
    name, severity, seed = source.corruption
    if identity is None:
        return images.corrupted(name, severity, seed=seed, cache_dir=cache_dir)

    def made() -> Iterator[np.ndarray]:
        yield from images.corrupted(name, severity, seed=seed, cache_dir=cache_dir).pixels  # type: ignore[misc]

    preprocess = images.preprocess
    key = cache.cache_key([*identity, f"{source.corruption} {__version__}"], preprocess.image_key())
    pixels, _ = _entry(made(), [], len(images), preprocess.input_size, cache_dir, key)
    return replace(images, pixels=pixels, fingerprint=source.fingerprint())


def _entry(
    decoded: Iterator[np.ndarray],
    bad: cache.Skipped,
    total: int,
    shape: tuple[int, ...],
    cache_dir: CacheDir,
    key: str | None,
) -> cache.Entry:
    """The images of `decoded`, or of the cache where they are there. key: theirs in the cache, None for no cache."""
    if key is not None:
        directory = cache.cache_directory(None if isinstance(cache_dir, bool) else cache_dir)
        try:
            found = cache.read_entry(directory, key, total, shape)
            return found or cache.write_entry(directory, key, total, shape, decoded, bad)
        except cache.ReadOnlyError:
            if not isinstance(cache_dir, bool | None) or os.environ.get("QUANTLENS_CACHE"):
                raise
            text = f"{directory} may not be written: images are kept in memory; set QUANTLENS_CACHE to another folder"
            warnings.warn(text, QuantlensWarning, stacklevel=3)
    pixels = np.empty((total, *shape), dtype=np.uint8)
    for row, image in enumerate(decoded):
        pixels[row] = image
    return pixels[: total - len(bad)], bad


def _decoded(
    source: Source,
    preprocess: Preprocess,
    bad: cache.Skipped,
    skip_bad: bool,
    progress: Progress | None,
    workers: int | None,
) -> Iterator[np.ndarray]:
    """uint8 [3,H,W] of each image in order, a few of them in memory; those that cannot be read go to `bad`.

    Without `skip_bad` the first bad image raises BadImageError.
    """
    total = len(source)
    threads = workers or _threads()

    def decode(k: int) -> np.ndarray | str:
        try:
            return source.prepared(k, preprocess)
        except BadImageError as error:
            return str(error)

    with ThreadPoolExecutor(threads, thread_name_prefix="quantlens-decode") as pool:
        for start in range(0, total, 16 * threads):
            part = range(start, min(start + 16 * threads, total))
            for k, result in zip(part, pool.map(decode, part), strict=True):
                if not isinstance(result, str):
                    yield result
                elif skip_bad:
                    bad.append((k, result))
                else:
                    raise _bad_image(source, k, result)
                if progress is not None:
                    progress(k + 1, total)


def _threads() -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, processors)


def _bad_image(source: Source, position: int, reason: str) -> BadImageError:
    return BadImageError(
        f"{source.describe(position)}: {reason}; repair or remove it, or use --skip-bad to count it and go on"
    )


__getattr__ = _moved.finder(__name__)
