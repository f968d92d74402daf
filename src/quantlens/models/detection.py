"""Detectors: what their class scores and boxes mean, how pictures become their input, and both as detections in pixels
of the original pictures."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.boxes import Detections
from quantlens.data import Preprocess
from quantlens.errors import QuantlensError, QuantlensWarning, UnknownNameError, UnsupportedError

SCORINGS = ("softmax", "sigmoid")
RESIZES = ("square", "letterbox")


@dataclass(frozen=True)
class DetectionHead:
    """What a detector's outputs mean.

    scoring: "softmax", over classes and a last one "no object", one label per query (YOLOS, DETR); "sigmoid", of each
    class, the best (query, class) pairs (Deformable DETR, RT-DETR, D-FINE, RF-DETR). labels: names of the classes.
    resize: "square", a picture fills the input, its aspect ratio lost; "letterbox", it is centred in it, its aspect
    ratio kept. input_size: (height, width) of the input.
    """

    scoring: str
    labels: tuple[str, ...]
    resize: str = "square"
    input_size: tuple[int, int] = (640, 640)

    def __post_init__(self) -> None:
        for field, known in (("scoring", SCORINGS), ("resize", RESIZES)):
            if getattr(self, field) not in known:
                raise UnknownNameError(field, getattr(self, field), known)
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        object.__setattr__(self, "input_size", tuple(int(side) for side in self.input_size))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DetectionHead":
        """Inverse of :meth:`to_dict`."""
        return cls(**data)


def postprocess(
    logits: Any, boxes: Any, sizes: Any, head: DetectionHead, *, top: int = 100, first: int = 0
) -> Detections:
    """The ``top`` best detections of each image, best first, boxes in pixels of the original picture.

    logits [B, Q, C] (with "no object" as the last class where the scoring is a softmax), boxes [B, Q, 4] (centre x, y,
    width, height in fractions of the input), sizes [B, 2]: (height, width) of the pictures. first: index of the first
    image. Equal to ``post_process_object_detection(threshold=0)`` of Hugging Face's processors, which sort those of a
    softmax by query. Raises QuantlensError for shapes that do not belong together.
    """
    scored, placed = _wide(logits), _wide(boxes)
    sides = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    if scored.dim() != 3 or placed.shape != (*scored.shape[:2], 4) or len(sides) != len(scored):
        raise QuantlensError(
            f"class logits {list(scored.shape)}, boxes {list(placed.shape)} and {len(sides)} sizes of pictures do not "
            "belong together: [B, Q, C], [B, Q, 4] and B are needed"
        )
    if head.scoring == "softmax":
        scores, labels = scored.softmax(-1)[..., :-1].max(-1)
        scores, queries = scores.topk(min(top, scores.shape[1]), dim=1)
        labels = labels.gather(1, queries)
    else:
        scores, pairs = scored.sigmoid().flatten(1).topk(min(top, scored[0].numel()), dim=1)
        queries, labels = pairs // scored.shape[2], pairs % scored.shape[2]
    found = placed.gather(1, queries[..., None].expand(-1, -1, 4)).cpu().numpy()
    corners = np.concatenate([found[..., :2] - found[..., 2:] / 2, found[..., :2] + found[..., 2:] / 2], axis=-1)
    scale, offset = _to_pictures(sides, head)
    image = np.repeat(np.arange(len(scored), dtype=np.int64) + first, scores.shape[1])
    whole = corners * np.tile(scale, 2)[:, None] - np.tile(offset, 2)[:, None]
    return Detections(image, whole.reshape(-1, 4), scores.cpu().numpy().reshape(-1), labels.cpu().numpy().reshape(-1))


def _wide(values: Any) -> Tensor:
    return (values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))).detach().double()


def _to_pictures(sizes: np.ndarray, head: DetectionHead) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset) [B, 2] in x and y: fractions of the input · scale - offset = pixels of the picture."""
    if head.resize == "square":
        return sizes[:, ::-1], np.zeros_like(sizes)
    target = np.array(head.input_size, dtype=np.float64)
    resized = np.maximum(1, np.rint(sizes / (sizes / target).max(1, keepdims=True)))  # as Preprocess does in "border"
    scale = target * sizes / resized
    return scale[:, ::-1], ((target - resized) // 2 * sizes / resized)[:, ::-1]


# ---- what a model is -------------------------------------------------------------------------------------------------


NAMES = ("logits", "pred_logits", "pred_boxes")
"""Of a detector's outputs: its class logits by either of the first two, its boxes by the last."""


def scores_and_boxes(given: Any) -> tuple[Tensor, Tensor] | None:
    """The class logits [B, Q, C] and boxes [B, Q, 4] among what a module gives, by the names ``logits`` (or
    ``pred_logits``) and ``pred_boxes``, or as the first two of a tuple; None where there are none."""
    found: Sequence[Any] = ()
    if isinstance(given, Mapping) or hasattr(given, "pred_boxes"):
        named = given if isinstance(given, Mapping) else {name: getattr(given, name, None) for name in NAMES}
        found = [next((named[name] for name in NAMES[:2] if named.get(name) is not None), None), named.get(NAMES[2])]
    elif isinstance(given, tuple | list) and len(given) > 1:
        found = given[:2]
    if len(found) == 2 and all(isinstance(x, Tensor) and x.dim() == 3 for x in found):
        logits, boxes = found
        return (logits, boxes) if boxes.shape == (*logits.shape[:2], 4) else None
    return None


def head_of(model: Any, given: Any) -> DetectionHead:
    """What the outputs of a detector mean. model: a :class:`quantlens.models.Model`; given: what it gives for an image.

    The scoring is a softmax where there is one logit more than classes that have names; where none have, a warning says
    that it is taken for a sigmoid. Raises UnsupportedError for a model that gives no class logits and boxes, boxes in
    another form or cropped pictures, or that has other classes than are named.
    """
    found, preprocess = scores_and_boxes(given), model.preprocess
    if given is None:
        size = "×".join(map(str, preprocess.input_size[1:]))
        raise UnsupportedError(f"{model.name} does not take images of {size} pixels; give another input_size")
    if found is None:
        raise UnsupportedError(
            f"{model.name} is no detector that quantlens understands: it must give class logits [B, Q, C] and boxes "
            "[B, Q, 4], as 'logits' (or 'pred_logits') and 'pred_boxes' or as a tuple"
        )
    count, own = int(found[0].shape[2]), names_of(model.module)
    names = own or model.class_names
    if own is None:
        _check_form(found[1], model.name)
    if names is None:
        _tell_no_names(model.name, count)
    elif own is None and count - len(names) not in (0, 1):
        raise UnsupportedError(
            f"{model.name} gives {count} logits for each box and {len(names)} classes have names; give {count} names, "
            f"or {count - 1} where the last logit is 'no object'"
        )
    softmax = names is not None and count == len(names) + 1
    labels = list(names or ())[:count] + [str(i) for i in range(len(names or ()), count - softmax)]
    letterbox = preprocess.resize is None and preprocess.crop_mode == "border" and preprocess.crop_pct == 1
    if not letterbox and preprocess.resize != preprocess.input_size[1:]:
        raise UnsupportedError(
            f"{model.name} is a detector and its preprocessing crops pictures; give one that resizes to a square "
            "(quantlens.models.detection.square) or fits the whole picture in (letterbox)"
        )
    resize = "letterbox" if letterbox else "square"
    return DetectionHead("softmax" if softmax else "sigmoid", tuple(labels), resize, preprocess.input_size[1:])


def _check_form(boxes: Tensor, name: str) -> None:
    """Refuse boxes most of which cannot be fractions of the input (pixels, or before the sigmoid), and warn of those
    that look like corners: no right or lower edge before the other, and many that as centres reach out of the input."""
    x, y, width, height = boxes.detach().double().flatten(0, 1).T
    outside = (
        ((x - 0.5).abs() > 1.5) | ((y - 0.5).abs() > 1.5) | (width < 0) | (width > 3) | (height < 0) | (height > 3)
    )
    form = "(centre x, centre y, width, height as fractions of the input, from 0 to 1)"
    if outside.double().mean() > 0.5:
        first = ", ".join(f"{float(value):.3g}" for value in boxes[0, int(outside[: boxes.shape[1]].double().argmax())])
        raise UnsupportedError(
            f"{name} gives boxes such as ({first}), which are not what a detector must give {form}; convert them in "
            "its forward: pixels are divided by the input's size, logits go through a sigmoid"
        )
    reach = (
        (x + width / 2 > 1.05) | (y + height / 2 > 1.05) | (x < width / 2 - 0.05) | (y < height / 2 - 0.05)
    ).double()
    if len(x) > 3 and bool(((width >= x) & (height >= y)).all()) and reach.mean() > 0.2:
        warnings.warn(
            f"the boxes of {name} look like corners (x1, y1, x2, y2); a detector must give {form}, so convert them in "
            "its forward if they are",
            QuantlensWarning,
            stacklevel=2,
        )


def _tell_no_names(name: str, count: int) -> None:
    text = (
        f"the classes of {name} have no names: its {count} logits are taken for sigmoids of {count} classes; where the "
        f"last one is 'no object', name the {count - 1} classes (class_names=)"
    )
    warnings.warn(text, QuantlensWarning, stacklevel=2)


def names_of(module: Any) -> list[str] | None:
    """The classes of a detector of Hugging Face by its ``id2label``, in order; None for another model."""
    labels = getattr(getattr(module, "config", None), "id2label", None)
    if not labels:
        return None
    known = {int(key): str(name) for key, name in labels.items()}
    return [known.get(i, "N/A") for i in range(max(known) + 1)]


def square(preprocess: Preprocess) -> Preprocess:
    """The same, resizing pictures to the input's height and width, whatever their aspect ratio."""
    return replace(preprocess, resize=preprocess.input_size[1:], crop_mode="center", crop_pct=1.0)


def letterbox(preprocess: Preprocess, name: str = "the model", task: str | None = "detect") -> Preprocess:
    """The same, resizing pictures so that they fit whole, with the mean colour around them. Raises UnsupportedError for
    a model (of this name) that is no detector."""
    if task != "detect":
        raise UnsupportedError(f"a letterbox is for detectors, and {name} has the task {task!r}; leave it out")
    return replace(preprocess, resize=None, crop_mode="border", crop_pct=1.0)
