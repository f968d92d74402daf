"""Which detection is which object: overlaps of boxes, and COCO's greedy matching, for all images at once.

The arithmetic and the order of ties are those of COCO's own evaluation (pycocotools), so that what is computed from
these matches equals what it computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlens.boxes import Array, Boxes, Detections, spans

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU from which a detection is of an object: 0.50, 0.55, …, 0.95."""

AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Square pixels of an object, by COCO's name for its size; both ends belong to it."""

MOST = 100
"""Detections of an image and a class that are looked at, the best first."""


AT_ONCE = 1 << 20
"""Pairs of boxes whose overlap is computed at once."""


def iou(first: Array, second: Array, crowd: Array | bool = False) -> Array:
    """Intersection over union of boxes [P, 4] with boxes [P, 4], row by row; for a crowd in `second` the intersection
    over the first box's own area."""
    corner, side = first[:, :2], first[:, 2:] - first[:, :2]
    other_corner, other_side = second[:, :2], second[:, 2:] - second[:, :2]
    overlap = np.minimum(corner + side, other_corner + other_side) - np.maximum(corner, other_corner)
    common = np.where((overlap > 0).all(axis=1), overlap.prod(axis=1), 0.0)
    own = side.prod(axis=1)
    union = np.where(crowd, own, own + other_side.prod(axis=1) - common)
    return common / np.where(common > 0, union, 1.0)


def near_pairs(first: Any, second: Any, groups: Sequence[Array], crowd: Array, least: float) -> tuple[Array, ...]:
    """(i, j, IoU) of all pairs of equal groups, one [P] of `first` and one [G] of `second`, whose boxes overlap by an
    IoU of at least `least`, by i and then by j; as many at once as memory has room for."""
    order = np.argsort(groups[1], kind="stable")
    low, high = (np.searchsorted(groups[1][order], groups[0], side) for side in ("left", "right"))
    part = (np.cumsum(high - low) - (high - low)) // AT_ONCE
    found = []
    for rows in np.split(np.arange(len(part)), np.flatnonzero(np.diff(part)) + 1):
        i, j = np.repeat(rows, high[rows] - low[rows]), order[spans(low[rows], high[rows] - low[rows])]
        overlap = iou(first.boxes[i], second.boxes[j], crowd[j])
        near = overlap >= least
        found.append((i[near], j[near], overlap[near]))
    i, j, overlap = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return i, j, overlap


def groups_of(*parts: Array) -> list[Array]:
    """A number for each row of several (image, label) pairs, equal where both are equal."""
    width = max((int(labels.max(initial=0)) for labels in parts[1::2]), default=0) + 1
    return [image * width + labels for image, labels in zip(parts[::2], parts[1::2], strict=True)]


