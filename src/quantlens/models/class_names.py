"""Names of a model's classes."""

from __future__ import annotations

from typing import Any

from quantlens.data.folders import WNID, imagenet_class_names
from quantlens.errors import StorageError


def class_names(images: Any, model: Any) -> list[str] | None:
    """Names of a model's classes: its own, those of its images, or ImageNet's for a thousand classes; None if nobody
    knows them. WordNet numbers, which say nothing to a reader, are no names."""
    count = int(model.num_classes)
    for holder in (model, images):
        names = getattr(holder, "class_names", None)
        if names is not None and len(names) == count and not all(WNID.fullmatch(str(n)) for n in names):
            return [str(n) for n in names]
    return imagenet_names(count)


def imagenet_names(count: int | None) -> list[str] | None:
    """ImageNet's names, where there are a thousand classes and timm's list of them is here; else None."""
    try:
        return list(imagenet_class_names()) if count == 1000 else None
    except StorageError:
        return None
