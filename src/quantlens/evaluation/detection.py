"""Detectors: run over images, their boxes put into pixels of the original pictures, and measured against annotations
and against the float model's own boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.boxes import Array, Boxes, Detections
from quantlens.data.sources import FINGERPRINT_DIGITS, sha256_of
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.evaluation import outputs
from quantlens.evaluation.images import EvaluationImages
from quantlens.evaluation.run import Run
from quantlens.metrics import box_drift, detection_metrics
from quantlens.metrics.detection import overall
from quantlens.models.detection import DetectionHead, postprocess

OTHER_NAMES = {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv"}
"""Names of Pascal VOC that models trained on COCO go by, and COCO's."""


class DetectionRun(Run):
    """The passes over the images of an evaluation of detectors."""

    @torch.inference_mode()
    def run(self, model: Any, images: Any, what: str) -> tuple[np.ndarray, Any]:
        """The log-odds of every class [N, C] (see `class_logits`), and the detections, where sizes of the pictures are
        known."""
        head, logits, found = head_of(model), [], []
        for place, pixels in self.batches(model, images, what):
            given = model.outputs(pixels)
            if getattr(given, "boxes", None) is None:
                raise UnsupportedError(f"{model.name} ({model.method}) gives no boxes; its task is not 'detect'")
            logits.append(class_logits(given.logits, head).float().cpu().numpy())
            if images.boxes is not None and images.sizes is not None:
                check_finite(model, given, head, images, place.start, what)
                sizes = images.sizes[place]
                found.append(postprocess(given.logits, given.boxes, sizes, head, first=place.start))
        return np.concatenate(logits), narrow(Detections.joined(found)) if found else None

    def of_ids(
        self, model: Any, sets: EvaluationImages, logits: Any, features: Any, data: Any, keep: bool | str
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        head = head_of(model)
        truth, listed = of_classes(sets.id, head)
        found = features.take(np.isin(features.labels, listed))
        self.found.append(found)
        metrics = detection_metrics(found, truth, len(sets.id), n_bins=self.n_bins, names=head.labels)
        kept = {"labels": np.full(len(sets.id), -1), "detections": found, "truth": truth} if keep else {}
        return {"num_classes": len(head.labels), **metrics}, kept, {}

    def fit_data(self, *_: Any) -> None:
        """No score of detectors is fitted."""


DRIFT = ("matched_iou", "lost", "invented", "score_drift")


def compare_detections(result: Any, found: Sequence[Detections]) -> None:
    """Add how far a quantized model's boxes are from the FP32 model's on the same images, where both were run."""
    if result.method == "fp32":
        return
    if len(found) < 2:
        reason = "is taken to the FP32 model's detections: give the FP32 model as `reference`, not its Result"
        result.metrics_unavailable |= dict.fromkeys(DRIFT, reason)
        return
    drift = box_drift(found[0], found[1], result.id["n"])
    result.id |= {name: overall(ratio) for name, ratio in drift.items()}
    if result.outputs is not None:
        result.outputs.drift.update(drift)


def compare_kept(result: Any, kept: bytes, reference: Path) -> bytes:
    """The same of per-image outputs: `kept` of a result, and the file of those of its FP32 model. Gives those of the
    result with the drift of each image, and as they are where those of the FP32 model were not kept."""
    if not reference.is_file():
        return kept
    result.outputs = outputs.read(kept)
    found = [one.detections for one in (result.outputs, outputs.read(reference)) if one.detections is not None]
    compare_detections(result, found)
    result.metrics_unavailable = {k: v for k, v in result.metrics_unavailable.items() if k not in DRIFT}
    return outputs.pack(result.outputs)


def head_of(model: Any) -> DetectionHead:
    """What the outputs of a detector mean. Raises UnsupportedError for a model that does not say it."""
    head = getattr(model, "detection_head", None)
    if head is None:
        raise UnsupportedError(f"{model.name} ({model.method}) does not say what its scores and boxes mean")
    return head  # type: ignore[no-any-return]


def class_logits(logits: Tensor, head: DetectionHead) -> Tensor:
    """The log-odds p / (1 - p) of the surest detection of every class [B, C], of class logits [B, Q, C] (with "no
    object" behind them, of a softmax): a detector as a classifier of several labels, for OOD scores."""
    if head.scoring == "sigmoid":
        return logits.double().amax(1)
    log_p = logits.double().log_softmax(-1)[..., :-1].amax(1)
    return log_p - torch.log(-torch.expm1(log_p.clamp(max=-torch.finfo(torch.float64).eps)))


def narrow(found: Detections) -> Detections:
    """Boxes and scores as float32 has them, which is how they are kept."""
    return replace(found, boxes=found.boxes.astype(np.float32), scores=found.scores.astype(np.float32))


def check_finite(model: Any, given: Any, head: DetectionHead, images: Any, first: int, what: str) -> None:
    """Raises QuantlensError for boxes, or class logits without probabilities: NaN, or infinite before a softmax."""
    scores = given.logits.isnan() if head.scoring == "sigmoid" else given.logits.isnan() | given.logits.isposinf()
    for name, wrong in (("boxes", ~given.boxes.isfinite()), ("class logits", scores)):
        bad = wrong.flatten(1).any(1).nonzero()
        if not len(bad):
            continue
        raise QuantlensError(
            f"{model.name} ({model.method}, {model.bits}) gives {name} that are not finite on images of {what} "
            f"({images.source}), first on {images.names[first + int(bad[0])]}; check the weights for NaN, or use "
            "another method or more bits"
        )


# ---- what is to be found ---------------------------------------------------------------------------------------------


def with_boxes(images: Any, model: Any) -> Any:
    """An image set that a detector can be measured on: with boxes of the model's classes, and a fingerprint that tells
    its boxes too. Raises QuantlensError for one without."""
    if images.boxes is None or images.sizes is None:
        raise QuantlensError(
            f"{images.source} has no boxes, and the metrics of task 'detect' need them; use a source that has, such as "
            "coco:DIR"
        )
    if images.boxes.crowd.all():
        raise QuantlensError(f"{images.source} has no object in {len(images)} images to be found; use other images")
    of_classes(images, head_of(model))
    boxes: Boxes = images.boxes
    columns = (boxes.image, boxes.labels, boxes.crowd, boxes.area, *boxes.boxes.T)
    lines = zip(*(column.tolist() for column in columns), strict=True)
    return replace(images, fingerprint=sha256_of([images.fingerprint, *lines])[:FINGERPRINT_DIGITS])


def of_classes(images: Any, head: DetectionHead) -> tuple[Boxes, Array]:
    """The boxes with the model's numbers of classes, and which of these the annotations tell of: a detection of another
    class is neither right nor wrong.

    Classes are matched by name, whatever its case and spaces; those of a model without names by the number that the
    annotations give them, or by their order where there are as many. Raises QuantlensError for boxes of other classes.
    """
    boxes: Boxes = images.boxes
    count = len(head.labels)
    known: Mapping[str, int] = {letters(label): k for k, label in reversed(list(enumerate(head.labels)))}
    places = np.array([known.get(letters(name), -1) for name in boxes.names], dtype=np.int64)
    if not boxes.names:
        places = np.arange(count)
    elif (places < 0).all() and all(name.removeprefix("label").isdigit() for name in known):
        ids = (
            np.arange(count)
            if len(boxes.ids) == count
            else np.array([i if isinstance(i, int) else -1 for i in boxes.ids])
        )
        places = np.where(ids < count, ids, -1)
    within = boxes.labels < len(places)
    unknown = np.unique(boxes.labels[~within | (places[np.where(within, boxes.labels, 0)] < 0)])
    if len(unknown):
        names = [repr(boxes.names[k]) if boxes.names else str(k) for k in unknown[:3]]
        raise QuantlensError(
            f"{images.source} has boxes of {len(unknown)} classes that are none of the model's {count}: "
            f"{', '.join(names)}{' …' if len(unknown) > 3 else ''}; use annotations of the model's classes"
        )
    return replace(boxes, labels=places[boxes.labels], names=(), ids=()), places[places >= 0]


def letters(name: str) -> str:
    """A name of a class without case, spaces and signs, as COCO writes it."""
    plain = "".join(c for c in str(name).lower() if c.isalnum())
    return OTHER_NAMES.get(plain, plain)
