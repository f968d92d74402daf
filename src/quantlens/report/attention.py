"""The report's section on attention: maps and token norms in pictures, drift against bits, and whether drift goes with
what is lost out of distribution. Everything from the results' "attention" and "attention_examples"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from quantlens import _moved
from quantlens.attention import pictures
from quantlens.attention.metrics import OUTLIERS, TABLED, WHERE, DriftMetric, summaries
from quantlens.errors import QuantlensError
from quantlens.plots.precisions import PART_NAMES
from quantlens.report.tables import Column, Table, by_precision
from quantlens.studies.board import Board, dig
from quantlens.studies.drift import Link, drift_of, links
from quantlens.studies.text import BASELINE, MISSING, count, fixed, number, score_label, span

PICTURE_BYTES = 9_000_000
"""All pictures together, so that the file stays under 15 MB; further images are left out and counted."""
LINK_COLUMNS = [
    "Drift",
    "Measured on",
    "Cells",
    "Pearson",
    "Spearman",
    "95 % interval",
    "Spearman within precisions",
]

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Shot:
    """A picture of the grid: a data URI, what it shows in words, and the prediction under it."""

    uri: str
    alt: str
    label: str = ""
    probability: str = ""
    changed: bool = False


ShotRow = tuple[str, str, list[Shot | None]]
"""Title, note, and a picture for every precision."""


Gallery = dict[str, Any]
"""One image as all models see it: key, kind, title, detail, photo, and the rows of maps and norms."""


@dataclass
class Galleries:
    """A gallery per image, how many were left out for their size, the scale that all maps share, and the colours of the
    maps and of the norms."""

    scale: pictures.Scale
    bar: Shot
    norm_bar: Shot
    shown: list[Gallery] = field(default_factory=list)
    left_out: int = 0


@dataclass
class Attention:
    """Everything of the section; ``reasons`` says of models without metrics why they have none."""

    reasons: list[str]
    n: str = ""
    pictures: Galleries | None = None
    tables: list[Table] = field(default_factory=list)
    links: list[list[str]] = field(default_factory=list)
    linked: str = ""


def attention(board: Board) -> Attention | None:
    """The section, or None for a study that did not ask for it."""
    results = [r for r in board.results if r.get("attention")]
    if not results:
        return None
    reasons = {r["model"]: r["attention"]["unavailable"] for r in results if "unavailable" in r["attention"]}
    found = Attention([f"{model}: {why}." for model, why in reasons.items()])
    if any(summaries(r, "id") for r in results):
        found.n = span(int(n) for r in results if (n := number(dig(r, ("attention", "id", "n")))) is not None)
        found.pictures = galleries(board)
        found.tables = [t for t in (table_of(board, m) for m in (OUTLIERS, *TABLED)) if t is not None]
        found.links = [_link(link) for link in links(board)]
    if board.ood_path is not None:
        found.linked = f"AUPR-out by {score_label(board.ood_path[2])}, {PART_NAMES[board.ood_path[1]]}"
    return found


# -- pictures ---------------------------------------------------------------------------------------------------------
Seen = dict[int, dict[str, Example]]
"""Number of a group -> precision -> what its model (of the lowest seed) saw of an image."""


def galleries(board: Board) -> Galleries:
    """A gallery for each image that has a photograph."""
    images: dict[tuple[bool, str, int], Seen] = {}
    for group in board.groups:
        for bits in board.precisions:
            for example in examples(group.first(bits)):
                image = bool(example.get("ood")), str(example["set"]), int(example["index"])
                images.setdefault(image, {}).setdefault(group.index, {}).setdefault(bits, example)
    scale = pictures.rollout_scale(
        map_of(example, example["rollout"])
        for seen in images.values()
        for by_bits in seen.values()
        for example in by_bits.values()
    )
    found = Galleries(scale, bar(scale), bar(pictures.Scale(colours=pictures.VIRIDIS)))
    size = 0
    for image, seen in images.items():
        gallery = gallery_of(board, scale, image, seen)
        if gallery is None:
            continue
        rows = (*gallery["maps"], *gallery["norms"])
        size += sum(len(shot.uri) for *_, shots in rows for shot in shots if shot is not None)
        if size > PICTURE_BYTES:
            found.left_out += 1
        else:
            found.shown.append(gallery)
    return found


def examples(result: Mapping[str, Any] | None) -> list[Example]:
    """The examples of a result that can be drawn."""
    listed = dig(result, ("attention_examples",)) or []
    return [e for e in listed if {"set", "index"} <= e.keys() and map_of(e, e.get("rollout")) is not None]


def map_of(example: Example, values: Any) -> Any:
    """Stored values as a map [rows, columns]; None where they do not fit the grid."""
    try:
        found = np.asarray(values, dtype=np.float32).reshape(example["grid"])
    except (KeyError, TypeError, ValueError):
        return None
    return found if found.ndim == 2 and found.size and np.isfinite(found).all() else None


def gallery_of(board: Board, scale: pictures.Scale, image: tuple[bool, str, int], seen: Seen) -> Gallery | None:
    """One image (whether it is OOD, its set and index) seen by every group at every precision; None where no photograph
    of it can be read."""
    ood, name, index = image
    photos = {number: photo for number, by_bits in seen.items() if (photo := _photo(by_bits.get(BASELINE, {})))}
    if not photos:
        return None
    shown = next(iter(photos.values()))
    maps: list[ShotRow] = []
    norms: list[ShotRow] = []
    for group in (g for g in board.groups if g.index in seen):
        by_bits = seen[group.index]
        base, photo = by_bits.get(BASELINE, {}), photos.get(group.index, shown)
        drawn = {bits: map_shot(e, base, photo, scale, f"{group.name}, {bits}") for bits, e in by_bits.items()}
        maps.append((group.method, group.model, [drawn.get(bits) for bits in board.precisions]))
        for block in dict.fromkeys(block for e in by_bits.values() for block in e.get("norms") or {}):
            row = [norm_shot(by_bits.get(b, {}), base, block, f"{group.name}, {b}") for b in board.precisions]
            if any(row):
                norms.append((f"{group.method}, {block}", group.model, row))
    where = f"OOD set {name}" if ood else "ID"
    first = seen[next(iter(photos))][BASELINE]
    truth = first.get("truth_name") or (None if first.get("truth") is None else f"class {first['truth']}")
    detail = f"{where}, image {index}" + (f", labelled {truth}" if truth else "")
    return {
        "key": f"{'ood' if ood else 'id'}-{name}-{index}",
        "kind": where,
        "title": f"{name if ood else 'ID'}: {truth or f'image {index}'}",
        "detail": detail,
        "photo": Shot(_uri(shown), detail),
        "maps": maps,
        "norms": norms,
    }


def _photo(example: Example) -> Any:
    try:
        return pictures.from_webp(example["thumbnail"])
    except (KeyError, TypeError, QuantlensError):
        return None


def map_shot(example: Example, base: Example, photo: Any, scale: pictures.Scale, where: str) -> Shot:
    """A rollout map, divided by its mean, laid over the photograph."""
    picture = pictures.overlay(photo, pictures.relative(map_of(example, example["rollout"])), scale)
    label = str(example.get("class_name") or f"class {example.get('label')}")
    probability = number(example.get("probability"))
    shown = "" if probability is None else f"{fixed(100 * probability, 0)} %"
    changed = bool(base) and base.get("label") != example.get("label")
    return Shot(_uri(picture), f"Rollout map, {where}: {label} {shown}", label, shown, changed)


def norm_shot(example: Example, base: Example, block: str, where: str) -> Shot | None:
    """Norms of patch tokens after a block, coloured from the smallest to the largest at FP32."""
    values, reference = (map_of(e, (e.get("norms") or {}).get(block)) for e in (example, base))
    if values is None:
        return None
    picture = pictures.heat(values, pictures.norm_scale(values if reference is None else reference))
    words = f"{fixed(float(values.min()), 1)} to {fixed(float(values.max()), 1)}"
    return Shot(_uri(picture, lossless=True), f"Token norms after {block}, {where}: {words}", words)


def bar(scale: pictures.Scale) -> Shot:
    """The colours of a scale."""
    colours = pictures.heat(np.linspace(scale.low, scale.high, 200)[None].repeat(12, 0), scale)
    return Shot(_uri(colours, lossless=True), "colours from low to high values", f"{scale.high:g}+")


def _uri(picture: Any, **settings: Any) -> str:
    return f"data:image/webp;base64,{pictures.webp(picture, **(settings or {'quality': 70}))}"


# -- tables -----------------------------------------------------------------------------------------------------------
def table_of(board: Board, metric: DriftMetric) -> Table | None:
    """A metric by precision, on ID and on OOD images."""
    columns = [Column(title, partial(drift_of, where, metric), metric.digits) for where, title in WHERE.items()]
    return by_precision(board, metric.title, columns, more=metric is not OUTLIERS)


def _link(link: Link) -> list[str]:
    found = link.found
    return [
        link.metric.title,
        "ID" if link.where == "id" else "OOD",
        f"{found.n} ({count(found.conditions, 'condition')})",
        fixed(found.pearson, 2),
        fixed(found.spearman, 2),
        MISSING if found.low is None else f"{fixed(found.low, 2)} to {fixed(found.high, 2)}",
        fixed(found.within, 2),
    ]


def __getattr__(name: str) -> object:
    """Names that have moved are found where they are now, with a warning."""
    return _moved.find(__name__, name)