def greedy(pairs: tuple[Array, ...], group: Array, crowd: Array, ignored: Array, thresholds: Array) -> Array:
    """The object of each detection at each threshold and size, int64 [N, T, A], -1 for none.

    pairs: those of `near_pairs` [P], at the least threshold. group [N] of the detections, which come
    group by group, the best of each first, and choose in this order. A detection takes the object that overlaps most
    and has not been taken (of equal ones the last), one that is not `ignored` [G, A] before one that is; a `crowd` [G]
    may be taken by many.
    """
    found = np.full((len(group), len(thresholds), ignored.shape[1]), -1, dtype=np.int64)
    taken = np.zeros((len(crowd), *found.shape[1:]), dtype=bool)
    detection, thing, overlap = pairs
    order = np.lexsort((thing, overlap, detection))
    thing, overlap = thing[order], overlap[order]
    active, starts, counts = np.unique(detection, return_index=True, return_counts=True)
    new = np.concatenate([[True], np.diff(group[active]) != 0])[: len(active)]
    turn = np.arange(len(active)) - np.maximum.accumulate(np.where(new, np.arange(len(active)), 0))
    for now in range(int(turn.max(initial=-1)) + 1):
        choosing = np.flatnonzero(turn == now)
        rows = spans(starts[choosing], counts[choosing])
        first = np.cumsum(counts[choosing]) - counts[choosing]
        things, place = thing[rows], np.arange(len(rows))[:, None, None]
        free = ~taken[things] | crowd[things, None, None]
        fits = free & (overlap[rows, None, None] >= thresholds[None, :, None])
        wish = np.where(fits, place + len(rows) * ~ignored[things][:, None], -1)
        best = np.maximum.reduceat(wish, first, axis=0)
        who, t, a = np.nonzero(best >= 0)
        chosen = things[best[who, t, a] % len(rows)]
        found[active[choosing[who]], t, a] = chosen
        taken[chosen, t, a] = True
    return found


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections [N], by class, image and score, against objects [G]: T thresholds, A sizes (of `AREAS`).

    rank: place among those of its image and class. hit [N, T, A]: it is an object that counts; ignored: it is neither
    right nor wrong (in a crowd, or of another size). counted [G, A]: whether an object counts. overlap [N]: IoU with
    its object at the first threshold, NaN without one.
    """

    image: Array
    labels: Array
    scores: Array
    rank: Array
    hit: Array
    ignored: Array
    overlap: Array
    object_image: Array
    object_labels: Array
    counted: Array


def partners(found: Detections, others: Any, at: float) -> Array:
    """The row of `others` (boxes or detections) that each detection is matched with by class at an IoU of `at`, the
    surest choosing first, as COCO matches; int64 [N], -1 for none."""
    order = np.lexsort((-found.scores, found.image, found.labels))
    ranked, crowd = found.take(order), getattr(others, "crowd", np.zeros(len(others), dtype=bool))
    groups, objects = groups_of(ranked.image, ranked.labels, others.image, others.labels)
    pairs = near_pairs(ranked, others, (groups, objects), crowd, at)
    of = np.empty(len(found), dtype=np.int64)
    of[order] = greedy(pairs, groups, crowd, crowd[:, None], np.array([at]))[:, 0, 0]
    return of


def match(detections: Detections, boxes: Boxes, thresholds: Array = THRESHOLDS) -> Matches:
    """Match the `MOST` best detections of every image and class with its objects."""
    order = np.lexsort((-detections.scores, detections.image, detections.labels))
    ranked = detections.take(order)
    groups, objects = groups_of(ranked.image, ranked.labels, boxes.image, boxes.labels)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(groups) != 0])[: len(groups)])
    rank = np.arange(len(groups)) - np.repeat(starts, np.diff([*starts, len(groups)]))
    ranked, groups, rank = ranked.take(rank < MOST), groups[rank < MOST], rank[rank < MOST]
    pairs = near_pairs(ranked, boxes, (groups, objects), boxes.crowd, thresholds.min())
    low, high = np.array(list(AREAS.values())).T
    ignored = boxes.crowd[:, None] | (boxes.area[:, None] < low) | (boxes.area[:, None] > high)
    found = greedy(pairs, groups, boxes.crowd, ignored, thresholds)
    area = (ranked.boxes[:, 2:] - ranked.boxes[:, :2]).prod(axis=1)[:, None]
    beyond = (area < low) | (area > high)
    got = found >= 0
    of_none = np.zeros((1, len(AREAS)), dtype=bool)
    skipped = np.where(got, np.concatenate([ignored, of_none])[found, np.arange(len(AREAS))], beyond[:, None])
    own, matched = np.full(len(groups), np.nan), found[:, 0, 0]
    has = matched >= 0
    own[has] = iou(ranked.boxes[has], boxes.boxes[matched[has]], boxes.crowd[matched[has]])
    return Matches(
        ranked.image,
        ranked.labels,
        ranked.scores,
        rank,
        got & ~skipped,
        skipped,
        own,
        boxes.image,
        boxes.labels,
        ~ignored,
    )
