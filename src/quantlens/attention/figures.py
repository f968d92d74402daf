"""The pictures of a comparison: maps laid over images, and norms of patch tokens; images in rows, models in columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from quantlens.attention import pictures
from quantlens.attention.selection import name_of, photograph
from quantlens.attention.sets import FP32, SetView
from quantlens.models.class_names import class_names

if TYPE_CHECKING:
    from PIL import Image

    from quantlens.attention.comparison import AttentionResult

ID = "ID"
NORM_SIDE = 120


def maps_picture(result: AttentionResult, shown: Mapping[str, list[int]]) -> Image.Image:
    """Maps of every model over each image, with predicted class and probability. shown: of each set the images, as
    places in its :class:`SetView`."""
    rollout = result.settings.kind == "rollout"
    values = {
        (name, k, label): result.sets[name].maps[label][k]
        for name, places in shown.items()
        for k in places
        for label in result.labels
    }
    if rollout:
        scale = pictures.rollout_scale(values.values())
        values = {key: pictures.relative(m) for key, m in values.items()}
    else:
        scale = pictures.Scale(0.0, 1.0, "share of the largest value of FP32's map")
        tops = {(name, k): max(float(m.max()), 1e-12) for (name, k, label), m in values.items() if label == FP32}
        values = {key: m / tops[key[:2]] for key, m in values.items()}
    rows, titles = [], []
    for name, places in shown.items():
        view = result.sets[name]
        names = class_names(view.images if name == ID else None, result.reference)
        for k in places:
            photo = photograph(view.images, view.positions[k], result.reference.preprocess)
            cells = [pictures.Cell(photo)]
            for label in result.labels:
                drawn = pictures.overlay(photo, values[name, k, label], scale=scale)
                cells.append(pictures.Cell(drawn, *_prediction(view, label, k, names)))
            rows.append(cells)
            titles.append(_title(name, view, k, names))
    note = f"{result.method}; {result.settings.caption()}. One scale for all maps; the raw values are in maps.npz."
    heading = f"{result.model}: {result.settings.kind}"
    return pictures.grid(rows, titles, ["image", *result.labels], title=heading, note=note, scale=scale)


def norms_picture(result: AttentionResult, shown: Mapping[str, list[int]]) -> Image.Image:
    """Norms of the patch tokens after the last block; shown: as for :func:`maps_picture`."""
    seen = [result.sets[name].norms[FP32][k, -1] for name, places in shown.items() for k in places]
    scale = pictures.norm_scale(np.stack(seen))
    rows, titles = [], []
    for name, places in shown.items():
        view = result.sets[name]
        names = class_names(view.images if name == ID else None, result.reference)
        for k in places:
            rows.append([_norms(view, label, k, scale) for label in result.labels])
            titles.append(_title(name, view, k, names))
    note = (
        f"{result.method}. One scale for all pictures, that of FP32's norms. Large tokens: at least 1.5 times the "
        "lower quartile; outliers: at least 1.5 times the median, and more than six robust standard deviations above."
    )
    heading = f"Norms of patch tokens after {result.blocks[-1]}"
    return pictures.grid(rows, titles, result.labels, title=heading, note=note, scale=scale, side=NORM_SIDE)


def _norms(view: SetView, label: str, k: int, scale: pictures.Scale) -> pictures.Cell:
    norms = view.norms[label][k, -1]
    outliers, large = int(view.outliers[label][k, -1].sum()), int(view.large[label][k, -1].sum())
    drawn = pictures.heat(norms.reshape(view.maps[label].shape[1:]), scale=scale)
    counted = f"{outliers} outlier{'' if outliers == 1 else 's'}, {large} large"
    return pictures.Cell(drawn, (f"{norms.min():.1f} to {norms.max():.1f}", counted))


def _prediction(view: SetView, label: str, k: int, names: list[str] | None) -> tuple[tuple[str, str], bool]:
    """(class and probability, whether the class is another than FP32's)."""
    found, expected = int(view.predicted[label][k]), int(view.predicted[FP32][k])
    words = name_of(names, found) or f"class {found}"
    return (words, f"{100 * float(view.confidence[label][k]):.0f} %"), found != expected


def _title(name: str, view: SetView, k: int, names: list[str] | None) -> str:
    position, labels = view.positions[k], view.images.labels
    if labels is None or name != ID:
        return f"{name} {position}"
    truth = int(labels[position])
    return f"{name} {position}: {name_of(names, truth) or f'class {truth}'}"
