"""Histograms and reliability diagrams as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantlens.plots.svg import Frame, coord, esc, marker, nice_ticks, tick_text


@dataclass(frozen=True)
class Outline:
    """One histogram drawn as an outline: bin edges (n + 1), heights (n), a css class and its words."""

    edges: Sequence[float]
    heights: Sequence[float]
    css: str
    tip: str


def histogram(
    outlines: Sequence[Outline],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    labelled: bool = True,
) -> str:
    """Overlaid histogram outlines on common axes; not `labelled`: without numbers on the y axis."""
    low = min(o.edges[0] for o in outlines)
    high = max(o.edges[-1] for o in outlines)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    peak = max((max(o.heights) for o in outlines), default=0.0) or 1.0
    ticks = nice_ticks(0.0, peak, 3)
    frame = Frame((low, high), (0.0, ticks[-1]), height=210, left=32, right=8, top=26)
    frame.grid_y(ticks, labelled=labelled)
    marks = [t for t in nice_ticks(low, high, 5) if low - 1e-9 <= t <= high + 1e-9]
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    frame.axis_x((t, tick_text(t, step)) for t in marks)
    frame.labels(x_label, y_label)
    for outline in outlines:
        frame.body.append(
            f'<path class="h {outline.css}" d="{steps(frame, outline)}"><title>{esc(outline.tip)}</title></path>'
        )
    return frame.svg(title, description, "hist")


def steps(frame: Frame, outline: Outline) -> str:
    """The outline as a path: up or down to each height (whole units), right along its bin; equal neighbours
    are one step."""
    at = round(frame.y(0.0))
    base, path = at, f"M{coord(frame.x(outline.edges[0]))} {at}"
    tops = [round(frame.y(height)) for height in outline.heights]
    for i, top in enumerate(tops):
        if top != at:
            path += f"v{top - at}"
            at = top
        if i + 1 == len(tops) or tops[i + 1] != top:
            path += f"H{coord(frame.x(outline.edges[i + 1]))}"
    return path + f"V{base}"


@dataclass(frozen=True)
class Reliability:
    """One reliability curve: confidence, accuracy and share of images per filled bin, and its css class."""

    bins: Sequence[tuple[float, float, float]]
    css: str
    name: str


def reliability_diagram(curves: Sequence[Reliability], *, title: str, description: str) -> str:
    """Accuracy against confidence (percent); marker area grows with the bin's share of images; the diagonal
    is perfect."""
    frame = Frame((0.0, 100.0), (0.0, 100.0), width=360, height=330, top=26)
    frame.grid_y([0, 20, 40, 60, 80, 100])
    frame.axis_x((t, str(t)) for t in (0, 20, 40, 60, 80, 100))
    frame.labels("confidence %", "accuracy %")
    frame.body.append(
        f'<path class="ch" d="M{frame.left} {frame.height - frame.bottom}L{frame.width - frame.right} {frame.top}"/>'
    )
    for curve in curves:
        places = [(frame.x(100 * c), frame.y(100 * a)) for c, a, _ in curve.bins]
        path = "M" + "L".join(f"{coord(x)} {coord(y)}" for x, y in places)
        marks = "".join(
            marker(
                0,
                x,
                y,
                f"{curve.name}: confidence {100 * c:.1f} %, accuracy {100 * a:.1f} %, "
                f"{100 * share:.1f} % of the images",
                2 + 7 * math.sqrt(share),
            )
            for (x, y), (c, a, share) in zip(places, curve.bins, strict=True)
        )
        frame.body.append(f'<g class="s {curve.css}"><path class="l" d="{path}"/>{marks}</g>')
    return frame.svg(title, description, "reliability")
