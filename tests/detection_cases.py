"""Made-up objects and detections of them, and COCO's own evaluation of both."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np

from quantlens.metrics import Boxes, Detections
from quantlens.metrics.detection import COCO


def make(seed: int, n: int = 12, classes: int = 4, *, crowd: bool = True, ties: bool = True) -> tuple[Any, Any]:
    """Detections near their objects, doubled, of other classes and of nothing; crowds, sizes of all kinds, equal
    scores, images without either, and a class that no object has."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(n), rng.integers(0, 8, n))
    corner, side = rng.uniform(0, 200, (len(image), 2)), np.exp(rng.uniform(1.4, 5.5, (len(image), 2)))
    area = side.prod(axis=1) * rng.uniform(0.5, 1, len(image))
    in_crowd = (rng.random(len(image)) < 0.15) & crowd
    boxes = Boxes(image, np.hstack([corner, corner + side]), rng.integers(0, classes, len(image)), in_crowd, area)
    of = np.repeat(np.arange(len(image)), rng.integers(0, 5, len(image)))
    near = boxes.boxes[of] + rng.normal(0, 0.08, (len(of), 4)) * np.tile(side[of], 2)
    more = np.repeat(np.arange(n), rng.integers(0, 10, n))
    far = rng.uniform(0, 200, (len(more), 2))
    found = np.vstack([near, np.hstack([far, far + rng.uniform(2, 100, far.shape)])])
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 0.5)
    right = rng.random(len(of)) < 0.9
    labels = np.where(right, boxes.labels[of], rng.integers(0, classes + 1, len(of)))
    labels = np.concatenate([labels, rng.integers(0, classes + 1, len(more))])
    order, scores = rng.permutation(len(found)), rng.random(len(found))
    scores = np.round(scores, 1) if ties else scores
    return Detections(np.concatenate([boxes.image[of], more]), found, scores, labels).take(order), boxes


def by_pycocotools(detections: Detections, boxes: Boxes, n: int) -> dict[str, float | None]:
    """COCO's twelve numbers, None where it says -1."""
    from pycocotools.coco import COCO as Index
    from pycocotools.cocoeval import COCOeval

    rows = []
    for some in (boxes, detections):
        side = some.boxes[:, 2:] - some.boxes[:, :2]
        rows.append([])
        for k in range(len(some)):
            row = {"id": k + 1, "image_id": int(some.image[k]), "category_id": int(some.labels[k]), "iscrowd": 0}
            row |= {"bbox": [*some.boxes[k, :2].tolist(), *side[k].tolist()], "area": float(side[k].prod())}
            rows[-1].append(row)
    for k, row in enumerate(rows[0]):
        row |= {"area": float(boxes.area[k]), "iscrowd": int(boxes.crowd[k])}
    for k, row in enumerate(rows[1]):
        row["score"] = float(detections.scores[k])
    indices = [Index(), Index()]
    with contextlib.redirect_stdout(io.StringIO()):
        for index, annotations in zip(indices, rows, strict=True):
            kinds = [{"id": k} for k in np.unique(boxes.labels).tolist()]
            index.dataset = {"images": [{"id": k} for k in range(n)], "categories": kinds, "annotations": annotations}
            index.createIndex()
        evaluation = COCOeval(*indices, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: v if v >= 0 else None for name, v in zip(COCO, evaluation.stats.tolist(), strict=True)}
