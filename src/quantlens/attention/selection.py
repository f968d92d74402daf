"""Some images of a set: which, ready for a model or for a picture, and the names of their classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from quantlens.attention import pictures


def evenly(count: int, wanted: int) -> list[int]:
    """``wanted`` evenly spaced positions among ``count`` (all, where there are fewer), the first among them."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def chosen(images: Any, positions: list[int]) -> Tensor:
    """Some images of an :class:`~quantlens.data.ImageSet`, ready for the model: float32 [n, 3, H, W]."""
    if images.values is not None:
        return images.values[positions]
    return images.preprocess.normalize(np.ascontiguousarray(images.pixels[positions]))


def photograph(images: Any, position: int, preprocess: Any = None) -> Any:
    """One image of a set as a PIL image. preprocess: whose normalisation is undone where the set itself has none."""
    if images.pixels is not None:
        return pictures.picture(images.pixels[position])
    return pictures.picture(images.values[position].numpy(), images.preprocess or preprocess)


def name_of(names: list[str] | None, index: int) -> str | None:
    """The first of a class's names: "tench" of "tench, Tinca tinca"."""
    return None if names is None else names[index].split(",")[0]
