"""What a detector finds in pictures: labels, scores, and boxes in pixels of the picture."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from quantlens.data import as_rgb, decode_image
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.evaluation.detection import head_of
from quantlens.evaluation.open_models import measurable
from quantlens.models.detection import postprocess


class Found(NamedTuple):
    """One object: the name of its class, the score from 0 to 1, and x1, y1, x2, y2 in pixels of the picture."""

    label: str
    score: float
    box: tuple[float, float, float, float]


@torch.inference_mode()
def find_objects(model: Any, pictures: Sequence[Any], *, threshold: float = 0.5) -> list[list[Found]]:
    """The objects of each picture with a score of at least the threshold, the surest first.

    model: a detector, or the name or file of one (:func:`~quantlens.evaluation.open_models.measurable`). pictures:
    paths or PIL images, which are run as one batch. Raises UnsupportedError for a model that gives no boxes,
    BadImageError for a file that is no picture.
    """
    if not 0 <= threshold <= 1:
        raise QuantlensError(f"the threshold is {threshold}; scores are from 0 to 1")
    model = measurable(model)
    head = head_of(model)
    shown = [as_rgb(one) if isinstance(one, Image.Image) else decode_image(one) for one in pictures]
    if not shown:
        return []
    pixels = np.stack([model.preprocess.resize_crop(one) for one in shown])
    given = model.outputs(model.preprocess.normalize(pixels).to(getattr(model, "device", "cpu")))
    if given.boxes is None:
        raise UnsupportedError(f"{model.name} ({model.method}) gives no boxes; its task is not 'detect'")
    found = postprocess(given.logits, given.boxes, [(one.height, one.width) for one in shown], head)
    found = found.take(found.scores >= threshold)
    objects: list[list[Found]] = [[] for _ in shown]
    rows = (found.image, found.labels, found.scores, found.boxes)
    for image, label, score, box in zip(*(column.tolist() for column in rows), strict=True):
        objects[image].append(Found(head.labels[label], score, tuple(box)))
    return objects
