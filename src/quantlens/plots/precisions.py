"""Metrics by precision: lines with error bars (AUPR-out, the paper's Figure 1; sensitivity to bit width; drift of
attention), and bars of what quantization changed."""

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import altair as alt

from quantlens.attention.metrics import CHANGED, KL, OUTLIERS, OUTPUT_KL, OVERLAP, RANK, WHERE
from quantlens.metrics import METRICS
from quantlens.plots.style import (
    COLOURS,
    INK,
    MUTED,
    PAPER,
    Figure,
    Look,
    Panel,
    PanelRow,
    Rows,
    composed,
    encodings,
    finished,
    one_row,
    tooltips,
)
from quantlens.studies.board import Board, Group, Path
from quantlens.studies.drift import drift_of
from quantlens.studies.text import BASELINE, Stat, fixed, join_words, mean_std, metric_title, parse_bits

MAX_LINES = 8
"""More lines than this in one panel are split into a panel per model."""
MAX_BARS = 20
SHOWN = "indexof(hidden, datum.line) < 0"
SCORED = "datum.score == score"
PART_TITLES = {"far": "Far sets, mean", "near": "Near sets, mean", "all": "All OOD sets, mean"}
PART_NAMES = {"far": "mean of the far sets", "near": "mean of the near sets", "all": "mean of all OOD sets"}
FULL_RANGE = range(2, 9)
CURVES = (RANK, KL, OUTLIERS)
DRIFT_PANELS = (*CURVES, OVERLAP, CHANGED, OUTPUT_KL)

Places = tuple[list[tuple[str, str]], list[str]]
"""(label, precision) of every point of a line, and the labels of the axis."""
Values = Mapping[str, Callable[[Group, str, str], Stat | None]]
"""Detail of a panel -> the value of a group at a precision by a score."""
Drifts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Precision -> image set -> summary (:meth:`quantlens.attention.drift.Drift.summary`)."""


class GroupLines:
    """The line of each group of a board, and whether models stand in panels of their own."""

    def __init__(self, board: Board):
        self.board = board
        crossed = len(board.models) > 1 and len(board.methods) > 1
        self.split = crossed and len(board.groups) > MAX_LINES
        self.looks = {}
        for group in board.groups:
            look = Look.numbered(board.methods.index(group.method) if crossed else group.index)
            if crossed and not self.split:
                look = Look(look.colour, board.models.index(group.model) % 4)
            self.looks[self.name(group)] = look

    def name(self, group: Group) -> str:
        if self.split or len(self.board.models) == 1:
            return group.method
        return group.model if len(self.board.methods) == 1 else group.name

    def facets(self) -> list[tuple[str, list[Group]]]:
        """(panel name, its groups): one panel for everything, or one per model."""
        if not self.split:
            return [("", self.board.groups)]
        return [(m, [g for g in self.board.groups if g.model == m]) for m in self.board.models]


def point(line: str, x: str, stat: Stat | None, digits: int, unit: str = "", **more: Any) -> dict[str, Any]:
    """A row of a line chart: the mean, one standard deviation to both sides, and both in words."""
    ends: dict[str, Any] = {"mean": None, "low": None, "high": None}
    if stat is not None:
        spread = stat.std or 0.0
        ends = {"mean": stat.mean, "low": stat.mean - spread, "high": stat.mean + spread}
    return {"line": line, "x": x, **ends, "said": mean_std(stat, digits) + unit, **more}


def drawn(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the lines that have a value; in those, a precision without one stays, as a gap."""
    rows = list(rows)
    lines = {(row["line"], row.get("score")) for row in rows if row["mean"] is not None}
    return [row for row in rows if (row["line"], row.get("score")) in lines]


