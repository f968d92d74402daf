"""Mixed precision on the page: the Pareto front of an allocation, the widths it chose, and the widths of a study's
MPn cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quantlens.files import write_whole
from quantlens.plots import svg
from quantlens.plots.svg import Frame, Point, Series, Style, coord, esc
from quantlens.report.charts import Panel
from quantlens.report.collect import Board, dig
from quantlens.report.page import page
from quantlens.report.text import fixed

UNITS = {"size": (1e6, "MB", "size of the packed model"), "bops": (1e9, "G", "bit operations of one image")}
KINDS = ("attention", "MLP")


def front_chart(frontier: Mapping[str, Any]) -> str:
    """Total sensitivity (decades) against cost: the front, the uniform models, and the choice, as svg.

    frontier: what :meth:`quantlens.allocation.Allocation.frontier` gives; without points, only the uniform models and
    the choice.
    """
    unit, name, what = UNITS[frontier["cost"]]

    def point(label: str, cost: float, loss: float) -> tuple[float, float, str]:
        return cost / unit, loss, f"{label}{cost / unit:.3f} {name}: {loss:.3g}"

    front = [point("", *p) for p in frontier["points"]]
    uniform = [point(f"W{b}A{b}, ", cost, loss) for b, cost, loss in frontier["uniform"]]
    chosen = [point(f"{frontier['name']}, ", *frontier["chosen"])]
    lines = [("Pareto front", 0, 0, front), ("one width everywhere", 1, 1, uniform), (frontier["name"], 2, 2, chosen)]
    series = [
        Series(
            label, Style(colour, 0, mark), i, [Point(px, math.log10(py), None, tip) for px, py, tip in points if py > 0]
        )
        for i, (label, colour, mark, points) in enumerate(lines)
    ]
    points = [p for s in series for p in s.points if p is not None]
    if not points:
        return ""
    marks = svg.nice_ticks(min(p.x for p in points), max(p.x for p in points), 6)
    low, high = (math.floor(min(p.y for p in points)), math.ceil(max(p.y for p in points)))
    decades = list(range(low, max(high, low + 1) + 1))
    frame = Frame((marks[0], marks[-1]), (decades[0], decades[-1]), width=720, height=360, left=52, top=26)
    frame.grid_y(decades, labelled=False)
    frame.body += [
        f'<text class="t" x="{frame.left - 6}" y="{coord(frame.y(t) + 4)}" text-anchor="end">1e{t}</text>'
        for t in decades
    ]
    frame.axis_x((t, svg.tick_text(t, marks[1] - marks[0])) for t in marks)
    frame.labels(f"{what}, {name}", "total sensitivity")
    frame.body += [svg.draw_series(frame, one, radius=r) for one, r in zip(series, (2.0, 3.4, 5.0), strict=True)]
    title = f"Pareto front of {frontier['model']}, {frontier['sensitivity']}"
    words = (
        f"{title}: {len(front)} points; chosen {chosen[0][2]}; uniform " + ", ".join(tip for _, _, tip in uniform) + "."
    )
    return frame.svg(title, words, "front")


def widths_chart(groups: Sequence[Mapping[str, Any]], title: str) -> str:
    """The width of the attention and of the MLP of every block, as bars side by side, as svg.

    groups: name, kind, block and bits of each, in execution order.
    """
    blocks = list(dict.fromkeys(str(g["block"]) for g in groups))
    top = max(int(g["bits"]) for g in groups)
    frame = Frame((-0.5, len(blocks) - 0.5), (0.0, float(top + 1)), width=720, height=230, left=36, top=26)
    frame.grid_y([float(t) for t in range(0, top + 2, 2)])
    step = max(1, len(blocks) // 24)
    frame.axis_x((float(i), str(i)) for i in range(0, len(blocks), step))
    frame.labels("block", "bits")
    wide = (frame.x(1) - frame.x(0)) * 0.4
    base = frame.y(0.0)
    for group in groups:
        kind = KINDS.index(group["kind"]) if group["kind"] in KINDS else 1
        x = frame.x(float(blocks.index(str(group["block"])))) + (kind - 1) * wide
        y = frame.y(float(group["bits"]))
        tip = f"{group['name']}: {group['bits']} bits"
        frame.body.append(
            f'<g class="b c{kind} d0"><title>{esc(tip)}</title><rect x="{coord(x)}" y="{coord(y)}" '
            f'width="{coord(wide - 1)}" height="{coord(base - y)}"/><text class="t" x="{coord(x + wide / 2)}" '
            f'y="{coord(y - 3)}" text-anchor="middle">{group["bits"]}</text></g>'
        )
    words = f"{title}: " + ", ".join(f"{g['name']} {g['bits']}" for g in groups) + "."
    return frame.svg(title, words, "widths")


@dataclass(frozen=True)
class WidthRow:
    """A group's widths in the table of a study's mixed-precision cells."""

    name: str
    bits: list[str]


@dataclass(frozen=True)
class Mixed:
    """Mixed precision in a study: per cell a panel of its widths and one of the Pareto front they were chosen from, and
    a table of the widths for the reader who wants figures."""

    panels: list[Panel]
    fronts: list[Panel]
    front_legend: Markup
    columns: list[str]
    rows: list[WidthRow]
    legend: Markup


def mixed_cells(board: Board) -> list[tuple[str, Mapping[str, Any]]]:
    """(model, bits and seed of a cell; its allocation) of the cells with mixed precision; methods that share widths
    count once."""
    found: dict[str, Mapping[str, Any]] = {}
    for group in board.groups:
        for bits, results in group.cells.items():
            for result in results:
                allocation = dig(result, ("allocation",))
                if isinstance(allocation, Mapping) and allocation.get("groups"):
                    seed = f", seed {result['seed']}" if len(board.seeds) > 1 else ""
                    model = f"{group.model} " if len(board.models) > 1 else ""
                    found.setdefault(f"{model}{bits}{seed}", allocation)
    return list(found.items())


def mixed(board: Board) -> Mixed | None:
    """What the report shows of mixed precision; None for a study without it."""
    cells = mixed_cells(board)
    if not cells:
        return None
    panels, fronts = [], []
    for name, allocation in cells:
        unit, label, _ = UNITS.get(str(allocation.get("cost")), UNITS["size"])
        spent, allowed = (fixed(allocation[key] / unit, 2) for key in ("total", "budget"))
        facts = f"{allocation['sensitivity']}; {spent} of {allowed} {label}, {fixed(allocation['seconds'], 1)} s"
        panels.append(Panel(Markup(widths_chart(allocation["groups"], f"Widths of {name}")), name, facts))
        frontier = allocation.get("frontier")
        if frontier and frontier["points"]:
            fronts.append(Panel(Markup(front_chart(frontier)), name, allocation["sensitivity"]))
    widths = [{g["name"]: str(g["bits"]) for g in allocation["groups"]} for _, allocation in cells]
    names = dict.fromkeys(n for one in widths for n in one)
    rows = [WidthRow(n, [one.get(n, "") for one in widths]) for n in names]
    return Mixed(
        panels,
        fronts,
        Markup(front_legend("the choice")),
        [name for name, _ in cells],
        rows,
        Markup(legend_of([(k, Style(i)) for i, k in enumerate(KINDS)])),
    )


def front_legend(chosen: str) -> str:
    """The legend of :func:`front_chart`."""
    return legend_of([("Pareto front", Style(0)), ("one width everywhere", Style(1, 0, 1)), (chosen, Style(2, 0, 2))])


def legend_of(entries: Sequence[tuple[str, Style]]) -> str:
    """List items: a sample of each style and its name."""
    return "".join(f"<li>{svg.swatch(style)}<span>{esc(text)}</span></li>" for text, style in entries)


# -- the page beside an allocation ------------------------------------------------------------------------------------
BODY = """<ul class="legend still">{legend}</ul>
<figure>{front}<figcaption>{caption}</figcaption></figure>
<h2>Widths</h2>
<ul class="legend still">{kinds}</ul>
<figure>{widths}</figure>
<div class="scroll" tabindex="0" role="region" aria-label="Widths and sensitivities">
<table>
<thead><tr><th scope="col" class="text">Group</th><th scope="col">Bits</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""


