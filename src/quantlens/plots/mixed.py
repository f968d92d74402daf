"""Mixed precision: the Pareto front of an allocation, and the widths it chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from quantlens.plots.points import marks
from quantlens.plots.style import COLOURS, INK, Look, Panel, PanelRow, Rows, encodings, one_row, tooltips
from quantlens.studies.board import Board
from quantlens.studies.text import fixed

UNITS = {"size": (1e6, "MB", "size of the packed model"), "bops": (1e9, "G", "bit operations of one image")}
KINDS = ("attention", "MLP")


def front(frontier: Mapping[str, Any], caption: str, detail: str = "") -> Panel | None:
    """Total sensitivity (logarithmic) against cost: the front, the uniform models, and the choice; None without points.

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
    if not rows:
        return None
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
            "line": group["kind"] if group["kind"] in KINDS else KINDS[1],
            "x": blocks.index(str(group["block"])),
            "y": int(group["bits"]),
            "said": f"{group['name']}: {group['bits']} bits",
        }
        for group in groups
    ]
    base = alt.Chart().encode(
        x=alt.X("x:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        xOffset=alt.XOffset("line:N", scale=alt.Scale(domain=list(KINDS))),
        y=alt.Y("y:Q", title="bits", axis=alt.Axis(tickMinStep=1)),
    )
    bars = base.mark_bar().encode(
        color=encodings({kind: Look(i) for i, kind in enumerate(KINDS)})["color"],
        tooltip=tooltips(said="width"),
    )
    words = base.mark_text(dy=-5, fontSize=9.5, color=INK).encode(text="y:Q")
    return Panel(alt.layer(bars, words).properties(height=170), rows, caption, detail, "widths")


def mixed_cells(board: Board) -> list[tuple[str, Mapping[str, Any]]]:
    """(model, bits and seed of a cell; its allocation) of the cells with mixed precision; methods that share widths
    count once."""
    found: dict[str, Mapping[str, Any]] = {}
    cells = [(g, bits, result) for g in board.groups for bits, results in g.cells.items() for result in results]
    for group, bits, result in cells:
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
