"""Boxes of many images in flat arrays: what annotations say, and what a detector found."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np

from quantlens.errors import QuantlensError

Array = np.ndarray[Any, Any]

_TYPES = {"image": np.int64, "labels": np.int64, "scores": np.float64, "area": np.float64, "crowd": np.bool_}


def spans(first: Array, counts: Array) -> Array:
    """The indices first, first + 1, … of every span, one span after the other."""
    return np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)


@dataclass(frozen=True, eq=False)
class _Rows:
    """N rows: `image` int64 [N] is the index of the image, `boxes` float64 [N, 4] x1, y1, x2, y2 in pixels of the
    original picture."""

    image: Array
    boxes: Array

    def __post_init__(self) -> None:
        n = np.shape(self.image)[0] if np.ndim(self.image) == 1 else -1
        boxes = np.asarray(self.boxes, dtype=np.float64)
        object.__setattr__(self, "boxes", boxes.reshape(0, 4) if n == 0 and not boxes.size else boxes)
        if self.boxes.shape != (n, 4):
            raise QuantlensError(f"{n} boxes have shape {self.boxes.shape}; give [N, 4]: x1, y1, x2, y2 in pixels")
        for name in _TYPES.keys() & vars(self).keys():
            values = np.asarray(getattr(self, name))
            if values.shape != (n,):
                raise QuantlensError(f"{n} boxes have {name} of shape {values.shape}; give one number for each")
            object.__setattr__(self, name, values.astype(_TYPES[name]))
        if n and self.image.min() < 0:
            raise QuantlensError(f"boxes: {self.image.min()} is no index of an image")
        for name in ("boxes", *({"scores", "area"} & vars(self).keys())):
            bad = np.unique(np.nonzero(~np.isfinite(getattr(self, name)))[0]).size
            if bad:
                raise QuantlensError(f"{bad} of {n} boxes have NaN or infinite {name}; look for where they come from")

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: Any) -> Self:
        """Only these rows: numbers, or whether each is kept."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[rows] for k, v in arrays.items() if isinstance(v, np.ndarray)})

    def select(self, images: Any) -> Self:
        """The rows of these images, which are then images 0, 1, …, in this order; one may come several times."""
        chosen = np.asarray(images, dtype=np.int64)
        order = np.argsort(self.image, kind="stable")
        first, last = (np.searchsorted(self.image[order], chosen, side) for side in ("left", "right"))
        counts = last - first
        found = self.take(order[spans(first, counts)])
        return replace(found, image=np.repeat(np.arange(len(chosen)), counts))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several, one after the other; image indices stay as they are."""
        names = [name for name, value in vars(parts[0]).items() if isinstance(value, np.ndarray)]
        return replace(parts[0], **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, eq=False)
class Detections(_Rows):
    """What a detector found: `scores` float64 [N] from 0 to 1, `labels` int64 [N], indices of classes."""

    scores: Array
    labels: Array


@dataclass(frozen=True, eq=False)
class Boxes(_Rows):
    """What annotations say: `labels` int64 [N], indices of classes; `crowd` bool [N], boxes around many objects, in
    which a detection is neither right nor wrong; `area` float64 [N] of the object in pixels (by default the box's).

    names: of the classes; ids: the numbers by which an annotation file calls them.
    """

    labels: Array
    crowd: Any = None
    area: Any = None
    names: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        unknown = self.area is None
        for name in ("crowd", "area"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.zeros(np.shape(self.image)))
        super().__post_init__()
        if unknown:
            object.__setattr__(self, "area", (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1))
