"""The report's section on boxes: what detectors find in some of the images, before and after quantization, beside what
is annotated. Boxes are those of the per-image outputs that the study keeps, pictures those of its source."""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantlens.attention.pictures import webp
from quantlens.boxes import Array, Boxes, Detections
from quantlens.data import open_source
from quantlens.errors import QuantlensError, StorageError
from quantlens.evaluation import outputs as kept
from quantlens.metrics.detection import CONFIDENT, SAME
from quantlens.metrics.matching import partners
from quantlens.plots.boxes import draw_boxes
from quantlens.plots.style import COLOURS, PAPER
from quantlens.report.attention import PICTURE_BYTES, Shot
from quantlens.studies.board import Board
from quantlens.studies.text import BASELINE, count

SHOWN, SIDE, WIDTH = 4, 384, 192
"""Images; the longer side of a picture in pixels, and how wide it is in the page."""
RIGHT, WRONG, MISSED = COLOURS[5], COLOURS[1], PAPER
LOOKS = (
    ("right", 5, f"an object of its class lies there (IoU of at least {SAME})"),
    ("wrong", 1, "none does, or another detection has found it"),
    ("missed", None, "an object that none has found (dashed)"),
)


class Seen(NamedTuple):
    """What a model found in the chosen images and what is there, with its numbers of classes, and their names."""

    found: Detections
    truth: Boxes
    names: Mapping[int, str]


def boxes(board: Board) -> dict[str, Any] | None:
    """The section as its template shows it, or None for a study without outputs of detectors. reason: why there are no
    pictures."""
    if board.task != "detect" or board.directory is None:
        return None
    results = {(g.index, bits): r for g in board.groups for bits in board.precisions if (r := g.first(bits))}
    first = next((r for (_, bits), r in results.items() if bits == BASELINE), None)
    whole = None if first is None else outputs_of(board.directory, first)
    if first is None or whole is None or whole.truth is None:
        return None
    counts = np.bincount(whole.truth.image[~whole.truth.crowd], minlength=len(whole.labels))
    full = np.flatnonzero(counts >= max(1, np.median(counts)))
    chosen = full[np.linspace(0, len(full) - 1, min(SHOWN, len(full))).round().astype(int)]
    try:
        pictures = pictures_of(str(first["id"]["source"]), chosen, whole)
    except QuantlensError as error:
        return {"reason": f"There are no pictures with boxes, as the images cannot be read here ({error})."}
    read: dict[str, Seen | None] = {}
    for result in results.values():
        key = result.get("cell_key", "")
        if key not in read:
            read[key] = seen(board.directory, result, chosen)
    by_cell = {place: found for place, r in results.items() if (found := read[r.get("cell_key", "")]) is not None}
    drawn = [gallery_of(board, k, int(image), pictures[k], by_cell) for k, image in enumerate(chosen)]
    sizes = accumulate(sum(len(s["uri"]) for *_, row in g["rows"] for s in row if s) for g in drawn)
    shown = [g for g, size in zip(drawn, sizes, strict=True) if size <= PICTURE_BYTES]
    left_out = len(drawn) - len(shown)
    return {"reason": "", "shown": shown, "left_out": left_out, "confident": CONFIDENT, "looks": LOOKS}


def outputs_of(directory: Path, result: Mapping[str, Any]) -> kept.Outputs | None:
    """The per-image outputs of a detector's cell; None where they are not kept or damaged."""
    try:
        found = kept.read(kept.path_of(directory, result.get("cell_key", "")))
    except StorageError:
        return None
    return None if found.detections is None else found


def pictures_of(text: str, chosen: Array, whole: kept.Outputs) -> list[Any]:
    """The pictures of a source, chosen by their places. Raises QuantlensError where it is not what was evaluated."""
    source = open_source(text)
    theirs = None if source.boxes is None else source.boxes.select(chosen).boxes
    if whole.truth is None or len(source) != len(whole.labels) or theirs is None:
        raise QuantlensError(f"{text} has {len(source)} images, not the {len(whole.labels)} that were evaluated")
    if not np.array_equal(theirs, whole.truth.select(chosen).boxes):
        raise QuantlensError(f"{text} has other boxes than those that were evaluated")
    return [source.image(int(k)) for k in chosen]


def seen(directory: Path, result: Mapping[str, Any], chosen: Array) -> Seen | None:
    """What the model of a cell saw in the images chosen, which are then images 0, 1, …"""
    whole = outputs_of(directory, result)
    if whole is None or whole.detections is None or whole.truth is None:
        return None
    found = whole.detections.take(whole.detections.scores > CONFIDENT)
    listed = result["id"].get("per_class") or ()
    names = {int(entry["class"]): str(entry.get("name") or entry["class"]) for entry in listed}
    return Seen(found.select(chosen), whole.truth.select(chosen), names)


def gallery_of(
    board: Board, k: int, image: int, picture: Any, by_cell: Mapping[tuple[int, str], Seen]
) -> dict[str, Any]:
    """One image, the k-th of those chosen, as every group sees it at every precision."""
    rows = []
    for group in (g for g in board.groups if any(place[0] == g.index for place in by_cell)):
        cells = {b: by_cell[group.index, b] for b in board.precisions if (group.index, b) in by_cell}
        row = {b: shot(picture, cell, k, f"{group.name}, {b}") for b, cell in cells.items()}
        for one in row.values():
            one["changed"] = BASELINE in row and one["label"] != row[BASELINE]["label"]
        rows.append((group.method, group.model, [row.get(b) for b in board.precisions]))
    first = next(iter(by_cell.values()))
    there = first.truth.take((first.truth.image == k) & ~first.truth.crowd)
    texts = [first.names.get(int(label), str(label)) for label in there.labels]
    drawn = draw_boxes(picture, there.boxes, texts, [COLOURS[2]] * len(there), side=SIDE)
    truth = _shot(drawn, f"Image {image} as annotated", count(len(there), "object"))
    return {"key": str(image), "title": f"Image {image}", "truth": truth, "rows": rows}


def shot(picture: Any, cell: Seen, k: int, where: str) -> Shot:
    """The picture with the detections of a model, right and wrong ones, and with the objects that it missed."""
    found, truth = cell.found.take(cell.found.image == k), cell.truth.take(cell.truth.image == k)
    found = found.take(np.argsort(-found.scores, kind="stable"))
    of = partners(found, truth, SAME)
    in_crowd = (of >= 0) & np.append(truth.crowd, False)[of]
    found, of = found.take(~in_crowd), of[~in_crowd]
    missed = truth.take(~truth.crowd & ~np.isin(np.arange(len(truth)), of))
    texts = [
        f"{cell.names.get(int(label), label)} {score:.2f}"
        for label, score in zip(found.labels, found.scores, strict=True)
    ]
    colours = [RIGHT if partner >= 0 else WRONG for partner in of] + [MISSED] * len(missed)
    dashed = np.arange(len(colours)) >= len(found)
    together = np.concatenate([found.boxes, missed.boxes])
    drawn = draw_boxes(picture, together, texts + [""] * len(missed), colours, dashed=dashed, side=SIDE)
    right = int((of >= 0).sum())
    words = f"{right} right, {len(found) - right} wrong, {len(missed)} missed"
    return _shot(drawn, f"{where}: {words}", words)


def _shot(drawn: Any, alt: str, label: str) -> Shot:
    height = round(WIDTH * drawn.height / drawn.width)
    uri = f"data:image/webp;base64,{webp(drawn, quality=75)}"
    return {"uri": uri, "alt": alt, "label": label, "changed": False, "width": WIDTH, "height": height}
