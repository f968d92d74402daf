"""Images ready for a model: decoded, resized and cropped once, normalised batch by batch."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlens.data import cache
from quantlens.data.preprocess import Preprocess
from quantlens.data.sources import FINGERPRINT_DIGITS, Source, open_source
from quantlens.errors import BadImageError, QuantlensError, QuantlensWarning

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]  # (images done, images in all)
CacheDir = str | os.PathLike[str] | bool | None
Decoded = Iterator[tuple[int, np.ndarray | str]]  # (position, uint8 [3,H,W] or why it cannot be read)


@dataclass(eq=False, repr=False)
class ImageSet:
    """N images of one size, in memory or as a memory map of the cache.

    Either `pixels` (uint8 [N,3,H,W], normalised with `preprocess` when used) or `values` (float32 [N,3,H,W],
    used as they are) is there. `labels` is int64 [N] or None. `skipped` has (name, reason) of every bad image
    that was left out.
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

    def __len__(self) -> int:
        return len(self.names)

    @property
    def paths(self) -> list[str]:
        """The names: for files, their paths relative to the source's folder."""
        return self.names

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(3, H, W)."""
        data = self.pixels if self.pixels is not None else self.values
        assert data is not None
        return tuple(data.shape[1:])

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
        """(float32 [B,3,H,W], int64 [B] or None) for each batch in order; one batch at a time is in memory.

        The normalisation is done on the CPU, so that every device gets the same numbers.
        """
        import torch

        if batch_size < 1:
            raise QuantlensError(f"batch size {batch_size} is not a positive number; give 1 or more")
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            labels = None if self.labels is None else torch.from_numpy(self.labels[start:stop].copy()).to(device)
            yield self.tensor(start, stop).to(device), labels

    def select(self, indices: np.ndarray) -> ImageSet:
        """Only these images, in this order; pixels of a memory map are copied."""
        chosen = hashlib.sha256(f"{self.fingerprint} {[int(i) for i in indices]}".encode()).hexdigest()
        return replace(
            self,
            names=[self.names[i] for i in indices],
            labels=None if self.labels is None else self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            values=None if self.values is None else self.values[indices],
            fingerprint=chosen[:FINGERPRINT_DIGITS],
        )

    def check_labels(self, num_classes: int) -> np.ndarray:
        """The labels, after making sure that they can be classes of a model with `num_classes` outputs.

        Raises QuantlensError where there are no labels, or one is out of range.
        """
        if self.labels is None:
            raise QuantlensError(
                f"{self.source} has no labels, and accuracy needs them; use a source with labels "
                "(imagenet, imagefolder, cifar10)"
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
        counts = f"{len(self)} images {self.image_shape}, {labels}, {len(self.skipped)} skipped"
        return f"<ImageSet {self.source}: {counts}>"


def load_images(
    source: Source | str,
    preprocess: Preprocess,
    *,
    cache_dir: CacheDir = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> ImageSet:
    """Decode, resize and crop the images of `source`, or take them from the on-disk cache.

    `cache_dir` is a folder, None for the default one (`quantlens.data.cache`), or False for no cache: then
    N*3*H*W bytes are held in memory. Embedded sets are never cached on disk. `limit` takes the first images
    only. `progress(done, total)` is called after each decoded image. `workers` threads decode (as many as
    there are processors by default).

    Raises BadImageError, naming the file, for an image that cannot be read; with `skip_bad` it is left out
    and recorded in `skipped`. Raises StorageError where the cache cannot be written: the disk is full, or a
    folder of your own may not be written; with the user's default one that is a warning, and there is no cache.
    """
    if isinstance(source, str):
        source = open_source(source)
    if limit is not None:
        if limit < 1:
            raise QuantlensError(f"limit {limit} leaves no image of {source.spec}; give 1 or more")
        source = source.select(range(min(limit, len(source))))
    identity = source.identity() if cache_dir is not False else None
    key = None if identity is None else cache.cache_key(identity, preprocess.image_key())
    decoded = _decoded(source, preprocess, skip_bad, progress, workers)
    entry = _entry(decoded, len(source), preprocess.input_size, cache_dir, key)
    if entry.skipped and not skip_bad:
        raise _bad_image(source, *entry.skipped[0])
    skipped = [(source.names[k], reason) for k, reason in entry.skipped]
    if skipped:
        left_out = {k for k, _ in entry.skipped}
        source = source.select([k for k in range(len(source)) if k not in left_out])
    if not len(source):
        raise QuantlensError(
            f"none of the {len(skipped)} images of {source.spec} can be read; the first is "
            f"{skipped[0][0]}: {skipped[0][1]}"
        )
    return ImageSet(
        names=list(source.names),
        labels=source.labels,
        source=source.spec,
        fingerprint=source.fingerprint(),
        preprocess=preprocess,
        pixels=entry.pixels,
        class_names=source.class_names,
        skipped=skipped,
        group=source.group,
    )


def _entry(decoded: Decoded, total: int, shape: tuple[int, ...], cache_dir: CacheDir, key: str | None) -> cache.Entry:
    """The images of `decoded`, or of the cache where they are there. key: theirs in the cache, None for no cache."""
    if key is None:
        return _decode_to_memory(decoded, total, shape)
    directory = cache.cache_directory(None if isinstance(cache_dir, bool) else cache_dir)
    found = cache.read_entry(directory, key, total, shape)
    try:
        return found or _decode_to_cache(decoded, directory, key, total, shape)
    except cache.ReadOnlyError:
        if not isinstance(cache_dir, bool | None) or os.environ.get("QUANTLENS_CACHE"):
            raise
        text = f"{directory} may not be written: images are kept in memory; set QUANTLENS_CACHE to another folder"
        warnings.warn(text, QuantlensWarning, stacklevel=3)
        return _decode_to_memory(decoded, total, shape)


def _decode_to_memory(decoded: Decoded, total: int, shape: tuple[int, ...]) -> cache.Entry:
    pixels = np.empty((total, *shape), dtype=np.uint8)
    skipped: list[tuple[int, str]] = []
    kept = 0
    for k, result in decoded:
        if isinstance(result, str):
            skipped.append((k, result))
        else:
            pixels[kept] = result
            kept += 1
    return cache.Entry(pixels[:kept], skipped)


def _decode_to_cache(decoded: Decoded, directory: Path, key: str, total: int, shape: tuple[int, ...]) -> cache.Entry:
    skipped: list[tuple[int, str]] = []
    with cache.EntryWriter(directory, key, total, shape) as writer:
        for k, result in decoded:
            if isinstance(result, str):
                skipped.append((k, result))
            else:
                writer.add(result)
        writer.commit(skipped)
    entry = cache.read_entry(directory, key, total, shape)
    if entry is None:
        raise cache.StorageError(f"the image cache {directory} did not keep what was written to it; {cache.CURE}")
    return entry


def _decoded(
    source: Source, preprocess: Preprocess, skip_bad: bool, progress: Progress | None, workers: int | None
) -> Decoded:
    """(position, uint8 [3,H,W]) in order, or (position, reason) for a bad image; a few images ahead are in
    memory.

    Without `skip_bad` the first bad image raises BadImageError.
    """
    total = len(source)
    workers = workers or min(16, _processors())

    def decode(k: int) -> np.ndarray | str:
        try:
            return preprocess.resize_crop(source.image(k))
        except BadImageError as error:
            return str(error)

    ahead: deque[Future[np.ndarray | str]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="quantlens-decode") as pool:
        try:
            submitted = 0
            for k in range(total):
                while submitted < total and len(ahead) < 4 * workers:
                    ahead.append(pool.submit(decode, submitted))
                    submitted += 1
                result = ahead.popleft().result()
                if isinstance(result, str) and not skip_bad:
                    raise _bad_image(source, k, result)
                yield k, result
                if progress is not None:
                    progress(k + 1, total)
        finally:
            for future in ahead:
                future.cancel()


def _bad_image(source: Source, position: int, reason: str) -> BadImageError:
    return BadImageError(
        f"{source.describe(position)}: {reason}; repair or remove it, or use --skip-bad to count it and go on"
    )


def _processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def as_image_set(
    x: Any,
    preprocess: Preprocess | None = None,
    name: str = "tensor",
    *,
    cache_dir: CacheDir = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> ImageSet:
    """Anything a person may give as images, as an ImageSet.

    - an ImageSet: itself, with `preprocess`'s normalisation where one is given (its sizes must agree);
    - a Source or a SOURCE text: loaded with `preprocess`, which is then needed;
    - a float tensor or array [N,3,H,W], or a pair (tensor, labels): used as they are, already normalised;
    - an iterable of such tensors or pairs (a DataLoader): read once and kept whole in memory, so that FP32
      and quantized models see the same images in the same order.

    `name` is the source's name in results for tensors. Raises QuantlensError where shapes, types or labels do
    not fit.
    """
    if isinstance(x, ImageSet):
        return _with_preprocess(x, preprocess)
    if isinstance(x, (Source, str)):
        if preprocess is None:
            raise QuantlensError(
                f"{x if isinstance(x, str) else x.spec}: preprocess is missing; give the model's own, model.preprocess"
            )
        return load_images(x, preprocess, cache_dir=cache_dir, skip_bad=skip_bad, progress=progress)
    if _is_array(x):
        return _from_batches([(x, None)], name)
    if isinstance(x, (tuple, list)) and len(x) == 2 and _is_array(x[0]) and not _is_image_batch(x[1]):
        return _from_batches([(x[0], x[1])], name)
    if isinstance(x, Iterable) and not isinstance(x, (dict, bytes)):
        return _from_batches([_as_pair(item, name) for item in x], name)
    raise QuantlensError(
        f"{name}: cannot read images from a {type(x).__name__}; give a SOURCE such as imagenet:DIR, a "
        "float tensor "
        "[N,3,H,W], a pair (tensor, labels), or an iterable of them"
    )


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


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or _is_tensor(x)


def _is_tensor(x: Any) -> bool:
    import torch

    return isinstance(x, torch.Tensor)


def _is_image_batch(x: Any) -> bool:
    return _is_array(x) and x.ndim == 4


def _as_pair(item: Any, name: str) -> tuple[Any, Any]:
    if _is_array(item):
        return item, None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    raise QuantlensError(
        f"{name}: a batch is a {type(item).__name__}; each must be a float tensor [B,3,H,W] or a pair (tensor, labels)"
    )


def _from_batches(batches: list[tuple[Any, Any]], name: str) -> ImageSet:
    import torch

    if not batches:
        raise QuantlensError(
            f"{name}: the iterable gives no batch; give at least one (a generator can be read only once)"
        )
    values = [_image_values(x, name) for x, _ in batches]
    shapes = {tuple(v.shape[1:]) for v in values}
    if len(shapes) > 1:
        raise QuantlensError(f"{name}: batches of different sizes {sorted(shapes)}; resize all images to one size")
    given = [y is not None for _, y in batches]
    if any(given) and not all(given):
        raise QuantlensError(f"{name}: some batches have labels and some have none; give labels for all or for none")
    labels = None
    if all(given):
        labels = np.concatenate([_label_values(y, len(v), name) for (_, y), v in zip(batches, values, strict=True)])
    whole = values[0] if len(values) == 1 else torch.cat(values)
    if not len(whole):
        raise QuantlensError(f"{name}: there is no image in it; give at least one")
    if not bool(torch.isfinite(whole).all()):
        raise QuantlensError(f"{name}: the images hold NaN or infinity; look at the transform that made them")
    digest = hashlib.sha256(str(tuple(whole.shape)).encode())
    for start in range(0, len(whole), 64):
        digest.update(whole[start : start + 64].numpy().tobytes())
    return ImageSet(
        names=[f"{name}/{k}" for k in range(len(whole))],
        labels=labels,
        source=name,
        fingerprint=digest.hexdigest()[:FINGERPRINT_DIGITS],
        values=whole,
    )


def _image_values(x: Any, name: str) -> torch.Tensor:
    """float32 [N,3,H,W] on the CPU."""
    import torch

    if not _is_array(x):
        raise QuantlensError(f"{name}: images are a {type(x).__name__}; give a float tensor [N,3,H,W]")
    tensor = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x.detach()
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise QuantlensError(f"{name}: images have shape {list(tensor.shape)}; give [N,3,H,W]")
    if not tensor.is_floating_point():
        raise QuantlensError(
            f"{name}: images are {str(tensor.dtype).removeprefix('torch.')}; give normalised float "
            "values (x / 255 - mean) / std"
        )
    return tensor.to(device="cpu", dtype=torch.float32).contiguous()


def _label_values(y: Any, count: int, name: str) -> np.ndarray:
    """int64 [count]."""
    labels = y.detach().cpu().numpy() if _is_tensor(y) else np.asarray(y)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise QuantlensError(
            f"{name}: labels have shape {list(labels.shape)} and type {labels.dtype}; give one whole "
            "number for each of the "
            f"{count} images"
        )
    return labels.astype(np.int64)
