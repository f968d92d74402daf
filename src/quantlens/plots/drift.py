"""Attention drift against bits: a panel per metric, a line per image set, as an SVG file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlens.attention.metrics import CHANGED, KL, OUTLIERS, OUTPUT_KL, OVERLAP, RANK, DriftMetric
from quantlens.files import write_whole
from quantlens.plots.style import file_style
from quantlens.plots.svg import Point, Series, Style, esc, line_chart, marker

SHOWN = (RANK, KL, OUTLIERS, OVERLAP, CHANGED, OUTPUT_KL)
WIDTH, HEIGHT = 1240, 660
PANEL_WIDTH, PANEL_HEIGHT = 400, 270

Drifts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Precision -> image set -> summary (:meth:`quantlens.attention.measure.Drift.summary`)."""


def drift_svg(title: str, drifts: Drifts) -> str:
    """Drift curves as one SVG file."""
    sets = list(dict.fromkeys(name for by_set in drifts.values() for name in by_set))
    body = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', _heading(16, 24, title), *_legend(sets)]
    for k, metric in enumerate(SHOWN):
        left, top = 16 + (k % 3) * (PANEL_WIDTH + 8), 70 + (k // 3) * (PANEL_HEIGHT + 26)
        body.append(
            f'<g transform="translate({left} {top})">{_heading(4, 0, metric.title)}'
            f'<g transform="translate(0 6)">{_panel(metric, sets, drifts)}</g></g>'
        )
    words = f"Drift of attention from FP32 at {', '.join(drifts)} on {', '.join(sets)}."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img"><title>{esc(title)}</title><desc>{esc(words)}</desc>'
        f"<style>{file_style()}</style>{''.join(body)}</svg>\n"
    )


def write_drift(title: str, drifts: Drifts, path: str | os.PathLike[str]) -> Path:
    """:func:`drift_svg` written to a file. Raises StorageError where that cannot be done."""
    write_whole(Path(path), drift_svg(title, drifts), what="the chart")
    return Path(path)


def _heading(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="14" fill="#1c2126">{esc(text)}</text>'


def _legend(sets: list[str]) -> list[str]:
    x, found = 16.0, []
    for i, name in enumerate(sets):
        style = Style.numbered(i)
        found.append(
            f'<g class="{style.classes}"><path class="l" d="M{x} 44h24"/>{marker(style.marker, x + 12, 44, "")}</g>'
            f'<text class="t" x="{x + 30}" y="48">{esc(name)}</text>'
        )
        x += 46 + 7.5 * len(name)
    return found


def _panel(metric: DriftMetric, sets: list[str], drifts: Drifts) -> str:
    series = []
    for i, name in enumerate(sets):
        points: list[Point | None] = []
        for at, (bits, by_set) in enumerate(drifts.items()):
            value = metric.of(by_set.get(name, {}))
            tip = f"{name}, {bits}: {value:.4g}" if value is not None else ""
            points.append(None if value is None else Point(float(at), value * metric.factor, None, tip))
        series.append(Series(name, Style.numbered(i), i, points))
    tips = [p.tip for one in series for p in one.points if p is not None]
    drawn = line_chart(
        series,
        [(float(at), bits) for at, bits in enumerate(drifts)],
        title=metric.title,
        description=f"{metric.title}. {'. '.join(tips)}.",
        y_label=metric.label,
        floor=metric.floor,
        ceiling=metric.ceiling,
    )
    return drawn.replace("<svg ", f'<svg width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" ', 1)
