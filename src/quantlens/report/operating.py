"""The report's section on the operating point: what the thresholds of FP32 do after quantization, the answers that flip
with pictures of some, and the intervals of what classes lose. Everything from the per-image outputs of the study."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from quantlens.data import open_source
from quantlens.errors import QuantlensError
from quantlens.evaluation.differences import Difference
from quantlens.evaluation.operating import HOW, ClassLoss, Flip, Shipped, printable
from quantlens.evaluation.result import title_of
from quantlens.metrics.operating import KINDS
from quantlens.report.runinfo import Listing
from quantlens.studies.board import Board, Group
from quantlens.studies.operating import WITHOUT, Row, answers, operating
from quantlens.studies.significance import SIGN
from quantlens.studies.text import MISSING, count, fixed, percent

SIDE, SHOWN, PICTURE_BYTES = 96, (12, 4, 4), 2_000_000
"""Longer side of a thumbnail in pixels; how many of each kind of flip (KINDS) are shown of a model and method; and how
large all of them are together at most."""
WORDS = dict(zip(KINDS, ("right → wrong", "wrong → right", "wrong → other wrong"), strict=True))
COLUMNS = ["Model", "Method", "Bits", "Metric", "FP32", "FP32's thresholds", "Δ ", "95 % interval"]
AGAIN = ["set again", "Δ", "95 % interval"]
TEXT = 4


def section(board: Board, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any] | None:
    """The section as its template shows it; None for a study of FP32 alone. reason: why there is nothing to show.
    losses: {(number of a group, precision): {class: ClassLoss}}, for the tables of classes."""
    if not board.quantized:
        return None
    found = operating(board, progress=progress)
    if not found.rows:
        return {"reason": f"There is no operating point, as {WITHOUT}.", "losses": {}}
    having = {path.split(".")[-2] for row in found.rows for path in row.metrics if path.endswith(".misses")}
    scores = [score for score in board.scores if score in having]
    lowest = {row.group.index: row for row in found.rows}.values()
    seen = [(row, shipped) for row in lowest if (shipped := answers(board, row.group, row.bits)) is not None]
    confidence = _table("Confidence cut", found.rows, None)
    missing = f"{count(found.missing, 'row has', 'rows have')} none, as {WITHOUT}." if found.missing else ""
    return {
        "reason": "",
        "promise": str(found.promise),
        "missing": missing,
        "confidence": confidence if confidence.rows else None,
        "scores": [(score, _table("OOD threshold", found.rows, score)) for score in scores],
        "first": board.score or "",
        "text": TEXT,
        "flips": _counts(found.rows),
        **_galleries(board, seen),
        "losses": {(row.group.index, row.bits): _by_class(shipped.classes()) for row, shipped in seen},
    }


def _by_class(losses: Iterable[ClassLoss]) -> dict[int, ClassLoss]:
    return {one.number: one for one in losses}


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(caption: str, rows: Sequence[Row], score: str | None) -> Listing:
    """Every metric of the confidence cut, or with `score` of its OOD threshold."""
    lines = []
    for row in rows:
        tails = dict.fromkeys(path.split(".", 2)[2] for path in row.metrics)
        for tail in tails:
            place = tail.split(".")[:-1]
            if place == ["id"] if score is None else place[-1] == score:
                both = [row.metrics.get(f"operating.{how}.{tail}") for how in HOW]
                fp32 = next(one.a for one in both if one is not None)
                names = [row.group.model, row.group.method, row.bits, _title(f"operating.same.{tail}")]
                lines.append([*names, percent(fp32), *(text for one in both for text in _measured(one))])
    return Listing(caption, [*COLUMNS, *AGAIN], lines, frozenset(range(TEXT, len(COLUMNS) + len(AGAIN))))


def _title(path: str) -> str:
    """ "misses ↓, textures": without the score, which the table is of."""
    parts = title_of(path).replace(" %", "").split(", ")
    return ", ".join(parts[:-1] if len(parts) > 1 else parts)


def _measured(one: Difference | None) -> list[str]:
    """The quantized value, Δ in points, marked where its interval holds 0, and the interval. None: of images of
    which none is answered there is no accuracy."""
    if one is None or one.low is None or one.high is None:
        return [MISSING] * 3
    mark = SIGN if one.low <= 0 <= one.high else ""
    interval = f"{percent(one.low, sign=True)} to {percent(one.high, sign=True)}"
    return [percent(one.b), percent(one.difference, sign=True) + mark, interval]


def _counts(rows: Sequence[Row]) -> Listing | None:
    """How many answers flip, means over seeds."""
    lines = []
    for row in rows:
        if row.flips:
            means = [sum(flips[kind] for flips in row.flips) / len(row.flips) for kind in KINDS]
            digits = 0 if len(row.flips) == 1 else 1
            n = row.flips[0]["n"]
            shown = [fixed(mean, digits) for mean in means]
            names = [row.group.model, row.group.method, row.bits, str(len(row.flips)), str(n)]
            lines.append([*names, *shown, percent(1 - sum(means) / n)])
    heads = ["Model", "Method", "Bits", "Seeds", "Images", *WORDS.values(), "same answer %"]
    return Listing("Answers that flip", heads, lines, frozenset(range(3, len(heads)))) if lines else None


# -- pictures ----------------------------------------------------------------------------------------------------------


def _galleries(board: Board, seen: Sequence[tuple[Row, Shipped]]) -> dict[str, Any]:
    """Some of the flips of every model and method at its lowest precision and seed, with their pictures while there is
    room. pictures: why there are none, or how many have none."""
    galleries, size, without, reasons = [], 0, 0, dict[str, None]()
    opened: dict[str, Any] = {}
    for row, shipped in seen:
        if not shipped.flips or not shipped.flips[0].images:
            continue
        chosen = [
            flip
            for kind, most in zip(KINDS, SHOWN, strict=True)
            for flip in [one for one in shipped.flips[0].images if one.kind == kind][:most]
        ]
        cells = []
        for flip in chosen:
            uri = ""
            try:
                uri = _thumbnail(_source(row.group, opened), flip) if size < PICTURE_BYTES else ""
            except QuantlensError as error:
                reasons[str(error)] = None
            size += len(uri)
            without += not uri
            cells.append({"uri": uri, "kind": WORDS[flip.kind], "flip": flip, "said": _said(flip)})
        galleries.append({"row": row, "cells": cells, "total": len(shipped.flips[0].images)})
    said = f"{count(without, 'image is', 'images are')} shown without a picture" if without else ""
    why = next(iter(reasons), "") or "so that this file stays small"
    return {"galleries": galleries, "pictures": f"{said}: {why}." if said else ""}


def _source(group: Group, opened: dict[str, Any]) -> Any:
    """The opened source of a group's ID images. Raises QuantlensError where it is not what was evaluated."""
    part = (group.fp32 or {}).get("id") or {}
    text = str(part.get("source"))
    if text not in opened:
        try:
            opened[text] = source = open_source(text)
            if source.fingerprint() != part.get("fingerprint"):
                raise QuantlensError(f"{text} does not hold the images that were evaluated any more")
        except QuantlensError as error:
            opened[text] = error
    if isinstance(opened[text], QuantlensError):
        raise opened[text]
    return opened[text]


