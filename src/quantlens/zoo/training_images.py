"""The images that a recipe learns from: some classes of a set, or a share of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from quantlens.data import ImageSet, Preprocess, load_images
from quantlens.errors import QuantlensError
from quantlens.zoo.recipes import Images, Recipe


def of_classes(images: ImageSet, classes: Sequence[str | int] | None) -> ImageSet:
    """The images of these classes (names, or numbers), whose labels count them in this order; None: all. Raises
    QuantlensError for images without labels and a class that is not there."""
    if images.labels is None or images.labels.ndim != 1:
        raise QuantlensError(
            f"{images.source} has not one label for each image, and a classifier learns one; use others"
        )
    known = images.class_names or [str(label) for label in range(int(images.labels.max()) + 1)]
    if classes is None:
        return replace(images, class_names=known)
    wanted = [str(name) for name in classes]
    lacking = next((name for name in wanted if name not in known), None)
    if lacking is not None or len({*wanted}) < len(wanted):
        what = f"has no class {lacking!r}" if lacking is not None else "is asked for a class twice"
        raise QuantlensError(f"{images.source} {what}; its classes are {', '.join(known[:20])}")
    place = np.full(len(known), -1)
    place[[known.index(name) for name in wanted]] = np.arange(len(wanted))
    labels = place[images.labels]
    rows = np.flatnonzero(labels >= 0)
    return replace(images.select(rows), labels=labels[rows], class_names=wanted)


def chosen(given: Images, source: str, preprocess: Preprocess, seed: int, cache_dir: Any = None) -> ImageSet:
    """The images of the SOURCE `source` that `given` asks for; seed: of the draw of a share."""
    images = of_classes(load_images(source, preprocess, cache_dir=cache_dir), given.classes)
    if given.share == 1:
        return images
    assert images.labels is not None
    shuffled = np.random.default_rng([seed, 1]).permutation(len(images))
    labels = images.labels[shuffled]
    order = np.argsort(labels, kind="stable")  # by class, shuffled within
    counts = np.bincount(labels)
    within = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = within < np.maximum(1, np.round(counts * given.share))[labels[order]]
    return images.select(np.sort(shuffled[order][kept]))


def training_images(given: Images, recipe: Recipe, cache_dir: Any = None) -> ImageSet:
    """The images that a recipe's phase learns from. Raises QuantlensError where they are fewer than a batch."""
    images = chosen(given, recipe.source(given), recipe.preprocess, recipe.seed, cache_dir)
    if len(images) < recipe.batch_size:
        raise QuantlensError(
            f"{given.source} gives {len(images)} images, and batch_size is {recipe.batch_size}; make batches smaller"
        )
    return images
