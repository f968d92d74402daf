"""The pictures of a comparison, drawn by Altair: maps laid over images, and norms of patch tokens, as in Figure 2 of
Kuang and Wong (2026): images in rows, models in columns, the colour bar and the settings below."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from quantlens.attention import pictures
from quantlens.attention.image_sets import FP32, SetView, name_of, truth_of
from quantlens.models.loading import class_names

if TYPE_CHECKING:
    from quantlens.attention.comparison import AttentionResult

ID = "ID"
SIDE = 160
INK, MUTED, MARKED = "#1c2126", "#5a646e", "#a23b00"

Cell = dict[str, Any]
"""A picture of a grid: its row and column, the image as a data URI, two lines under it, and whether the first line is
set in colour."""


def maps_picture(result: AttentionResult, shown: Mapping[str, list[int]]) -> bytes:
    """Maps of every model over each image, with predicted class and probability, as a PNG file. shown: of each set the
    images, as places in its :class:`SetView`."""
    if result.settings.kind == "rollout":
        scale = pictures.rollout_scale(v.maps[m][k] for v, k, _, _ in _images(result, shown) for m in result.labels)
    else:
        scale = pictures.Scale(label="share of the largest value of FP32's map")
    cells = []
    for view, k, names, row in _images(result, shown):
        photo = pictures.photograph(view.images, view.positions[k], result.reference.preprocess)
        cells.append(cell(row, "image", photo))
        top = max(float(view.maps[FP32][k].max()), 1e-12)
        for label in result.labels:
            values = view.maps[label][k]
            relative = pictures.relative(values) if result.settings.kind == "rollout" else values / top
            words, marked = ("", ""), False
            if view.predicted:
                found, expected = int(view.predicted[label][k]), int(view.predicted[FP32][k])
                words = name_of(names, found) or f"class {found}", f"{100 * float(view.confidence[label][k]):.0f} %"
                marked = found != expected
            cells.append(cell(row, label, pictures.overlay(photo, relative, scale), *words, marked=marked))
    note = f"{result.method}; {result.settings.caption()}. One scale for all maps; the raw values are in maps.npz."
    return grid(cells, f"{result.model}: {result.settings.kind}", note, scale)


def norms_picture(result: AttentionResult, shown: Mapping[str, list[int]]) -> bytes:
    """Norms of the patch tokens after the last block; shown: as for :func:`maps_picture`."""
    images = list(_images(result, shown))
    scale = pictures.norm_scale(np.stack([view.norms[FP32][k, -1] for view, k, _, _ in images]))
    cells = []
    for view, k, _, row in images:
        for label in result.labels:
            norms = view.norms[label][k, -1]
            outliers, large = int(view.outliers[label][k, -1].sum()), int(view.large[label][k, -1].sum())
            counted = f"{outliers} outlier{'' if outliers == 1 else 's'}, {large} large"
            drawn = pictures.heat(norms.reshape(view.maps[label].shape[1:]), scale)
            cells.append(cell(row, label, drawn, f"{norms.min():.1f} to {norms.max():.1f}", counted))
    note = (
        f"{result.method}. One scale for all pictures, that of FP32's norms. Large tokens: at least 1.5 times the "
        "lower quartile; outliers: at least 1.5 times the median, and more than six robust standard deviations above."
    )
    return grid(cells, f"Norms of patch tokens after {result.blocks[-1]}", note, scale)


def _images(
    result: AttentionResult, shown: Mapping[str, list[int]]
) -> Iterator[tuple[SetView, int, list[str] | None, str]]:
    """(view of the set, place in it, names of the classes, title) of every image shown."""
    for name, places in shown.items():
        view = result.sets[name]
        names = class_names(view.images if name == ID else None, result.reference)
        for k in places:
            title = f"{name} {view.positions[k]}"
            truth, called = truth_of(view.images, view.positions[k], names) if name == ID else (None, None)
            if truth is not None:
                title += f": {called or f'class {truth}'}"
            yield view, k, names, title


def cell(row: str, column: str, image: Image.Image, first: str = "", second: str = "", *, marked: bool = False) -> Cell:
    """A :data:`Cell`."""
    how = Image.Resampling.NEAREST if max(image.size) < 40 else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    image.resize((SIDE, SIDE), how).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"row": row, "column": column, "image": uri, "first": first, "second": second, "marked": marked}


def grid(cells: Sequence[Cell], title: str, note: str, scale: pictures.Scale) -> bytes:
    """Pictures in rows and columns as a PNG file, below them the scale as a colour bar, and the note. Titles and lines
    that are too long for their place end in "…"."""
    import altair as alt
    import vl_convert

    rows, columns = (len({one[key] for one in cells}) for key in ("row", "column"))
    width, plain = columns * (SIDE + 8), {"title": None, "sort": None}
    axis = {"domain": False, "ticks": False, "labelFontSize": 14, "labelColor": INK, "labelLimit": 200}
    base = alt.Chart(alt.Data(values=list(cells))).encode(
        x=alt.X("column:N", axis=alt.Axis(orient="top", labelAngle=0, **axis), **plain),
        y=alt.Y("row:N", axis=alt.Axis(**axis), **plain),
    )
    words = {"limit": SIDE, "fontSize": 13}
    ink = alt.condition("datum.marked", alt.value(MARKED), alt.value(INK))
    ends = alt.Scale(
        domain=[scale.low, scale.high],
        range=[f"#{colour}" for colour in scale.colours.split()],
        type="log" if scale.log else "linear",
        nice=False,
    )
    said = f"{scale.label}, {scale.low:.3g} to {scale.high:.3g} and more"
    bar = alt.Legend(title=said, orient="bottom", direction="horizontal", gradientLength=240, titleLimit=width + 100)
    layers = [
        base.mark_image(width=SIDE, height=SIDE).encode(url="image:N"),
        base.mark_text(dy=SIDE / 2 + 9, **words).encode(text="first:N", color=ink),
        base.mark_text(dy=SIDE / 2 + 25, color=MUTED, **words).encode(text="second:N"),
        alt.Chart(alt.Data(values=[{"value": scale.low}]))
        .mark_point(opacity=0)
        .encode(fill=alt.Fill("value:Q", scale=ends, legend=bar)),
    ]
    heading = alt.Title(title, anchor="start", fontSize=14, color=INK, limit=width + 150)
    lines = textwrap.wrap(note, (width + 100) // 6)
    below = alt.Title(lines, orient="bottom", anchor="start", fontWeight="normal", color=MUTED)
    drawn = alt.layer(*layers).properties(width=width, height=rows * (SIDE + 44), title=heading)
    whole = alt.vconcat(drawn).properties(title=below).configure_view(stroke=None)
    return bytes(vl_convert.vegalite_to_png(whole.to_dict(validate=False)))
