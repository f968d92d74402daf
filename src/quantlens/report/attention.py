"""The report's section on attention: maps and token norms in pictures, drift against bits, and whether drift goes with
what is lost out of distribution. Everything from the results' "attention" and "attention_examples"."""

from __future__ import annotations

from collections import Counter
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
    if not any(summaries(r, "id") for r in results):
        return found
    found.n = span(int(n) for r in results if (n := number(dig(r, ("attention", "id", "n")))) is not None)
    found.pictures = galleries(board)
    found.tables = [table for metric in (OUTLIERS, *TABLED) if (table := table_of(board, metric)) is not None]
    found.links = [_link(link) for link in links(board)]
    if board.ood_path is not None:
        found.linked = f"AUPR-out by {score_label(board.ood_path[2])}, {PART_NAMES[board.ood_path[1]]}"
    return found


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


# ---- pictures --------------------------------------------------------------------------------------------------------


Example = Mapping[str, Any]
Image = tuple[bool, str, int]
"""Whether it is OOD, its set and its index there."""


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


@dataclass
class Gallery:
    """One image as all models see it."""

    key: str
    kind: str
    title: str
    detail: str
    photo: Shot
    columns: list[str]
    maps: list[ShotRow]
    norms: list[ShotRow]
    alternative: bool = False

    @property
    def size(self) -> int:
        """Characters of its pictures."""
        return sum(len(s.uri) for rows in (self.maps, self.norms) for *_, shots in rows for s in shots if s is not None)


@dataclass
class Galleries:
    """A gallery per image, how many were left out for their size, the scale that all maps share, and the colours of the
    maps and of the norms."""

    scale: pictures.Scale
    bar: Shot
    norm_bar: Shot
    shown: list[Gallery] = field(default_factory=list)
    left_out: int = 0


def galleries(board: Board) -> Galleries:
    """A gallery for each image that the FP32 cells show."""
    seen = {(g.index, b): examples(g.first(b)) for g in board.groups for b in board.precisions}
    scale = pictures.rollout_scale(_as_map(e, e["rollout"]) for shown in seen.values() for e in shown.values())
    found = Galleries(scale, _bar(scale), _bar(pictures.Scale(0.0, 1.0, "", "viridis")))
    photographed: dict[Image, Example] = {}
    for group in board.groups:
        for image, example in examples(group.fp32).items():
            if isinstance(example.get("thumbnail"), str):
                photographed.setdefault(image, example)
    size, numbers = 0, Counter[tuple[bool, str]]()
    for image, example in photographed.items():
        numbers[image[:2]] += 1
        of_image = {place: shown[image] for place, shown in seen.items() if image in shown}
        gallery = gallery_of(board, scale, image, example, numbers[image[:2]], of_image)
        if gallery is None:
            continue
        size += gallery.size
        if size > PICTURE_BYTES:
            found.left_out += 1
            continue
        gallery.alternative = bool(found.shown)
        found.shown.append(gallery)
    return found


def examples(result: Mapping[str, Any] | None) -> dict[Image, Example]:
    """The examples of a result that can be drawn, by their image."""
    listed = dig(result, ("attention_examples",)) or ()
    return {
        (bool(e.get("ood")), str(e["set"]), int(e["index"])): e
        for e in listed
        if _as_map(e, e.get("rollout")) is not None
    }


def _as_map(example: Example, values: Any) -> Any:
    """Stored values as a map [rows, columns]; None where they do not fit the grid."""
    try:
        array = np.asarray(values, dtype=np.float32).reshape(example["grid"])
        return array if array.ndim == 2 and 0 < array.size <= 1 << 16 and np.isfinite(array).all() else None
    except (KeyError, TypeError, ValueError):
        return None


def gallery_of(
    board: Board,
    scale: pictures.Scale,
    image: Image,
    first: Example,
    position: int,
    seen: Mapping[tuple[int, str], Example],
) -> Gallery | None:
    """One image seen by every group at every precision (of the lowest seed); None where no photograph of it can be
    read. first: an example of it. position: its number among the images of its set. seen: (group, precision) -> what
    that model saw."""
    ood, name, index = image
    shown = _photo(first)
    maps: list[ShotRow] = []
    norms: list[ShotRow] = []
    for group in board.groups:
        of_group = {b: seen[group.index, b] for b in board.precisions if (group.index, b) in seen}
        base = of_group.get(BASELINE)
        photo = _photo(base) or shown
        if not of_group or photo is None:
            continue
        shown = shown or photo
        where = {b: f"{group.name}, {b}" for b in board.precisions}
        row = [map_shot(of_group[b], base, photo, scale, at) if b in of_group else None for b, at in where.items()]
        maps.append((group.method, group.model, row))
        for block in dict.fromkeys(k for e in of_group.values() for k in e.get("norms") or {}):
            cells = [norm_shot(of_group.get(b), base, block, at) for b, at in where.items()]
            if any(cells):
                norms.append((f"{group.method}, {block}", group.model, cells))
    if shown is None:
        return None
    truth = first.get("truth_name") or (None if first.get("truth") is None else f"class {first['truth']}")
    where_from = f"OOD set {name}" if ood else "ID"
    detail = f"{where_from}, image {index}" + (f", labelled {truth}" if truth else "")
    title = f"{name if ood else 'ID'}: {truth or f'image {position}'}"
    key = f"{'ood' if ood else 'id'}-{name}-{index}"
    return Gallery(key, where_from, title, detail, Shot(_uri(shown), detail), board.precisions, maps, norms)


def _photo(example: Example | None) -> Any:
    """The photograph of an example; None where it has none that can be read."""
    try:
        return pictures.from_webp((example or {})["thumbnail"])
    except (KeyError, QuantlensError):
        return None


def map_shot(example: Example, base: Example | None, photo: Any, scale: pictures.Scale, where: str) -> Shot:
    """A rollout map, divided by its mean, laid over the photograph."""
    picture = pictures.overlay(photo, pictures.relative(_as_map(example, example["rollout"])), scale=scale)
    label = str(example.get("class_name") or f"class {example.get('label')}")
    probability = number(example.get("probability"))
    shown = "" if probability is None else f"{fixed(100 * probability, 0)} %"
    changed = base is not None and base.get("label") != example.get("label")
    return Shot(_uri(picture), f"Rollout map, {where}: {label} {shown}", label, shown, changed)


def norm_shot(example: Example | None, base: Example | None, block: str, where: str) -> Shot | None:
    """Norms of patch tokens after a block, coloured from the smallest to the largest at FP32."""
    values, reference = (_as_map(e, (e.get("norms") or {}).get(block)) if e else None for e in (example, base))
    if values is None:
        return None
    scale = pictures.norm_scale(values if reference is None else reference)
    words = f"{fixed(float(np.min(values)), 1)} to {fixed(float(np.max(values)), 1)}"
    uri = _uri(pictures.heat(values, scale=scale), lossless=True)
    return Shot(uri, f"Token norms after {block}, {where}: {words}", words)


def _bar(scale: pictures.Scale) -> Shot:
    return Shot(_uri(pictures.colour_bar(scale), lossless=True), "colours from low to high values", f"{scale.high:g}+")


def _uri(picture: Any, *, lossless: bool = False) -> str:
    text = pictures.webp(picture, lossless=True) if lossless else pictures.webp(picture, quality=70)
    return f"data:image/webp;base64,{text}"


def __getattr__(name: str) -> object:
    """Names that have moved are found where they are now, with a warning."""
    return _moved.find(__name__, name)
