"""How well a detector finds objects, how far its confidence can be trusted, and what quantization does to its boxes.

Detections and boxes are flat arrays over all images (`quantlens.boxes`). Metrics are fractions, not percent. Every one
of them but COCO's own numbers is computed for counts that say how often each image was drawn, so that the bootstrap and
the metric are one computation.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from quantlens.boxes import Array, Boxes, Detections
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.metrics.classification import equal_width_bins, reliability
from quantlens.metrics.matching import AREAS, Matches, iou, match, near_pairs, partners

__all__ = [
    "Boxes",
    "Detections",
    "box_drift",
    "coco_metrics",
    "detection_calibration_error",
    "detection_metrics",
    "resampled_detections",
]

CONFIDENT = 0.3
"""Detections with a larger score are those that a person sees: of calibration errors and of drift."""
SAME = 0.5
"""IoU from which two boxes are of one object, in calibration errors and drift."""
RECALLS = np.linspace(0.0, 1.0, 101)

COCO = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)
"""COCO's twelve numbers in its order. map: average precision, mean over classes and IoU 0.50, 0.55, …, 0.95; map50,
map75: at one IoU; mar_k: recall with k detections per image and class, mean over the same."""

Ratio = tuple[Array, Array]
"""Numerator and denominator [N] by image of a metric that is the quotient of their sums."""


# ---- COCO's numbers --------------------------------------------------------------------------------------------------


def coco_metrics(detections: Detections, boxes: Boxes, n_images: int) -> dict[str, float | None]:
    """COCO's twelve numbers, by faster-coco-eval; None where no object is of the size that one is about. Raises
    UnsupportedError where the library is not installed."""
    try:
        from faster_coco_eval import COCO as Index, COCOeval_faster
    except ImportError as error:
        raise UnsupportedError(
            "mAP needs faster-coco-eval: run `pip install 'quantlens[detection]'`, or measure without boxes"
        ) from error
    common = {
        "images": [{"id": k} for k in range(n_images)],
        "categories": [{"id": k, "name": str(k)} for k in np.unique(boxes.labels).tolist()],
    }
    known = detections.take(np.isin(detections.labels, boxes.labels))
    if not len(known):
        areas = [name for name, (low, high) in AREAS.items() if _counted(boxes, low, high).any()]
        return {name: 0.0 if _area_of(name) in areas else None for name in COCO}
    objects = _rows(boxes, area=boxes.area, iscrowd=boxes.crowd.astype(int))
    found = _rows(known, area=(known.boxes[:, 2:] - known.boxes[:, :2]).prod(axis=1), score=known.scores)
    indices = [Index({**common, "annotations": rows}) for rows in (objects, found)]
    evaluation = COCOeval_faster(*indices, "bbox", print_function=lambda *text: None)
    evaluation.run()
    values = [float(value) for value in evaluation.stats[: len(COCO)]]
    return {name: value if value >= 0 else None for name, value in zip(COCO, values, strict=True)}


def _rows(boxes: Detections | Boxes, **more: Array) -> list[dict[str, Any]]:
    """Boxes as rows of an annotation file."""
    sides = np.hstack([boxes.boxes[:, :2], boxes.boxes[:, 2:] - boxes.boxes[:, :2]])
    columns = {"image_id": boxes.image, "category_id": boxes.labels, "bbox": sides, **more}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"id": k, **dict(zip(columns, row, strict=True))} for k, row in enumerate(rows, start=1)]


def _counted(boxes: Boxes, low: float, high: float) -> Array:
    return np.asarray(~boxes.crowd & (boxes.area >= low) & (boxes.area <= high))


def _area_of(name: str) -> str:
    """The size of objects that one of COCO's numbers is about."""
    size = name.partition("_")[2]
    return size if size in AREAS else "all"


# ---- average precision and recall under resampling -------------------------------------------------------------------


