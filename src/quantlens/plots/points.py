"""Figures of single marks: drift against the change of AUPR-out, exported files by latency, every layer alone, and the
Pareto fronts and widths of mixed precision."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from quantlens.attention.metrics import CAUSES, WHERE
from quantlens.metrics import METRICS
from quantlens.plots.precisions import SHOWN, GroupLines
from quantlens.plots.style import COLOURS, INK, MUTED, PAPER, Look, Panel, PanelRow, Rows, encodings, one_row, tooltips
from quantlens.studies.board import Board
from quantlens.studies.choices import Place, choice_score, judged_by, places
from quantlens.studies.drift import Link, links
from quantlens.studies.text import count, fixed, metric_title, score_label

KINDS = {"linear and convolution layers": ("linear", "conv"), "attention products": ("scores", "probs", "context")}
OTHER = "other sites"
UNITS = {"size": (1e6, "MB", "size of the packed model"), "bops": (1e9, "G", "bit operations of one image")}
GROUPS = ("attention", "MLP")
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
    for group, bits, seed, x, y in link.pairs:
        drifted, changed = fixed(x, metric.digits), fixed(y, 1, sign=True)
        said = f"{group.name}, {bits}, seed {seed}: drift {drifted}, Δ AUPR-out {changed} points"
        rows.append({"line": lines.name(group), "x": x, "y": y, "said": said})
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=MUTED).encode(y="zero:Q")
    shown = marks(rows, lines.looks, x=alt.X("x:Q", title=metric.label), y=alt.Y("y:Q", title="Δ AUPR-out, points"))
    return Panel(alt.layer(zero, shown).properties(height=230), rows, metric.title, words, "lines scatter")


# -- exported files ---------------------------------------------------------------------------------------------------
def latency(board: Board) -> list[PanelRow]:
    """Top-1 (of a detector mAP) and AUPR-out against latency, a numbered mark per exported file: a row per place
    of measurement."""
    rows, judged = [], judged_by(board)[0]
    for place in places(board):
        values, aupr = ([getattr(choice, name) for choice in place.choices] for name in ("first", "aupr"))
        by_score = f"AUPR-out by {score_label(choice_score(board))}"
        shown = (values, judged, metric_title(judged)), (aupr, "aupr_out", by_score)
        panels = [latency_panel(place, *one) for one in shown]
        rows += one_row(panels, heading=place.heading, large=True)
    return rows


def latency_panel(place: Place, values: Sequence[float | None], metric: str, title: str) -> Panel:
    """A metric of each file against its median latency; the area of a mark grows with the size of its file."""
    rows = []
    on, off = FRONT
    for i, (choice, value) in enumerate(zip(place.choices, values, strict=True)):
        if value is not None:
            size = "" if choice.size is None else f", {fixed(choice.size, 2)} MB"
            row = {"line": on if place.front[i] == i else off, "number": i + 1, "x": choice.latency, "y": 100 * value}
            said = f"{i + 1}. {choice.name}: {fixed(100 * value, 2)} % in {fixed(choice.latency, 2)} ms{size}"
            rows.append({**row, "size": choice.size or 0.0, "said": said})
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

    return [Inspection.from_dict(cell.result.get("inspection") or {}) for cell in board.inspections]


def layers(board: Board) -> list[PanelRow]:
    """Every site of each inspected model alone."""
    return [row for found in inspected(board) for row in one_row([effects(found)], heading=found.model)]


def effects(found: Any) -> Panel:
    """SQNR of every site in execution order, a mark each of those that have any noise."""
    looks = {name: Look(i, i) for i, name in enumerate([*KINDS, OTHER])}
    rows = []
    for i, part in enumerate(found.sites):
        if part.effect.sqnr_db is not None:
            kind = next((name for name, kinds in KINDS.items() if part.kind in kinds), OTHER)
            said = f"{part.name}, {part.bits}: {fixed(part.effect.sqnr_db, 1)} dB"
            rows.append({"line": kind, "x": i, "y": part.effect.sqnr_db, "said": said})
    blocks = [part.block for part in found.sites]
    at = [blocks.index(block) for block in dict.fromkeys(blocks) if block is not None]
    axis = alt.Axis(values=at, labelExpr=f"indexof({at}, datum.value)", labelOverlap=True)
    x = alt.X(
        "x:Q", title="execution order, by block", axis=axis, scale=alt.Scale(domain=[-1, len(found.sites)], nice=False)
    )
    y = alt.Y("y:Q", title="SQNR of the logits, dB: low marks hurt", scale=alt.Scale(zero=False))
    chart = marks(rows, looks, x=x, y=y).properties(height=250)
    return Panel(chart, rows, f"Every site alone at {found.bits}", found.model, "effects")


# -- mixed precision --------------------------------------------------------------------------------------------------
def front(frontier: Mapping[str, Any], caption: str, detail: str = "") -> Panel:
    """Total sensitivity (logarithmic) against cost: the front, the uniform models, and the choice.

    frontier: what :meth:`quantlens.allocation.Allocation.frontier` gives.
    """
    unit, name, what = UNITS[frontier["cost"]]
    chosen = str(frontier["name"])
    points = [("Pareto front", "", cost, loss) for cost, loss in frontier["points"]]
    points += [("one width everywhere", f"W{b}A{b}, ", cost, loss) for b, cost, loss in frontier["uniform"]]
    points.append((chosen, f"{chosen}, ", *frontier["chosen"]))
    rows = [
        {"line": line, "x": cost / unit, "y": loss, "said": f"{label}{cost / unit:.3f} {name}: {loss:.3g}"}
        for line, label, cost, loss in points
        if loss > 0
    ]
    looks = {"Pareto front": Look(0), "one width everywhere": Look(1, 1), chosen: Look(2, 2)}
    x = alt.X("x:Q", title=f"{what}, {name}", scale=alt.Scale(zero=False))
    y = alt.Y("y:Q", title="total sensitivity", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e", tickCount=4))
    shown = marks(rows, looks, x=x, y=y, order=alt.Order("x:Q"))
    line = alt.Chart().transform_filter("datum.line == 'Pareto front'").mark_line(strokeWidth=1, color=COLOURS[0])
    chart = alt.layer(line.encode(x=x, y=y), shown).properties(height=260)
    return Panel(chart, rows, caption, detail, "front")


def widths_of(groups: Rows, caption: str, detail: str = "") -> Panel:
    """The width of the attention and of the MLP of every block, as bars side by side.

    groups: name, kind, block and bits of each, in execution order.
    """
    blocks = list(dict.fromkeys(str(g["block"]) for g in groups))
    rows = [
        {
            "line": group["kind"] if group["kind"] in GROUPS else GROUPS[1],
            "x": blocks.index(str(group["block"])),
            "y": int(group["bits"]),
            "said": f"{group['name']}: {group['bits']} bits",
        }
        for group in groups
    ]
    base = alt.Chart().encode(
        x=alt.X("x:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        xOffset=alt.XOffset("line:N", scale=alt.Scale(domain=list(GROUPS))),
        y=alt.Y("y:Q", title="bits", axis=alt.Axis(tickMinStep=1)),
    )
    bars = base.mark_bar().encode(
        color=encodings({kind: Look(i) for i, kind in enumerate(GROUPS)})["color"],
        tooltip=tooltips(said="width"),
    )
    words = base.mark_text(dy=-5, fontSize=9.5, color=INK).encode(text="y:Q")
    return Panel(alt.layer(bars, words).properties(height=170), rows, caption, detail, "widths")


def mixed_cells(board: Board) -> list[tuple[str, Mapping[str, Any]]]:
    """(model, bits and seed of a cell; its allocation) of the cells with mixed precision; methods that share widths
    count once."""
    found: dict[str, Mapping[str, Any]] = {}
    for group, bits, result in board.cells:
        allocation = result.get("allocation")
        if isinstance(allocation, Mapping) and allocation.get("groups"):
            seed = f", seed {result['seed']}" if len(board.seeds) > 1 else ""
            model = f"{group.model} " if len(board.models) > 1 else ""
            found.setdefault(f"{model}{bits}{seed}", allocation)
    return list(found.items())


def widths(board: Board) -> list[PanelRow]:
    """The widths of a study's cells with mixed precision."""
    panels = []
    for name, allocation in mixed_cells(board):
        unit, label, _ = UNITS.get(str(allocation.get("cost")), UNITS["size"])
        spent, allowed = (fixed(allocation[key] / unit, 2) for key in ("total", "budget"))
        facts = f"{allocation['sensitivity']}; {spent} of {allowed} {label}, {fixed(allocation['seconds'], 1)} s"
        panels.append(widths_of(allocation["groups"], name, facts))
    return one_row(panels, large=True)


def fronts(board: Board) -> list[PanelRow]:
    """The Pareto fronts that the widths of a study were chosen from."""
    with_front = [(name, a) for name, a in mixed_cells(board) if (a.get("frontier") or {}).get("points")]
    return one_row((front(a["frontier"], name, a["sensitivity"]) for name, a in with_front), large=True)