def line_chart(
    rows: Rows,
    looks: Mapping[str, Look],
    order: Sequence[str],
    *,
    y_label: str,
    x_label: str = "",
    chance: Rows = (),
    range_of: Rows = (),
) -> Any:
    """A line per name of `looks` through the points of `rows` (:func:`point`), in the order of `order`.

    Rows with a "score" are shown when it is the chosen one. chance: rows of a dashed level. range_of: rows whose range
    the y axis holds too, where several panels share it.
    """
    kept = f"{SHOWN} && {SCORED}" if any("score" in row for row in rows) else SHOWN
    present = {row["line"] for row in rows}
    names = [name for name in looks if name in present]
    how = encodings({name: looks[name] for name in names})
    dash = how.pop("strokeDash")
    room = [f"{i} " for i in range(len(names))]  # left free on both sides of a precision: lines stand apart a little
    base = alt.Chart().encode(
        x=alt.X(
            "x:O",
            title=x_label or None,
            scale=alt.Scale(domain=list(order)),
            axis=alt.Axis(labelAngle=0 if len(order) < 9 else -45),
        ),
        xOffset=alt.XOffset("line:N", scale=alt.Scale(domain=[*room, *names, *(f" {i}" for i in range(len(names)))])),
        color=how["color"],
    )
    layers = [
        base.mark_line(strokeWidth=1.8).encode(
            y=alt.Y("mean:Q", title=y_label, scale=alt.Scale(zero=False)), strokeDash=dash
        ),
        base.mark_rule(strokeWidth=1.2).encode(y="low:Q", y2="high:Q"),
        base.mark_point(filled=True, opacity=1, size=48, stroke=PAPER, strokeWidth=0.8).encode(
            y="mean:Q",
            shape=how["shape"],
            tooltip=tooltips(line="line", x="bits", said=y_label),
        ),
    ]
    if range_of:
        ghost = alt.Chart(alt.Data(values=list(range_of))).transform_filter(kept)
        layers += [ghost.mark_point(opacity=0, tooltip=None).encode(y=f"{end}:Q") for end in ("low", "high")]
    if chance:
        level = alt.Chart(alt.Data(values=list(chance))).transform_filter(SCORED)
        layers += [
            level.mark_rule(strokeDash=[5, 4], color=MUTED).encode(y="chance:Q"),
            level.mark_text(align="left", dy=-7, dx=2, color=MUTED, fontSize=10.5).encode(
                x=alt.value(0), y="chance:Q", text="said:N"
            ),
        ]
    return alt.layer(*layers).transform_filter(kept).properties(height=210)


def panels_of(
    lines: GroupLines,
    at: Places,
    values: Values,
    *,
    caption: str,
    label: str,
    unit: str = "",
    digits: int = 1,
    x_label: str = "",
    scores: Sequence[str] = ("",),
    chance: Rows = (),
) -> Iterator[Panel]:
    """A panel for each of `values`, and for each model where those stand in panels of their own; all have one range.
    label, unit: of the y axis and of values in words."""
    places, order = at
    found = []
    for detail, of in values.items():
        for name, groups in lines.facets():
            rows = drawn(
                point(lines.name(g), x, of(g, bits, score), digits, unit, **({"score": score} if score else {}))
                for score in scores
                for g in groups
                for x, bits in places
            )
            found.append((" · ".join(filter(None, [name, detail])), rows))
    everything = [row for _, rows in found for row in rows] if len(found) > 1 else []
    options: dict[str, Any] = {"y_label": label, "x_label": x_label, "chance": chance, "range_of": everything}
    for detail, rows in found:
        if rows:
            yield Panel(line_chart(rows, lines.looks, order, **options), rows, caption, detail)


def width_places(board: Board, widths: Mapping[int, str], lowest: int) -> Places:
    """Every measured width, FP32 last, on an axis from `lowest` to 8 or more bits."""
    ends = [BASELINE] if BASELINE in board.precisions else []
    places = [*((str(width), bits) for width, bits in widths.items()), *((end, end) for end in ends)]
    return places, [*map(str, range(lowest, max(8, *widths) + 1)), *ends]


def families(board: Board) -> list[tuple[str, str, dict[int, str]]]:
    """(heading, label of the x axis, bit width → precision): both operands, weights alone, activations alone."""
    known = sorted((*widths, bits) for bits in board.quantized if (widths := parse_bits(bits)))
    together = {w: bits for w, a, bits in known if w == a}
    weights = {w: bits for w, a, bits in known if a == 8}
    activations = {a: bits for w, a, bits in known if w == 8}
    return [
        ("Weights and activations together (W n A n)", "bits of weights and activations", together),
        ("Weights alone (W n A 8)", "bits of weights", weights),
        ("Activations alone (W 8 A n)", "bits of activations", activations),
    ]


def at_score(path: Path, score: str) -> Path:
    """The path with the score where it names the place of one ("")."""
    return tuple(score if part == "" else part for part in path)