def _thumbnail(source: Any, flip: Flip) -> str:
    """A small picture as a data URI. Raises QuantlensError where it cannot be read."""
    from PIL import Image

    place = flip.index if flip.image is None else _place(source.names, flip)
    picture = source.image(place).convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=70, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _place(names: Sequence[str], flip: Flip) -> int:
    """Where an image stands in its source: in its own place unless images before it were skipped as bad."""
    if flip.index < len(names) and printable(names[flip.index]) == flip.image:
        return flip.index
    written = [printable(name) for name in names]
    if flip.image not in written:
        raise QuantlensError(f"{flip.image} is not among the images of the source")
    return written.index(flip.image)


def _said(flip: Flip) -> dict[str, str]:
    """What stands under a picture."""

    def answer(number: int, name: str | None) -> str:
        return f"class {number}" if name is None else name.partition(",")[0]  # ImageNet's have many names

    image = f"image {flip.index}" if flip.image is None else flip.image
    return {
        "title": "; ".join([image, *(name for name in (flip.label_name, flip.a_name, flip.b_name) if name)]),
        "truth": answer(flip.label, flip.label_name),
        "before": f"{answer(flip.a, flip.a_name)} {percent(flip.a_confidence, 0)} %",
        "after": f"{answer(flip.b, flip.b_name)} {percent(flip.b_confidence, 0)} %",
        "change": f"{percent(flip.change, 0, sign=True)} points",
    }
