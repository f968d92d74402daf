"""Pictures of attention in the report: maps laid over the photographs, and norms of patch tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantlens.attention import pictures
from quantlens.errors import QuantlensError
from quantlens.studies.board import Board, Group, dig
from quantlens.studies.text import BASELINE, fixed, number

PICTURE_BYTES = 9_000_000
"""All pictures together, so that the file stays under 15 MB; further images are left out and counted."""

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


@dataclass
class Galleries:
    """A gallery per image, how many were left out for their size, and the scale that all maps share: its colours as a
    data URI, its largest value, and what its values are."""

    shown: list[Gallery] = field(default_factory=list)
    left_out: int = 0
    scale: pictures.Scale = field(default_factory=lambda: pictures.rollout_scale([]))

    @property
    def bar(self) -> Shot:
        """The colours of the maps."""
        return _bar(self.scale)

    @property
    def norm_bar(self) -> Shot:
        """The colours of the norms."""
        return _bar(pictures.Scale(colours=pictures.VIRIDIS))


def galleries(board: Board) -> Galleries:
    """A gallery for each image that the FP32 cells show."""
    keys: dict[tuple[bool, str, int], Example] = {}
    for group in board.groups:
        for example in examples(group.fp32):
            if isinstance(example.get("thumbnail"), str):
                keys.setdefault((bool(example.get("ood")), str(example["set"]), int(example["index"])), example)
    found = Galleries(scale=_scale(board))
    size = 0
    several: dict[tuple[bool, str], int] = {}
    for (ood, name, index), example in keys.items():
        number_of = several[ood, name] = several.get((ood, name), 0) + 1
        gallery = gallery_of(board, found.scale, (ood, name, index), example, number_of)
        if gallery is None:
            continue
        shots = [s for rows in (gallery.maps, gallery.norms) for _, _, cells in rows for s in cells if s is not None]
        size += sum(len(s.uri) for s in shots)
        if size > PICTURE_BYTES:
            found.left_out += 1
            continue
        gallery.alternative = bool(found.shown)
        found.shown.append(gallery)
    return found


def _scale(board: Board) -> pictures.Scale:
    """One scale for all rollout maps of a report."""
    shown = [e for g in board.groups for b in board.precisions for e in examples(g.first(b))]
    return pictures.rollout_scale(m for e in shown if (m := _as_map(e, e["rollout"])) is not None)


def examples(result: Mapping[str, Any] | None) -> list[Example]:
    """The examples of a result that can be drawn."""
    listed = dig(result, ("attention_examples",))
    needed = ("set", "index", "grid", "rollout")
    return [
        e
        for e in (listed if isinstance(listed, list) else [])
        if isinstance(e, Mapping) and all(e.get(k) is not None for k in needed) and _as_map(e, e["rollout"]) is not None
    ]


def _as_map(example: Example, values: Any) -> np.ndarray | None:
    """Stored values as a map [rows, columns]; None where they do not fit the grid."""
    try:
        grid = tuple(int(n) for n in example["grid"])
        array = np.asarray(values, dtype=np.float32)
        fits = len(grid) == 2 and 0 < array.size <= 1 << 16 and bool(np.isfinite(array).all())
        return array.reshape(grid) if fits else None
    except (TypeError, ValueError):
        return None


def gallery_of(
    board: Board, scale: pictures.Scale, image: tuple[bool, str, int], first: Example, position: int
) -> Gallery | None:
    """One image (whether it is OOD, its set and index) seen by every group at every precision (of the lowest seed);
    None where no photograph of it can be read.

    first: an example of it. position: its number among the images of its set.
    """
    ood, name, index = image
    shown = _photo(first)
    maps: list[ShotRow] = []
    norms: list[ShotRow] = []
    for group in board.groups:
        seen = _examples_of(board, group, image)
        base = seen.get(BASELINE)
        photo = _photo(base) or shown
        if not seen or photo is None:
            continue
        shown = shown or photo
        row = [
            None if b not in seen else map_shot(seen[b], base, photo, scale, f"{group.name}, {b}")
            for b in board.precisions
        ]
        maps.append((group.method, group.model, row))
        for block in dict.fromkeys(k for e in seen.values() for k in (e.get("norms") or {})):
            cells = [norm_shot(seen.get(b), base, block, f"{group.name}, {b}") for b in board.precisions]
            if any(cells):
                norms.append((f"{group.method}, {block}", group.model, cells))
    if shown is None:
        return None
    where = f"OOD set {name}" if ood else "ID"
    truth = first.get("truth_name") or (None if first.get("truth") is None else f"class {first['truth']}")
    detail = f"{where}, image {index}" + (f", labelled {truth}" if truth else "")
    title = f"{name if ood else 'ID'}: {truth or f'image {position}'}"
    key = f"{'ood' if ood else 'id'}-{name}-{index}"
    return Gallery(key, where, title, detail, Shot(_uri(shown), detail), board.precisions, maps, norms)


def _examples_of(board: Board, group: Group, image: tuple[bool, str, int]) -> dict[str, Example]:
    """Precision -> what a group's model saw of an image."""
    seen: dict[str, Example] = {}
    for bits in board.precisions:
        for e in examples(group.first(bits)):
            if (bool(e.get("ood")), str(e["set"]), e["index"]) == image:
                seen.setdefault(bits, e)
    return seen


def _photo(example: Example | None) -> Any:
    try:
        text = (example or {}).get("thumbnail")
        return None if not isinstance(text, str) else pictures.from_webp(text)
    except QuantlensError:
        return None


def map_shot(example: Example, base: Example | None, photo: Any, scale: pictures.Scale, where: str) -> Shot:
    """A rollout map, divided by its mean, laid over the photograph."""
    values = _as_map(example, example["rollout"])
    assert values is not None
    picture = pictures.overlay(photo, pictures.relative(values), scale)
    label = str(example.get("class_name") or f"class {example.get('label')}")
    probability = number(example.get("probability"))
    shown = "" if probability is None else f"{fixed(100 * probability, 0)} %"
    changed = base is not None and base.get("label") != example.get("label")
    return Shot(_uri(picture), f"Rollout map, {where}: {label} {shown}", label, shown, changed)


def norm_shot(example: Example | None, base: Example | None, block: str, where: str) -> Shot | None:
    """Norms of patch tokens after a block, coloured from the smallest to the largest at FP32."""
    values = None if example is None else _as_map(example, (example.get("norms") or {}).get(block))
    if values is None or example is None:
        return None
    reference = None if base is None else _as_map(base, (base.get("norms") or {}).get(block))
    scale = pictures.norm_scale(values if reference is None else reference)
    words = f"{fixed(float(np.min(values)), 1)} to {fixed(float(np.max(values)), 1)}"
    uri = _uri(pictures.heat(values, scale), lossless=True)
    return Shot(uri, f"Token norms after {block}, {where}: {words}", words)


def _bar(scale: pictures.Scale) -> Shot:
    colours = pictures.heat(np.linspace(scale.low, scale.high, 200)[None].repeat(12, 0), scale)
    return Shot(_uri(colours, lossless=True), "colours from low to high values", f"{scale.high:g}+")


def _uri(picture: Any, *, lossless: bool = False) -> str:
    text = pictures.webp(picture, lossless=True) if lossless else pictures.webp(picture, quality=70)
    return f"data:image/webp;base64,{text}"
