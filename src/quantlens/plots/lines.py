"""Lines with error bars over precisions, and which line looks how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from quantlens.plots.style import MUTED, PAPER, Look, Panel, Rows, encodings
from quantlens.studies.board import Board, Group
from quantlens.studies.text import BASELINE, Stat, mean_std, parse_bits

MAX_LINES = 8
"""More lines than this in one panel are split into a panel per model."""
SHOWN = "indexof(hidden, datum.line) < 0"
SCORED = "datum.score == score"


class GroupLines:
    """The line of each group of a board, and whether models stand in panels of their own."""

    def __init__(self, board: Board):
        self.board = board
        crossed = len(board.models) > 1 and len(board.methods) > 1
        self.split = crossed and len(board.groups) > MAX_LINES
        self.crossed = crossed and not self.split
        self.looks = {self.name(group): self._look(group) for group in board.groups}

    def _look(self, group: Group) -> Look:
        method, model = self.board.methods.index(group.method), self.board.models.index(group.model)
        if self.crossed:
            return Look(Look.numbered(method).colour, Look.numbered(0).form + model % 4)
        return Look.numbered(method if self.split else group.index)

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
    spread = 0.0 if stat is None or stat.std is None else stat.std
    mean = None if stat is None else stat.mean
    ends = {"low": None, "high": None} if mean is None else {"low": mean - spread, "high": mean + spread}
    return {"line": line, "x": x, "mean": mean, **ends, "said": mean_std(stat, digits) + unit, **more}


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
            tooltip=[
                alt.Tooltip(f"{key}:N", title=title)
                for key, title in (("line", "line"), ("x", "bits"), ("said", y_label))
            ],
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


Values = Mapping[str, Callable[[Group, str, str], Stat | None]]
"""Detail of a panel -> the value of a group at a precision by a score."""


def panels_of(
    lines: GroupLines,
    places: Sequence[tuple[str, str]],
    order: Sequence[str],
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

    places: (label, precision) of every point. label, unit: of the y axis and of values in words.
    """
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
    for detail, rows in found:
        if rows:
            options: dict[str, Any] = {"y_label": label, "x_label": x_label, "chance": chance, "range_of": everything}
            yield Panel(line_chart(rows, lines.looks, order, **options), rows, caption, detail)


FAMILIES: list[tuple[str, str, Callable[[int, int], int | None]]] = [
    (
        "Weights and activations together (W n A n)",
        "bits of weights and activations",
        lambda w, a: w if w == a else None,
    ),
    ("Weights alone (W n A 8)", "bits of weights", lambda w, a: w if a == 8 else None),
    ("Activations alone (W 8 A n)", "bits of activations", lambda w, a: a if w == 8 else None),
]


def family_widths(board: Board, width_of: Callable[[int, int], int | None]) -> dict[int, str]:
    """Bit width → precision name, of the cells that belong to a family."""
    found = {}
    for bits in board.quantized:
        widths = parse_bits(bits)
        width = width_of(*widths) if widths else None
        if width is not None:
            found[width] = bits
    return dict(sorted(found.items()))


def width_places(board: Board, widths: Mapping[int, str], lowest: int) -> tuple[list[tuple[str, str]], list[str]]:
    """((label, precision) of every measured width, FP32 last; labels of the axis from `lowest` to 8 or more bits)."""
    places = [(str(w), b) for w, b in widths.items()]
    order = [str(n) for n in range(lowest, max(8, *widths) + 1)]
    if BASELINE in board.precisions:
        places.append((BASELINE, BASELINE))
        order.append(BASELINE)
    return places, order