def average_precisions(matches: Matches, drawn: Array, threshold: int, area: int) -> dict[int, Array]:
    """Class -> average precision [R] at one threshold for objects of one size, for counts drawn [N, R]; NaN where no
    object of the class was drawn.

    As COCO has it: the mean over recalls 0, 0.01, …, 1 of the largest precision at that recall or a higher one. Ranks
    of detections are those of the whole set, so that each resample costs two running sums over the true detections.
    """
    hit, counts = matches.hit[:, threshold, area], matches.counted[:, area]
    wrong = ~hit & ~matches.ignored[:, threshold, area]
    found = {}
    for label in np.unique(matches.object_labels[counts]).tolist():
        of = matches.object_image[counts & (matches.object_labels == label)]
        positives = drawn[of].sum(axis=0, dtype=np.float64)
        rows = np.flatnonzero(matches.labels == label)
        rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
        true, false = np.flatnonzero(hit[rows]), np.flatnonzero(wrong[rows])
        images, right = matches.image[rows], np.cumsum(drawn[matches.image[rows[true]]], axis=0, dtype=np.float64)
        before = np.searchsorted(true, false)
        missed = np.cumsum(_sums(before, images[false], len(true), drawn), axis=0, dtype=np.float64)
        precision = right / (right + missed + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            reached = _recalls_reached(right / positives)
        steps = np.diff(reached, axis=0, prepend=0)
        found[label] = np.where(positives > 0, np.einsum("pr,pr->r", precision, steps) / len(RECALLS), np.nan)
    return found


def _sums(rows: Array, images: Array, count: int, drawn: Array) -> Array:
    """[count, R]: how many images were drawn for each row, row `count` and above left out."""
    from scipy.sparse import csr_matrix

    kept = rows < count
    ones = np.ones(np.count_nonzero(kept))
    return np.asarray(csr_matrix((ones, (rows[kept], images[kept])), shape=(count, len(drawn))) @ drawn)


def _recalls_reached(recall: Array) -> Array:
    """How many of RECALLS are at most each recall; 0 where it is NaN."""
    guess = np.floor(np.nan_to_num(recall) * 100).astype(np.int64).clip(0, 100)
    guess += (guess < 100) & (RECALLS[np.minimum(guess + 1, 100)] <= recall)
    guess -= RECALLS[guess] > recall
    return np.where(np.isnan(recall), 0, guess + 1)


def _mean_recall(matches: Matches, drawn: Array, area: int, most: int) -> Array:
    """Share of the objects that are found by the `most` best detections of an image and class, mean over classes and
    thresholds [R]."""
    counts = matches.counted[:, area]
    labels, place = np.unique(matches.object_labels[counts], return_inverse=True)
    positives = _sums(place, matches.object_image[counts], len(labels), drawn)
    kept = np.flatnonzero((matches.rank < most) & np.isin(matches.labels, labels))
    hit = matches.hit[kept, :, area]
    of = np.searchsorted(labels, matches.labels[kept])
    rows, t = np.nonzero(hit)
    right = _sums(of[rows] * hit.shape[1] + t, matches.image[kept[rows]], len(labels) * hit.shape[1], drawn)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = right.reshape(len(labels), hit.shape[1], drawn.shape[1]) / positives[:, None]
    return _mean_known(recall.reshape(-1, drawn.shape[1]))


def _mean_known(values: Array) -> Array:
    """The mean of the rows of [K, R] that are numbers; NaN where none is."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def resampled_detections(
    matches: Matches,
    drawn: Array,
    *,
    n_bins: int,
    wanted: Collection[str],
    ratios: Mapping[str, Ratio] | None = None,
) -> dict[str, Array]:
    """{metric: [R]} for counts drawn [N, R] that say how often each image was drawn. ratios: of `box_drift` and
    `object_calibration`.

    Detections are matched within their image, so that the matches of an image are the same in every resample: they are
    made once, and a resample only weighs them. An image drawn twice counts twice, as two images with equal scores.
    """
    found: dict[str, Array] = {}
    precisions = cache(partial(average_precisions, matches, drawn))
    at = {"map50": [0], "map75": [5]}
    for name in [name for name in COCO if name in wanted]:
        area = list(AREAS).index(_area_of(name))
        if name.startswith("map"):
            every = [values for t in at.get(name, range(10)) for values in precisions(t, area).values()]
            found[name] = _mean_known(np.array(every).reshape(len(every), drawn.shape[1]))
        else:
            most = name.partition("_")[2]
            found[name] = _mean_recall(matches, drawn, area, int(most) if most.isdigit() else 100)
    if "d_ece" in wanted:
        scores, correct, image = _judged(matches)
        rows = equal_width_bins(scores, n_bins)
        weights = np.bincount(rows * len(drawn) + image, correct - scores, n_bins * len(drawn)).reshape(n_bins, -1)
        total = np.bincount(image, minlength=len(drawn)) @ drawn
        found["d_ece"] = _quotient(np.abs(weights @ drawn).sum(axis=0), total)
    for name, (top, bottom) in (ratios or {}).items():
        if name in wanted:
            found[name] = _quotient(top @ drawn, bottom @ drawn)
    return found


def _quotient(top: Array, bottom: Array) -> Array:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)


def overall(ratio: Ratio) -> float | None:
    """The metric of all images once; None where the denominator is 0."""
    top, bottom = (float(part.sum()) for part in ratio)
    return top / bottom if bottom else None


# ---- calibration -----------------------------------------------------------------------------------------------------


def _judged(matches: Matches) -> tuple[Array, Array, Array]:
    """(score, whether it is an object, image) of the confident detections; those in a crowd are left out."""
    rows = np.flatnonzero((matches.scores > CONFIDENT) & ~matches.ignored[:, 0, 0])
    return matches.scores[rows], matches.hit[rows, 0, 0].astype(np.float64), matches.image[rows]


def detection_calibration_error(
    scores: Any,
    correct: Any,
    *,
    n_bins: int = 15,
    boxes: Any = None,
    sizes: Any = None,
    box_bins: int = 5,
    least: int = 1,
) -> float | None:
    """D-ECE: sum over bins of n_b / N · |precision_b - mean confidence_b|; None without detections.

    scores [N] from 0 to 1, correct [N] 0 or 1. Bins are equally wide in the score; with `boxes` [N, 4] (x1, y1, x2, y2)
    and `sizes` [N, 2] (height, width) of their pictures also in the centre, width and height of the box as fractions of
    the picture, `box_bins` in each. least: detections of a bin that counts (8 in the paper, with boxes).

    Küppers, Kronenberger, Shantia and Haselhoff, Multivariate Confidence Calibration for Object Detection, CVPR
    Workshops 2020.
    """
    c, hit = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if c.ndim != 1 or c.shape != hit.shape or (c.size and not (c.min() >= 0 and c.max() <= 1)):
        raise QuantlensError(f"D-ECE needs scores in 0..1, one for each of {hit.size} flags: shape {c.shape} is given")
    bins = equal_width_bins(c, n_bins)
    if boxes is not None:
        corners, sides = np.asarray(boxes, dtype=np.float64), np.asarray(sizes, dtype=np.float64)[:, ::-1]
        low, high = corners[:, :2] / sides, corners[:, 2:] / sides
        parts = np.clip(np.hstack([(low + high) / 2, high - low]), 0.0, 1.0)
        places = [bins, *(equal_width_bins(part, box_bins) for part in parts.T)]
        bins = np.unique(np.ravel_multi_index(tuple(places), (n_bins, *[box_bins] * 4)), return_inverse=True)[1]
    gaps, counts = np.bincount(bins, hit - c), np.bincount(bins)
    kept = counts >= least
    return float(np.abs(gaps[kept]).sum() / counts[kept].sum()) if counts[kept].sum() else None


def object_calibration(detections: Detections, boxes: Boxes, n_images: int) -> Ratio:
    """Object-level calibration error by image: the sums over its objects, and how many it has.

    Of an object at an IoU: the confident detections that overlap it (of any class) vote, their mean score p is the
    confidence in the class that most of them have; its error is the Brier score 2 (1 - p)² where that is its class,
    2 p² where it is not, 1 where nothing overlaps it. Mean over IoU 0.5 and 0.75.

    Park, Sobolewski and Azizan, Uncertainty Quantification in Detection Transformers, IEEE TPAMI, with scores of one
    class each, as their package `uq-detr` has it. Crowds are left out.
    """
    sure, objects = detections.take(detections.scores > CONFIDENT), boxes.take(~boxes.crowd)
    pairs = near_pairs(objects, sure, (objects.image, sure.image), np.zeros(len(sure), dtype=bool), SAME)
    thing, found, overlap = pairs
    width = int(max(sure.labels.max(initial=0), objects.labels.max(initial=0))) + 1
    errors = np.zeros(len(objects))
    for threshold in (0.5, 0.75):
        near = overlap >= threshold
        rows, votes = thing[near], sure.labels[found[near]]
        p = np.bincount(rows, sure.scores[found[near]], len(objects)) / np.maximum(
            np.bincount(rows, minlength=len(objects)), 1
        )
        cast, count = np.unique(rows * width + votes, return_counts=True)
        order = np.lexsort((-cast, count))  # of equal counts the first class comes last
        chosen = np.full(len(objects), -1)
        chosen[cast[order] // width] = cast[order] % width
        error = np.where(chosen == objects.labels, 2 * (1 - p) ** 2, 2 * p**2)
        errors += np.where(chosen < 0, 1.0, error) / 2
    return np.bincount(objects.image, errors, n_images), np.bincount(objects.image, minlength=n_images).astype(float)


# ---- what quantization does to boxes ---------------------------------------------------------------------------------


def box_drift(quantized: Detections, reference: Detections, n_images: int) -> dict[str, Ratio]:
    """How the confident detections of a quantized model differ from the float model's on the same images.

    Both are those with a score above `CONFIDENT`, matched by class at IoU `SAME` as COCO matches. By image, and as a
    quotient of sums: `matched_iou`, the mean IoU of matched boxes; `lost`, the share of the float model's detections
    that the quantized one has not; `invented`, the share of the quantized one's that the float model has not;
    `score_drift`, the mean change of the score (quantized - float) of matched ones.
    """
    ours, theirs = (found.take(found.scores > CONFIDENT) for found in (quantized, reference))
    theirs = theirs.take(np.argsort(theirs.scores, kind="stable"))  # of boxes that are equal the surest is taken
    ours = ours.take(np.lexsort((-ours.scores, ours.image, ours.labels)))
    of = partners(ours, theirs, SAME)
    rows, of = np.flatnonzero(of >= 0), of[of >= 0]

    def by_image(image: Array, weights: Array | None = None) -> Array:
        return np.bincount(image, weights, n_images).astype(np.float64)

    image = ours.image[rows]
    matched, before, after = by_image(image), by_image(theirs.image), by_image(ours.image)
    return {
        "matched_iou": (by_image(image, iou(ours.boxes[rows], theirs.boxes[of])), matched),
        "lost": (before - matched, before),
        "invented": (after - matched, after),
        "score_drift": (by_image(image, ours.scores[rows] - theirs.scores[of]), matched),
    }


# ---- all of them -----------------------------------------------------------------------------------------------------


def detection_metrics(
    detections: Detections,
    boxes: Boxes,
    n_images: int,
    *,
    n_bins: int = 15,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All metrics of detections against the boxes of `n_images` images, as plain Python values.

    - `n` images, `n_boxes` without crowds; COCO's twelve numbers (`COCO`), None where no object is of that size;
    - `d_ece`: `detection_calibration_error` of the detections with a score above `CONFIDENT`; `oce`: the mean of
      `object_calibration` over objects;
    - `per_class`: [{"class", "name", "n" (boxes), "ap", "ap50"}] of the classes that have boxes; `reliability`: see
      `classification.reliability`, "accuracy" being the precision.

    Detections of classes that no box has are left out of COCO's numbers, as COCO does. Raises QuantlensError: no image,
    no box, detections of other images.
    """
    last = max(int(detections.image.max(initial=-1)), int(boxes.image.max(initial=-1)))
    if last >= n_images:
        raise QuantlensError(f"there are {n_images} images, and boxes of image {last}; give those of the same images")
    if boxes.crowd.all():
        raise QuantlensError(f"there is no box in {n_images} images to be found; give images with annotated objects")
    if detections.scores.min(initial=0) < 0 or detections.scores.max(initial=0) > 1:
        raise QuantlensError("scores of detections must lie in 0..1: give probabilities, not logits")
    matches, once = match(detections, boxes), np.ones((n_images, 1))
    scores, correct, _ = _judged(matches)
    return {
        "n": n_images,
        "n_boxes": int(np.count_nonzero(~boxes.crowd)),
        **coco_metrics(detections, boxes, n_images),
        "d_ece": detection_calibration_error(scores, correct, n_bins=n_bins),
        "oce": overall(object_calibration(detections, boxes, n_images)),
        "per_class": _per_class(matches, once, names),
        **({"reliability": reliability(scores, correct, n_bins=n_bins)} if len(scores) else {}),
    }


def _per_class(matches: Matches, once: Array, names: Sequence[str] | None) -> list[dict[str, Any]]:
    by_threshold = [average_precisions(matches, once, t, 0) for t in range(matches.hit.shape[1])]
    count = np.bincount(matches.object_labels[matches.counted[:, 0]])
    return [
        {
            "class": label,
            "name": None if names is None else str(names[label]),
            "n": int(count[label]),
            "ap": float(np.mean([by_class[label][0] for by_class in by_threshold])),
            "ap50": float(by_threshold[0][label][0]),
        }
        for label in by_threshold[0]
    ]
