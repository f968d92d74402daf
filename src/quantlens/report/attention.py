"""The report's section on attention: maps and token norms in pictures, drift against bits, and whether drift goes with
what is lost out of distribution. Everything from the results' "attention" and "attention_examples"."""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from quantlens import _moved
from quantlens.attention import pictures
from quantlens.attention.metrics import OUTLIERS, TABLED, WHERE, DriftMetric, summaries
from quantlens.errors import QuantlensError
from quantlens.plots.precisions import PART_NAMES
from quantlens.report.tables import Column, by_precision
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
Shot = dict[str, Any]
"""A picture: a data URI, what it shows in words, and in a grid the label under it, with a probability, and whether the
label is another than at FP32."""
ShotRow = tuple[str, str, list[Shot | None]]
"""Title, note, and a picture for every precision."""


def attention(board: Board) -> dict[str, Any] | None:
    """The section as its template shows it, or None for a study that did not ask for it. reasons: why models without
    metrics have none."""
    results = [r for r in board.results if r.get("attention")]
    if not results:
        return None
    why = {r["model"]: r["attention"]["unavailable"] for r in results if "unavailable" in r["attention"]}
    found: dict[str, Any] = {"reasons": [f"{model}: {words}." for model, words in why.items()], "n": ""}
    if any(summaries(r, "id") for r in results):
        found |= {
            "n": span(int(n) for r in results if (n := number(dig(r, ("attention", "id", "n")))) is not None),
            "pictures": galleries(board),
            "tables": [t for t in (table_of(board, m) for m in (OUTLIERS, *TABLED)) if t is not None],
            "links": [_link(link) for link in links(board)],
        }
    if board.ood_path is not None:
        found["linked"] = f"AUPR-out by {score_label(board.ood_path[2])}, {PART_NAMES[board.ood_path[1]]}"
    return found


# -- pictures ---------------------------------------------------------------------------------------------------------
Seen = dict[int, dict[str, Example]]
"""Number of a group -> precision -> what its model (of the lowest seed) saw of an image."""


def galleries(board: Board) -> dict[str, Any]:
    """A gallery for each image that has a photograph, how many were left out for their size, the scale that all maps
    share, and the colours of maps and norms."""
    images: dict[tuple[bool, str, int], Seen] = {}
    for group in board.groups:
        for bits in board.precisions:
            for example in examples(group.first(bits)):
                image = bool(example.get("ood")), str(example["set"]), int(example["index"])
                images.setdefault(image, {}).setdefault(group.index, {}).setdefault(bits, example)
    seen_by = (by_bits for seen in images.values() for by_bits in seen.values())
    scale = pictures.rollout_scale(map_of(e, e["rollout"]) for by_bits in seen_by for e in by_bits.values())
    drawn = (gallery_of(board, scale, image, seen) for image, seen in images.items())
    found = [gallery for gallery in drawn if gallery is not None]
    shots = ([shot for *_, row in (*g["maps"], *g["norms"]) for shot in row if shot is not None] for g in found)
    sizes = accumulate(sum(len(shot["uri"]) for shot in of_one) for of_one in shots)
    shown = [gallery for gallery, size in zip(found, sizes, strict=True) if size <= PICTURE_BYTES]
    return {
        "shown": shown,
        "left_out": len(found) - len(shown),
        "scale": scale,
        "bar": bar(scale),
        "norm_bar": bar(pictures.Scale(colours=pictures.VIRIDIS)),
    }


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


def gallery_of(board: Board, scale: pictures.Scale, image: tuple[bool, str, int], seen: Seen) -> dict[str, Any] | None:
    """One image (whether it is OOD, its set and index) as groups see it at every precision; None where no photograph of
    it can be read."""
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
        "photo": {"uri": _uri(shown), "alt": detail},
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
    label = str(example.get("class_name") or (f"class {example['label']}" if "label" in example else ""))
    probability = number(example.get("probability"))
    shown = "" if probability is None else f"{fixed(100 * probability, 0)} %"
    return {
        "uri": _uri(picture),
        "alt": f"Rollout map, {where}: {label} {shown}",
        "label": label,
        "probability": shown,
        "changed": bool(base) and base.get("label") != example.get("label"),
    }


def norm_shot(example: Example, base: Example, block: str, where: str) -> Shot | None:
    """Norms of patch tokens after a block, coloured from the smallest to the largest at FP32."""
    values, reference = (map_of(e, (e.get("norms") or {}).get(block)) for e in (example, base))
    if values is None:
        return None
    picture = pictures.heat(values, pictures.norm_scale(values if reference is None else reference))
    words = f"{fixed(float(values.min()), 1)} to {fixed(float(values.max()), 1)}"
    alt = f"Token norms after {block}, {where}: {words}"
    return {"uri": _uri(picture, lossless=True), "alt": alt, "label": words, "probability": "", "changed": False}


def bar(scale: pictures.Scale) -> Shot:
    """The colours of a scale."""
    colours = pictures.heat(np.linspace(scale.low, scale.high, 200)[None].repeat(12, 0), scale)
    uri = _uri(colours, lossless=True)
    return {"uri": uri, "alt": "colours from low to high values", "label": f"{scale.high:g}+"}


def _uri(picture: Any, **settings: Any) -> str:
    return f"data:image/webp;base64,{pictures.webp(picture, **(settings or {'quality': 70}))}"


# -- tables -----------------------------------------------------------------------------------------------------------
def table_of(board: Board, metric: DriftMetric) -> dict[str, Any] | None:
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


__getattr__ = _moved.finder(__name__)
