"""Metrics by precision: AUPR-out (the paper's Figure 1), sensitivity to bit width, and what quantization changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import altair as alt

from quantlens.metrics import METRICS
from quantlens.plots.lines import FAMILIES, SCORED, GroupLines, drawn, family_widths, line_chart, point, width_places
from quantlens.plots.style import COLOURS, INK, MUTED, Panel, PanelRow
from quantlens.studies.board import Board, Group, Path
from quantlens.studies.text import Stat, fixed, join_words, mean_std, metric_title

PART_TITLES = {"far": "Far sets, mean", "near": "Near sets, mean", "all": "All OOD sets, mean"}
PART_NAMES = {"far": "mean of the far sets", "near": "mean of the near sets", "all": "mean of all OOD sets"}
FULL_RANGE = range(2, 9)
MAX_BARS = 20


def rows_of(
    board: Board, lines: GroupLines, groups: Iterable[Group], places: Sequence[tuple[str, str]], path: Path, digits: int
) -> list[dict[str, Any]]:
    """A row per group and place (label, precision); of every score where `path` names the place of one ("")."""
    metric = METRICS[path[-1]]
    unit = " %" if metric.percent else ""
    found = []
    for score in board.scores if "" in path else [None]:
        where = tuple(score or "" if part == "" else part for part in path)
        more = {} if score is None else {"score": score}
        for group in groups:
            for x, bits in places:
                stat = board.stat(group, bits, where)
                scaled = None if stat is None else stat.scaled(metric.factor)
                found.append(point(lines.name(group), x, scaled, digits, unit, **more))
    return drawn(found)


def panels_of(
    board: Board,
    lines: GroupLines,
    places: Sequence[tuple[str, str]],
    order: Sequence[str],
    path: Path,
    caption: str,
    detail: str = "",
    x_label: str = "",
    digits: int = 1,
) -> Iterator[Panel]:
    """A metric by precision: one panel, or one per model with the same range."""
    by_facet = [(name, rows_of(board, lines, groups, places, path, digits)) for name, groups in lines.facets()]
    chance = list(chance_levels(board, path)) if path[-1] == "aupr_out" else []
    everything = [row for _, rows in by_facet for row in rows] if lines.split else []
    for name, rows in by_facet:
        if rows:
            label = METRICS[path[-1]].label
            chart = line_chart(
                rows, lines.looks, order, y_label=label, x_label=x_label, chance=chance, range_of=everything
            )
            yield Panel(chart, rows, caption, " · ".join(filter(None, [name, detail])))


def chance_levels(board: Board, path: Path) -> Iterator[dict[str, Any]]:
    """The chance level of every score: the same for every cell on the same images, so the mean over the cells."""
    for score in board.scores:
        where = (*(score if part == "" else part for part in path[:-1]), "chance_aupr_out")
        stats = [board.stat(g, b, where) for g in board.groups for b in board.precisions]
        level = Stat.of(s.mean for s in stats if s is not None)
        if level is not None:
            yield {"score": score, "chance": 100 * level.mean, "said": f"chance {fixed(100 * level.mean, 1)}"}


def aupr(board: Board) -> list[PanelRow]:
    """AUPR-out by precision: the means of far and near sets, then every OOD set."""
    lines = GroupLines(board)
    places, order = [(b, b) for b in board.precisions], board.precisions
    means = PanelRow("Far and near sets", large=not lines.split)
    for part in board.parts():
        path: Path = ("ood_mean", part, "", "aupr_out")
        means.panels += panels_of(board, lines, places, order, path, PART_TITLES[part])
    each = PanelRow("Every OOD set")
    for name, kind in board.sets.items():
        each.panels += panels_of(board, lines, places, order, ("ood", name, "", "aupr_out"), name, kind)
    return [row for row in (means, each) if row.panels]


def sensitivity(board: Board) -> list[PanelRow]:
    """Top-1, NLL and AUPR-out against bit width, for the three families of precisions; says which widths are
    missing."""
    lines, rows = GroupLines(board), []
    for heading, x_label, width_of in FAMILIES:
        widths = family_widths(board, width_of)
        row = PanelRow(heading, note=width_note(widths))
        if len(widths) > 1:
            places, order = width_places(board, widths, FULL_RANGE[0])
            kinds: list[tuple[str, Path, int]] = [
                (metric_title("top1"), ("id", "top1"), 1),
                (metric_title("nll"), ("id", "nll"), 3),
            ]
            for part in board.parts():
                title = f"{metric_title('aupr_out')}, {PART_NAMES[part]}"
                kinds.append((title, ("ood_mean", part, "", "aupr_out"), 1))
            for caption, path, digits in kinds:
                row.panels += panels_of(board, lines, places, order, path, caption, x_label=x_label, digits=digits)
            row.large = not lines.split and len(row.panels) != 3
        rows.append(row)
    return rows


def width_note(widths: dict[int, str]) -> str:
    """Which widths of a family are in the store, and which are not."""
    missing = [str(n) for n in FULL_RANGE if n not in widths]
    if len(widths) < 2:
        have = f"only {join_words(list(widths.values()))} is in the store" if widths else "no such cell is in the store"
        return f"No curve: {have}, and a curve takes two widths or more."
    if not missing:
        return ""
    verb = "is" if len(missing) == 1 else "are"
    return (
        f"Measured at {join_words([str(w) for w in widths])} bits; {join_words(missing)} bits {verb} not in the store."
    )


def changes(board: Board) -> list[PanelRow]:
    """What quantization changed at the chosen precision: a bar chart per metric, the largest loss first."""
    kinds: list[tuple[Path, str, int]] = [(("id", "top1"), "", 1), (("id", "nll"), "", 3)]
    kinds += [(("ood_mean", part, "", "aupr_out"), PART_NAMES[part], 1) for part in board.parts()]
    row = PanelRow("")
    for path, detail, digits in kinds:
        metric = METRICS[path[-1]]
        rows = list(change_rows(board, path, digits))
        if rows:
            title = f"Δ {metric.title} {metric.arrow}"
            kept = "datum.bits == bits" + (f" && {SCORED}" if "" in path else "")
            chart = bar_chart(len({row["line"] for row in rows}), kept, title, falling=metric.direction == "lower")
            row.panels.append(Panel(chart, rows, title, " · ".join(filter(None, [metric.change_unit, detail])), "bars"))
    return [row] if row.panels else []


def change_rows(board: Board, path: Path, digits: int) -> Iterator[dict[str, Any]]:
    """A row per group, precision and, where `path` names the place of one, score."""
    lines = GroupLines(board)
    factor = METRICS[path[-1]].factor
    for score in board.scores if "" in path else [""]:
        where = tuple(score if part == "" else part for part in path)
        for group in board.groups:
            for bits in board.quantized:
                stat = board.change(group, bits, where)
                if stat is not None:
                    name = group.name if len(board.models) > 1 else group.method
                    row = point(name, bits, stat.scaled(factor), digits, bits=bits, score=score, n=stat.n)
                    row["said"] = mean_std(stat.scaled(factor), digits, sign=True)
                    yield row | {"colour": COLOURS[lines.looks[lines.name(group)].colour]}


def bar_chart(bars: int, kept: str, title: str, *, falling: bool) -> Any:
    """Bars from a zero line, each with its name and value above it; the `MAX_BARS` of the largest loss, falling or
    rising."""
    order: Any = "descending" if falling else "ascending"
    base = alt.Chart().encode(y=alt.Y("place:O", title=None, axis=None))
    words = {"baseline": "bottom", "dy": -6, "fontSize": 11, "color": INK}
    layers = [
        base.mark_bar(height=9).encode(
            x=alt.X("mean:Q", title=None, axis=alt.Axis(tickCount=5)),
            color=alt.Color("colour:N", scale=None),
            tooltip=[alt.Tooltip(f"{k}:N", title=t) for k, t in (("line", "method"), ("said", title), ("n", "seeds"))],
        ),
        base.mark_rule(color=INK).encode(x="low:Q", x2="high:Q"),
        base.mark_text(align="left", dx=3, limit=230, **words).encode(x=alt.value(0), text="line:N"),
        base.mark_text(align="right", dx=-3, **words).encode(x=alt.value("width"), text="said:N"),
        alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=MUTED).encode(x="zero:Q"),
    ]
    return (
        alt.layer(*layers)
        .transform_filter(kept)
        .transform_window(place="row_number()", sort=[alt.SortField("mean", order=order)])
        .transform_filter(f"datum.place <= {MAX_BARS}")
        .properties(height=34 * min(bars, MAX_BARS))
    )
