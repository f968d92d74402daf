"""Metrics by precision: AUPR-out (the paper's Figure 1), sensitivity to bit width, and what quantization changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from quantlens.metrics import METRICS
from quantlens.plots.lines import FAMILIES, SCORED, GroupLines, family_widths, panels_of, point, width_places
from quantlens.plots.style import COLOURS, INK, MUTED, Panel, PanelRow
from quantlens.studies.board import Board, Path
from quantlens.studies.text import fixed, join_words, mean_std, metric_title

PART_TITLES = {"far": "Far sets, mean", "near": "Near sets, mean", "all": "All OOD sets, mean"}
PART_NAMES = {"far": "mean of the far sets", "near": "mean of the near sets", "all": "mean of all OOD sets"}
FULL_RANGE = range(2, 9)
MAX_BARS = 20


def at(path: Path, score: str) -> Path:
    """The path with the score where it names the place of one ("")."""
    return tuple(score if part == "" else part for part in path)


def metric_panels(
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
    """A metric at `places` (label, precision), of every score where `path` names the place of one."""
    metric, scores = METRICS[path[-1]], board.scores if "" in path else [""]
    levels = {s: board.level((*at(path[:-1], s), f"chance_{metric.name}")) for s in scores if s}
    return panels_of(
        lines,
        places,
        order,
        {detail: lambda group, bits, score: board.shown(group, bits, at(path, score))},
        caption=caption,
        label=metric.label,
        unit=" %" if metric.percent else "",
        digits=digits,
        x_label=x_label,
        scores=scores,
        chance=[{"score": s, "chance": v, "said": f"chance {fixed(v, 1)}"} for s, v in levels.items() if v is not None],
    )


def aupr(board: Board) -> list[PanelRow]:
    """AUPR-out by precision: the means of far and near sets, then every OOD set."""
    lines = GroupLines(board)
    places, order = [(b, b) for b in board.precisions], board.precisions
    means = PanelRow("Far and near sets", large=not lines.split)
    for part in board.parts():
        path: Path = ("ood_mean", part, "", "aupr_out")
        means.panels += metric_panels(board, lines, places, order, path, PART_TITLES[part])
    each = PanelRow("Every OOD set")
    for name, kind in board.sets.items():
        each.panels += metric_panels(board, lines, places, order, ("ood", name, "", "aupr_out"), name, kind)
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
                row.panels += metric_panels(board, lines, places, order, path, caption, x_label=x_label, digits=digits)
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
    for score in board.scores if "" in path else [""]:
        for group in board.groups:
            colour = COLOURS[lines.looks[lines.name(group)].colour]
            name = group.name if len(board.models) > 1 else group.method
            for bits in board.quantized:
                stat = board.shown(group, bits, at(path, score), change=True)
                if stat is not None:
                    more = {"bits": bits, "score": score, "n": stat.n, "colour": colour}
                    yield point(name, bits, stat, digits, **more) | {"said": mean_std(stat, digits, sign=True)}


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
