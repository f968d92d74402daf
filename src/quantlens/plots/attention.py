"""Drift of attention against bits: of a study, and of one model on several image sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from quantlens.attention.metrics import CHANGED, KL, OUTLIERS, OUTPUT_KL, OVERLAP, RANK, WHERE
from quantlens.plots.files import Figure
from quantlens.plots.lines import FAMILIES, GroupLines, drawn, family_widths, line_chart, panels_of, point, width_places
from quantlens.plots.style import Look, Panel, PanelRow, composed, finished
from quantlens.studies.board import Board
from quantlens.studies.drift import drift_of
from quantlens.studies.text import Stat

CURVES = (RANK, KL, OUTLIERS)
SHOWN = (RANK, KL, OUTLIERS, OVERLAP, CHANGED, OUTPUT_KL)

Drifts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Precision -> image set -> summary (:meth:`quantlens.attention.drift.Drift.summary`)."""


def drift(board: Board) -> list[PanelRow]:
    """Drift against bits: both operands, weights alone, activations alone; ID and OOD images side by side."""
    lines, rows = GroupLines(board), []
    for heading, x_label, width_of in FAMILIES:
        widths = family_widths(board, width_of)
        row = PanelRow(heading, large=True)
        if len(widths) > 1:
            places, order = width_places(board, widths, min(widths))
            for metric in CURVES:
                values = {title: partial(drift_of, where, metric) for where, title in WHERE.items()}
                words: dict[str, Any] = {"caption": metric.title, "label": metric.label, "digits": metric.digits}
                row.panels += panels_of(lines, places, order, values, x_label=x_label, **words)
        rows += [row] if row.panels else []
    return rows


def drift_figure(title: str, drifts: Drifts) -> Figure:
    """Drift curves of one model: a panel per metric, a line per image set."""
    sets = list(dict.fromkeys(name for by_set in drifts.values() for name in by_set))
    looks = {name: Look.numbered(i) for i, name in enumerate(sets)}
    panels = []
    for metric in SHOWN:
        rows = []
        for name in sets:
            for bits, by_set in drifts.items():
                spread = Stat.of([metric.of(by_set.get(name, {}))])
                rows.append(point(name, bits, spread and spread.scaled(metric.factor), metric.digits))
        rows = drawn(rows)
        if rows:
            chart = line_chart(rows, looks, list(drifts), y_label=metric.label)
            panels.append(Panel(chart, rows, metric.title))
    return Figure(finished(composed([PanelRow(title, panels)])))


def write_drift(title: str, drifts: Drifts, path: str | os.PathLike[str]) -> Path:
    """:func:`drift_figure` written to a file, in the format that its name ends in. Raises StorageError."""
    return drift_figure(title, drifts).save(path)
