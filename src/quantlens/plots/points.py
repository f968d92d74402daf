"""Figures of single marks: drift against the change of AUPR-out, exported files by latency, every layer alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from quantlens.attention.metrics import CAUSES, WHERE
from quantlens.errors import QuantlensError
from quantlens.metrics import METRICS
from quantlens.plots.lines import SHOWN, GroupLines
from quantlens.plots.style import INK, MUTED, PAPER, Look, Panel, PanelRow, Rows, encodings
from quantlens.studies.board import Board
from quantlens.studies.choices import Place, choice_score, places
from quantlens.studies.drift import Pair, links
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
        .encode(**used, **encoded, tooltip=[alt.Tooltip("line:N", title="line"), alt.Tooltip("said:N", title="is")])
    )


# -- drift and the change of AUPR-out ---------------------------------------------------------------------------------
def association(board: Board) -> list[PanelRow]:
    """The change of AUPR-out against the two first metrics of drift, a mark per quantized cell."""
    lines, row = GroupLines(board), PanelRow("", large=True)
    for link in links(board):
        if link.metric in CAUSES[:2]:
            found = link.found
            rho = (
                "too few cells for a correlation" if found.spearman is None else f"Spearman {fixed(found.spearman, 2)}"
            )
            interval = "" if found.low is None else f" (95 % {fixed(found.low, 2)} to {fixed(found.high, 2)})"
            words = f"on {WHERE[link.where]} · {rho}{interval}, {count(found.n, 'cell')}"
            rows = [_cell(pair, link.metric.digits, lines) for pair in link.pairs]
            row.panels.append(
                Panel(scatter(rows, link.metric.label, lines), rows, link.metric.title, words, "lines scatter")
            )
    return [row] if row.panels else []


def _cell(pair: Pair, digits: int, lines: GroupLines) -> dict[str, Any]:
    said = f"{pair.group.name}, {pair.bits}, seed {pair.seed}: drift {fixed(pair.x, digits)}"
    said += f", Δ AUPR-out {fixed(pair.y, 1, sign=True)} points"
    return {"line": lines.name(pair.group), "x": pair.x, "y": pair.y, "said": said}


def scatter(rows: Rows, label: str, lines: GroupLines) -> Any:
    """The change of AUPR-out against drift, whose axis `label` names."""
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=MUTED).encode(y="zero:Q")
    shown = marks(rows, lines.looks, x=alt.X("x:Q", title=label), y=alt.Y("y:Q", title="Δ AUPR-out, points"))
    return alt.layer(zero, shown).properties(height=230)


# -- exported files ---------------------------------------------------------------------------------------------------
def latency(board: Board) -> list[PanelRow]:
    """Top-1 and AUPR-out against latency, a numbered mark per exported file: a row per place of measurement."""
    titles = {
        "top1": "Top-1 against latency",
        "aupr_out": f"AUPR-out by {score_label(choice_score(board))} against latency",
    }
    rows = []
    for place in places(board):
        panels = []
        for metric, title in titles.items():
            files = file_rows(place, metric)
            if files:
                chart = latency_chart(files, METRICS[metric].label)
                panels.append(Panel(chart, files, title, "numbers as in the table; area: file size", "decision"))
        if panels:
            rows.append(PanelRow(place.heading, panels, large=True))
    return rows


def file_rows(place: Place, metric: str) -> list[dict[str, Any]]:
    """A row per file that has the metric ("top1", "aupr_out")."""
    found = []
    on, off = FRONT
    for i, choice in enumerate(place.choices):
        value = choice.top1 if metric == "top1" else choice.aupr
        if value is not None:
            size = "" if choice.size is None else f", {fixed(choice.size, 2)} MB"
            row = {"line": on if place.front[i] == i else off, "number": i + 1, "x": choice.latency, "y": 100 * value}
            said = f"{i + 1}. {choice.name}: {fixed(100 * value, 2)} % in {fixed(choice.latency, 2)} ms{size}"
            found.append({**row, "size": choice.size or 0.0, "said": said})
    return found


def latency_chart(rows: list[dict[str, Any]], label: str) -> Any:
    """A metric against median latency; the area of a mark grows with the size of its file."""
    size = alt.Size("size:Q", scale=alt.Scale(range=[30, 300], zero=True), legend=None)
    x = alt.X("x:Q", title="median latency, ms", scale=alt.Scale(zero=True))
    y = alt.Y("y:Q", title=label, scale=alt.Scale(zero=False, padding=14))
    numbers = alt.Chart().mark_text(dy=-14, color=INK, fontSize=11)
    shown = marks(rows, FRONT, x=x, y=y, size=size)
    return alt.layer(shown, numbers.encode(x="x:Q", y="y:Q", text="number:N")).properties(height=250)


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
    names = [*KINDS, OTHER]
    starts: dict[str, int] = {}
    rows = []
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
    chart = marks(rows, {name: Look(i, i) for i, name in enumerate(names)}, x=x, y=y).properties(height=250)
    return Panel(chart, rows, f"Every site alone at {found.bits}", found.model, "effects")
