"""Image sets for an evaluation: opened once, checked against the model's classes and against each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlens.errors import QuantlensError

ImageProgress = Callable[[str, int, int], None]
"""Called with what is done ("decoding textures"), the number of images done, and the number in all."""


def image_set(
    value: Any,
    preprocess: Any,
    name: str,
    *,
    cache_dir: Any = None,
    skip_bad: bool = False,
    progress: ImageProgress | None = None,
) -> Any:
    """An `ImageSet` of anything that `data.as_image_set` accepts. Its decoding is reported under `name`."""
    from quantlens.data import as_image_set

    return as_image_set(
        value,
        preprocess,
        name,
        cache_dir=cache_dir,
        skip_bad=skip_bad,
        progress=None if progress is None else lambda done, total: progress(f"decoding {name}", done, total),
    )


@dataclass(frozen=True)
class EvaluationImages:
    """The images of one evaluation, opened and checked: ID images with their labels [N], OOD sets with their groups
    ("far" or "near"), and the images that scores are fitted on, or None."""

    id: Any
    labels: np.ndarray
    ood: dict[str, Any]
    fit: Any
    groups: dict[str, str]

    @classmethod
    def open(
        cls,
        model: Any,
        id: Any,
        ood: Mapping[str, Any] | None,
        fit: Any,
        groups: Mapping[str, str] | None,
        **reading: Any,
    ) -> EvaluationImages:
        """Raises QuantlensError for an empty set, labels that do not match, or a fit set among those evaluated."""

        def opened(value: Any, name: str) -> Any:
            images = image_set(value, model.preprocess, name, **reading)
            if len(images) == 0:
                raise QuantlensError(f"there are no images in {name} ({source_name(images)})")
            return images

        id_images = opened(id, "the ID set")
        labels = check_labels(id_images, int(model.num_classes), str(model.name))
        ood_images = {str(name): opened(value, f"OOD set {name}") for name, value in (ood or {}).items()}
        fit_images = None if fit is None else opened(fit, "the fit set")
        if fit_images is not None:
            refuse_overlap(fit_images, "the fit set", id_images, "the ID set")
            for name, images in ood_images.items():
                refuse_overlap(fit_images, "the fit set", images, f"OOD set {name}")
        return cls(id_images, labels, ood_images, fit_images, groups_of(ood_images, groups))


def is_source(value: Any) -> bool:
    """Whether a value is an opened Source: it can tell its spec and fingerprint, but has no pixels."""
    return hasattr(value, "spec") and callable(getattr(value, "fingerprint", None)) and not hasattr(value, "batches")


def describe(images: Any) -> dict[str, Any]:
    """{"source", "fingerprint", "n", "skipped"} of an image set."""
    return {
        "source": source_name(images),
        "fingerprint": fingerprint(images),
        "n": len(images),
        "skipped": len(getattr(images, "skipped", None) or ()),
    }


def source_name(images: Any) -> str:
    """The SOURCE of an image set or Source; for tensors the name they were given."""
    return str(images.spec) if is_source(images) else str(images.source)


def fingerprint(images: Any) -> str:
    """The short hash of an image set or Source."""
    value = images.fingerprint
    return str(value() if callable(value) else value)


# ---- labels ----------------------------------------------------------------------------------------------------------


def check_labels(images: Any, num_classes: int, model_name: str, what: str = "the ID set") -> np.ndarray:
    """int64 [N] labels of a set, after checking that they can be the model's classes."""
    name = source_name(images)
    labels = images.labels
    if labels is None:
        raise QuantlensError(
            f"{what} {name} has no labels, so accuracy cannot be measured; give a source with labels "
            "(imagenet:DIR, imagefolder:DIR) or a pair (images, labels)"
        )
    labels = np.asarray(labels, dtype=np.int64)
    names = getattr(images, "class_names", None)
    if names is not None and len(names) != num_classes:
        raise QuantlensError(
            f"the labels of {what} {name} do not match the classes of {model_name}: the set has {len(names)} classes, "
            f"the model {num_classes}; give images labelled with the model's classes (imagenet:DIR for ImageNet models)"
        )
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise QuantlensError(
            f"the labels of {what} {name} do not match the classes of {model_name}: they run from {labels.min()} to "
            f"{labels.max()}, the model's from 0 to {num_classes - 1}"
        )
    return labels


# ---- overlap ---------------------------------------------------------------------------------------------------------


def shared(first: Any, second: Any) -> int:
    """How many images two sets (or Sources) have in common, as far as their files or names tell."""
    if fingerprint(first) == fingerprint(second):
        return len(second)
    return len(_identities(first) & _identities(second))


def refuse_overlap(first: Any, first_what: str, second: Any, second_what: str) -> None:
    """Raise when images that are learnt from are among the images that are evaluated."""
    count = shared(first, second)
    if count:
        raise QuantlensError(
            f"{first_what} ({source_name(first)}) and {second_what} ({source_name(second)}) share {count} images; "
            "metrics measured so would flatter: take other images, for example with a slice SOURCE[a:b]"
        )


FILE_KINDS = ("imagenet", "imagefolder", "images")


def _identities(images: Any) -> set[str]:
    """One string per image that two sets give alike exactly when they hold the same image: its real path, or for images
    that are no files of their own the place of the collection and the image's name in it. Empty for tensors."""
    from quantlens.data.sources import parse_spec

    try:
        spec = parse_spec(source_name(images))
    except QuantlensError:
        return set()
    if spec.kind == "embedded":  # names are unique across the embedded sets, and some sets are part of others
        return {f"embedded/{name}" for name in images.names}
    if spec.kind in FILE_KINDS:
        return _real(os.path.join(spec.path, name) for name in images.names)
    place = os.path.realpath(spec.path)
    return {f"{spec.kind}:{place}:{spec.options}:{name}" for name in images.names}


def _real(paths: Iterable[Any]) -> set[str]:
    """Real paths; a directory is resolved once, not once per file."""
    directories: dict[str, str] = {}
    real = set()
    for path in map(str, paths):
        head, tail = os.path.split(path)
        if head not in directories:
            directories[head] = os.path.realpath(head)
        real.add(os.path.join(directories[head], tail))
    return real


def groups_of(sets: Mapping[str, Any], groups: Mapping[str, str] | None) -> dict[str, str]:
    """Set name -> "far" or "near": as given, else as the set itself says (embedded ones do), else far."""
    from quantlens.errors import UnknownNameError

    given = dict(groups or {})
    for name, group in given.items():
        if name not in sets:
            raise UnknownNameError("OOD set", name, sets, hint="a group is given to one of the sets evaluated")
        if group not in ("far", "near"):
            raise QuantlensError(f"the group of OOD set {name!r} is {group!r}; write 'far' or 'near'")
    return {name: given.get(name) or getattr(images, "group", None) or "far" for name, images in sets.items()}
