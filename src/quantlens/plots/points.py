"""Figures of single marks: drift against the change of AUPR-out, exported files by latency, every layer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from quantlens.attention.metrics import CAUSES, WHERE
from quantlens.errors import QuantlensError
from quantlens.metrics import METRICS
from quantlens.plots.precisions import SHOWN, GroupLines
from quantlens.plots.style import INK, MUTED, PAPER, Look, Panel, PanelRow, Rows, encodings, one_row, tooltips
from quantlens.studies.board import Board
from quantlens.studies.choices import Place, choice_score, places
from quantlens.studies.drift import Link, links
from quantlens.studies.text import count, fixed, score_label

KINDS = {"linear and convolution layers": ("linear", "conv"), "attention products": ("scores", "probs", "context")}
OTHER = "other sites"
FRONT = {"on the Pareto front": Look(0), "not on it, or not evaluated": Look(1, 1)}


def marks(rows: Rows, looks: Mapping[str, Look], **encoded: Any) -> Any:
    """A mark per row, as the name in its "line" looks; its words as a tooltip."""
    used = encodings({name: look for name, look in looks.items() if any(row["line"] == name for row in rows)})
    del used["strokeDash"]
    return (
        alt.Chart()
        .transform_filter(SHOWN)
        .mark_point(filled=True, opacity=0.9, size=45, stroke=PAPER, strokeWidth=0.6)
        .encode(**used, **encoded, tooltip=tooltips(line="line", said="is"))
    )


# -- drift and the change of AUPR-out ---------------------------------------------------------------------------------
def association(board: Board) -> list[PanelRow]:
    """The change of AUPR-out against the two first metrics of drift, a mark per quantized cell."""
    lines = GroupLines(board)
    return one_row((scatter(link, lines) for link in links(board) if link.metric in CAUSES[:2]), large=True)


def scatter(link: Link, lines: GroupLines) -> Panel:
    """The change of AUPR-out against a metric of drift."""
    found, metric = link.found, link.metric
    rho = "too few cells for a correlation" if found.spearman is None else f"Spearman {fixed(found.spearman, 2)}"
    interval = "" if found.low is None else f" (95 % {fixed(found.low, 2)} to {fixed(found.high, 2)})"
    words = f"on {WHERE[link.where]} · {rho}{interval}, {count(found.n, 'cell')}"
    rows = []
    for pair in link.pairs:
        drifted, changed = fixed(pair.x, metric.digits), fixed(pair.y, 1, sign=True)
        said = f"{pair.group.name}, {pair.bits}, seed {pair.seed}: drift {drifted}, Δ AUPR-out {changed} points"
        rows.append({"line": lines.name(pair.group), "x": pair.x, "y": pair.y, "said": said})
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=MUTED).encode(y="zero:Q")
    shown = marks(rows, lines.looks, x=alt.X("x:Q", title=metric.label), y=alt.Y("y:Q", title="Δ AUPR-out, points"))
    return Panel(alt.layer(zero, shown).properties(height=230), rows, metric.title, words, "lines scatter")


# -- exported files ---------------------------------------------------------------------------------------------------
def latency(board: Board) -> list[PanelRow]:
    """Top-1 and AUPR-out against latency, a numbered mark per exported file: a row per place of measurement."""
    rows = []
    for place in places(board):
        top1, aupr = ([getattr(choice, name) for choice in place.choices] for name in ("top1", "aupr"))
        by_score = f"AUPR-out by {score_label(choice_score(board))}"
        panels = [latency_panel(place, top1, "top1", "Top-1"), latency_panel(place, aupr, "aupr_out", by_score)]
        rows += one_row(panels, heading=place.heading, large=True)
    return rows


def latency_panel(place: Place, values: Sequence[float | None], metric: str, title: str) -> Panel | None:
    """A metric of each file against its median latency; the area of a mark grows with the size of its file. None
    without a value."""
    rows = []
    on, off = FRONT
    for i, (choice, value) in enumerate(zip(place.choices, values, strict=True)):
        if value is not None:
            size = "" if choice.size is None else f", {fixed(choice.size, 2)} MB"
            row = {"line": on if place.front[i] == i else off, "number": i + 1, "x": choice.latency, "y": 100 * value}
            said = f"{i + 1}. {choice.name}: {fixed(100 * value, 2)} % in {fixed(choice.latency, 2)} ms{size}"
            rows.append({**row, "size": choice.size or 0.0, "said": said})
    if not rows:
        return None
    area = alt.Size("size:Q", scale=alt.Scale(range=[30, 300], zero=True), legend=None)
    x = alt.X("x:Q", title="median latency, ms", scale=alt.Scale(zero=True))
    y = alt.Y("y:Q", title=METRICS[metric].label, scale=alt.Scale(zero=False, padding=14))
    numbers = alt.Chart().mark_text(dy=-14, color=INK, fontSize=11).encode(x="x:Q", y="y:Q", text="number:N")
    chart = alt.layer(marks(rows, FRONT, x=x, y=y, size=area), numbers).properties(height=250)
    return Panel(chart, rows, f"{title} against latency", "numbers as in the table; area: file size", "decision")


# -- which layer hurts ------------------------------------------------------------------------------------------------
def inspected(board: Board) -> list[Any]:
    """The inspections of a study. Raises QuantlensError for one without metrics, or of a newer quantlens."""
    from quantlens.sensitivity import Inspection

    found = []
    for cell in board.inspections:
        data = cell.result.get("inspection")
        if not isinstance(data, dict):
            raise QuantlensError(f"the inspection {cell.key[:24]} of the store holds no figures; run the study again")
        found.append(Inspection.from_dict(data))
    return found


def layers(board: Board) -> list[PanelRow]:
    """Every site of each inspected model alone."""
    return [PanelRow(found.model, [panel]) for found in inspected(board) if (panel := effects(found)) is not None]


def effects(found: Any) -> Panel | None:
    """SQNR of every site in execution order, a mark each; None where none has any noise."""
    looks = {name: Look(i, i) for i, name in enumerate([*KINDS, OTHER])}
    rows = []
    starts: dict[str, int] = {}
    for i, part in enumerate(found.sites):
        if part.block is not None:
            starts.setdefault(part.block, i)
        if part.effect.sqnr_db is not None:
            kind = next((name for name, kinds in KINDS.items() if part.kind in kinds), OTHER)
            said = f"{part.name}, {part.bits}: {fixed(part.effect.sqnr_db, 1)} dB"
            rows.append({"line": kind, "x": i, "y": part.effect.sqnr_db, "said": said})
    if not rows:
        return None
    at = list(starts.values())
    axis = alt.Axis(values=at, labelExpr=f"indexof({at}, datum.value)", labelOverlap=True)
    x = alt.X(
        "x:Q", title="execution order, by block", axis=axis, scale=alt.Scale(domain=[-1, len(found.sites)], nice=False)
    )
    y = alt.Y("y:Q", title="SQNR of the logits, dB: low marks hurt", scale=alt.Scale(zero=False))
    chart = marks(rows, looks, x=x, y=y).properties(height=250)
    return Panel(chart, rows, f"Every site alone at {found.bits}", found.model, "effects")
