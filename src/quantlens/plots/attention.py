"""Drift of attention against bits: of a study, and of one model on several image sets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlens.attention.metrics import CHANGED, KL, OUTLIERS, OUTPUT_KL, OVERLAP, RANK, WHERE, DriftMetric
from quantlens.metrics import Spread
from quantlens.plots.files import Figure
from quantlens.plots.lines import FAMILIES, GroupLines, drawn, family_widths, line_chart, point, width_places
from quantlens.plots.style import Look, Panel, PanelRow, composed, finished
from quantlens.studies.board import Board
from quantlens.studies.drift import drift_of

CURVES = (RANK, KL, OUTLIERS)
SHOWN = (RANK, KL, OUTLIERS, OVERLAP, CHANGED, OUTPUT_KL)

Drifts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Precision -> image set -> summary (:meth:`quantlens.attention.measure.Drift.summary`)."""


def drift(board: Board) -> list[PanelRow]:
    """Drift against bits: both operands, weights alone, activations alone; ID and OOD images apart."""
    lines, rows = GroupLines(board), []
    for heading, x_label, width_of in FAMILIES:
        widths = family_widths(board, width_of)
        if len(widths) < 2:
            continue
        places, order = width_places(board, widths, min(widths))
        panels: dict[str, list[Panel]] = {where: [] for where in WHERE}
        for metric in CURVES:
            by_panel = [
                (where, name, _rows(lines, groups, places, where, metric))
                for where in WHERE
                for name, groups in lines.facets()
            ]
            everything = [row for *_, rows_there in by_panel for row in rows_there]
            for where, name, found in by_panel:
                if found:
                    chart = line_chart(
                        found, lines.looks, order, y_label=metric.label, x_label=x_label, range_of=everything
                    )
                    detail = " · ".join(filter(None, [WHERE[where], name]))
                    panels[where].append(Panel(chart, found, metric.title, detail))
        if any(panels.values()):
            rows.append(PanelRow(heading, [panel for there in panels.values() for panel in there]))
    return rows


def _rows(
    lines: GroupLines, groups: Sequence[Any], places: Sequence[tuple[str, str]], where: str, metric: DriftMetric
) -> list[dict[str, Any]]:
    return drawn(
        point(lines.name(group), x, drift_of(group, bits, where, metric), metric.digits)
        for group in groups
        for x, bits in places
    )


def drift_figure(title: str, drifts: Drifts) -> Figure:
    """Drift curves of one model: a panel per metric, a line per image set."""
    sets = list(dict.fromkeys(name for by_set in drifts.values() for name in by_set))
    looks = {name: Look.numbered(i) for i, name in enumerate(sets)}
    panels = []
    for metric in SHOWN:
        rows = []
        for name in sets:
            for bits, by_set in drifts.items():
                spread = Spread.of([metric.of(by_set.get(name, {}))])
                rows.append(point(name, bits, spread and spread.scaled(metric.factor), metric.digits))
        rows = drawn(rows)
        if rows:
            chart = line_chart(rows, looks, list(drifts), y_label=metric.label)
            panels.append(Panel(chart, rows, metric.title))
    return Figure(finished(composed([PanelRow(title, panels)])))


def write_drift(title: str, drifts: Drifts, path: str | os.PathLike[str]) -> Path:
    """:func:`drift_figure` written to a file, in the format that its name ends in. Raises StorageError."""
    return drift_figure(title, drifts).save(path)