def metric_panels(
    lines: GroupLines, at: Places, path: Path, caption: str, detail: str = "", *, x_label: str = "", digits: int = 1
) -> Iterator[Panel]:
    """A metric by precision, of every score where `path` names the place of one."""
    board, metric = lines.board, METRICS[path[-1]]
    scores = board.scores if "" in path else [""]
    levels = {s: board.level((*at_score(path[:-1], s), f"chance_{metric.name}")) for s in scores if s}
    return panels_of(
        lines,
        at,
        {detail: lambda group, bits, score: board.shown(group, bits, at_score(path, score))},
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
    lines, at = GroupLines(board), ([(bits, bits) for bits in board.precisions], board.precisions)
    means = (metric_panels(lines, at, ("ood_mean", p, "", "aupr_out"), PART_TITLES[p]) for p in board.parts())
    each = (metric_panels(lines, at, ("ood", name, "", "aupr_out"), name, kind) for name, kind in board.sets.items())
    shared = one_row(chain.from_iterable(means), "Far and near sets", large=not lines.split)
    return shared + one_row(chain.from_iterable(each), "Every OOD set")


def main_metrics(board: Board) -> list[tuple[Path, str, int]]:
    """(path, which OOD sets, decimals) of top-1, NLL (or the metrics of another task) and the means of AUPR-out."""
    means: list[tuple[Path, str, int]] = [
        (("ood_mean", part, "", "aupr_out"), PART_NAMES[part], 1) for part in board.parts()
    ]
    return [*((("id", name), "", 1 if METRICS[name].percent else 3) for name in board.summary[:2]), *means]


def sensitivity(board: Board) -> list[PanelRow]:
    """Top-1, NLL and AUPR-out against bit width, for the three families of precisions; says which widths are
    missing."""
    lines, rows = GroupLines(board), []
    for heading, x_label, widths in families(board):
        row = PanelRow(heading, note=width_note(widths))
        for path, detail, digits in main_metrics(board) if len(widths) > 1 else ():
            caption = ", ".join(filter(None, [metric_title(path[-1]), detail]))
            at = width_places(board, widths, FULL_RANGE[0])
            row.panels += metric_panels(lines, at, path, caption, x_label=x_label, digits=digits)
        row.large = bool(row.panels) and not lines.split and len(row.panels) != 3
        rows.append(row)
    return rows


def width_note(widths: dict[int, str]) -> str:
    """Which widths of a family are in the store, and which are not."""
    if len(widths) < 2:
        have = f"only {join_words(list(widths.values()))} is in the store" if widths else "no such cell is in the store"
        return f"No curve: {have}, and a curve takes two widths or more."
    missing = [str(n) for n in FULL_RANGE if n not in widths]
    if not missing:
        return ""
    measured, verb = join_words([str(w) for w in widths]), "is" if len(missing) == 1 else "are"
    return f"Measured at {measured} bits; {join_words(missing)} bits {verb} not in the store."


def drift(board: Board) -> list[PanelRow]:
    """Drift of attention against bits, for the three families of precisions; ID and OOD images side by side."""
    lines, rows = GroupLines(board), []
    for heading, x_label, widths in families(board):
        panels: list[Panel] = []
        for metric in CURVES if len(widths) > 1 else ():
            at = width_places(board, widths, min(widths))
            values = {title: partial(drift_of, where, metric) for where, title in WHERE.items()}
            words: dict[str, Any] = {"caption": metric.title, "label": metric.label, "digits": metric.digits}
            panels += panels_of(lines, at, values, x_label=x_label, **words)
        rows += one_row(panels, heading, large=True)
    return rows


def drift_figure(title: str, drifts: Drifts) -> Figure:
    """Drift of one model's attention: a panel per metric, a line per image set."""
    sets = list(dict.fromkeys(name for by_set in drifts.values() for name in by_set))
    looks = {name: Look.numbered(i) for i, name in enumerate(sets)}
    panels = []
    for metric in DRIFT_PANELS:
        rows = []
        for name in sets:
            for bits, by_set in drifts.items():
                stat = Stat.of([metric.of(by_set.get(name, {}))])
                rows.append(point(name, bits, stat and stat.scaled(metric.factor), metric.digits))
        rows = drawn(rows)
        panels.append(Panel(line_chart(rows, looks, list(drifts), y_label=metric.label), rows, metric.title))
    return Figure(finished(composed(one_row(panels, title))))


def write_drift(title: str, drifts: Drifts, path: str | os.PathLike[str]) -> pathlib.Path:
    """:func:`drift_figure` written to a file, in the format that its name ends in. Raises StorageError."""
    return drift_figure(title, drifts).save(path)


def changes(board: Board) -> list[PanelRow]:
    """What quantization changed at the chosen precision: a bar chart per metric, the largest loss first."""
    panels = []
    for path, detail, digits in main_metrics(board):
        metric = METRICS[path[-1]]
        rows = list(change_rows(board, path, digits))
        title = f"Δ {metric.title} {metric.arrow}"
        kept = "datum.bits == bits" + (f" && {SCORED}" if "" in path else "")
        chart = bar_chart(len({row["line"] for row in rows}), kept, title, falling=metric.direction == "lower")
        panels.append(Panel(chart, rows, title, " · ".join(filter(None, [metric.change_unit, detail])), "bars"))
    return one_row(panels)


def change_rows(board: Board, path: Path, digits: int) -> Iterator[dict[str, Any]]:
    """A row per group, precision and, where `path` names the place of one, score."""
    lines = GroupLines(board)
    for score in board.scores if "" in path else [""]:
        for group in board.groups:
            colour = COLOURS[lines.looks[lines.name(group)].colour]
            name = group.name if len(board.models) > 1 else group.method
            for bits in board.quantized:
                stat = board.shown(group, bits, at_score(path, score), change=True)
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
            tooltip=tooltips(line="method", said=title, n="seeds"),
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