def front_page(allocation: Any) -> str:
    """One self-contained HTML page: the front, the widths, and every group's sensitivities."""
    unit, name, what = UNITS[allocation.cost]
    total, budget = allocation.total / unit, allocation.budget / unit
    lead = (
        f"The {what} is {total:.3f} {name} of a budget of {budget:.3f} {name}; sensitivity {allocation.loss:.3g} by "
        f"{allocation.sensitivity}, candidates {', '.join(map(str, allocation.candidates))} bits, "
        f"{allocation.calibration.get('n', 0)} calibration images, {allocation.seconds:.1f} s."
    )
    caption = (
        f"Every point is the least total sensitivity that its cost allows ({len(allocation.front)} points, exact); "
        "the scale of sensitivity is logarithmic. The marked point is the allocation of this file."
    )

    rows = "\n".join(
        f"<tr><td class='text'>{esc(g.name)}</td><td>{g.bits}</td>"
        + "".join(f"<td>{g.sensitivity[b]:.3g}</td>" for b in allocation.candidates)
        + "</tr>"
        for g in allocation.groups
    )
    body = BODY.format(
        caption=esc(caption),
        legend=front_legend(allocation.name),
        front=front_chart(allocation.frontier()),
        kinds=legend_of([(kind, Style(i)) for i, kind in enumerate(KINDS)]),
        widths=widths_chart(allocation.summary()["groups"], f"Widths of {allocation.name}"),
        heads="".join(f'<th scope="col">sensitivity at {b}</th>' for b in allocation.candidates),
        rows=rows,
    )
    return page(f"{allocation.model} {allocation.name}", "mixed precision", lead, body)


def write_front(allocation: Any, path: str | Path) -> Path:
    """Write :func:`front_page`; an existing file is replaced at once or not at all. Raises StorageError."""
    target = Path(path)
    write_whole(target, front_page(allocation), what="the page")
    return target
