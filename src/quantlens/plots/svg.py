"""Inline SVG charts without a plotting library. Colours and strokes are CSS classes, so that a chart follows
the theme.

Every chart is a string: an `<svg role="img">` with a title, a description that says its figures in words
where they are few, and `<title>` tooltips on its marks. All text that comes from outside is escaped here.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MINUS = "−"
COLOURS = 7
"""Colour classes c0 … c6; further series take the next dash class (d0 … d3) and marker."""
DASHES = 4
MARKERS = 4


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def coord(value: float) -> str:
    """A coordinate with at most one decimal."""
    text = f"{value:.1f}"
    text = text[:-2] if text.endswith(".0") else text
    return "0" if text == "-0" else text


def nice_step(span: float, count: int) -> float:
    """The step among 1, 2, 2.5, 5 × 10^k that cuts `span` into about `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= raw * 0.999), 10 * power)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round tick values that enclose [low, high]; a zero-width range is widened."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = nice_step(high - low, count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick label with as many decimals as the step needs; thousands and beyond as 1.2k, 3M."""
    size = abs(value)
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if size >= 10 * unit or (size >= unit and step >= unit / 10):
            return tick_text(value / unit, step / unit) + name
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1
    if digits > 4:
        return f"{value:.1e}".replace("-", MINUS)
    return f"{value:.{digits}f}".replace("-", MINUS)


@dataclass(frozen=True)
class Style:
    """How one series looks everywhere in the report: its colour, dash and marker class."""

    colour: int
    dash: int = 0
    marker: int = 0

    @staticmethod
    def numbered(index: int) -> Style:
        """The look of the index-th of many series: colours cycle, then dashes and markers change."""
        turn = index // COLOURS
        return Style(index % COLOURS, turn % DASHES, turn % MARKERS)

    @property
    def classes(self) -> str:
        return f"c{self.colour} d{self.dash}"


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    error: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Series:
    """A line: its name (tooltips), style, a key by which the legend hides it, and its points; None leaves a
    gap."""

    name: str
    style: Style
    key: int
    points: Sequence[Point | None]


@dataclass
class Frame:
    """The plot area inside an svg of `width` × `height` user units, and the data ranges drawn in it."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 400
    height: int = 270
    left: int = 44
    right: int = 12
    top: int = 12
    bottom: int = 40
    body: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def grid_y(self, ticks: Sequence[float], *, labelled: bool = True) -> None:
        """Horizontal grid lines and their labels."""
        step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
        end = self.width - self.right
        self.body.append(f'<path class="g" d="{"".join(f"M{self.left} {coord(self.y(t))}H{end}" for t in ticks)}"/>')
        self.body += [
            f'<text class="t" x="{self.left - 6}" y="{coord(self.y(t) + 4)}" text-anchor="end">'
            f"{tick_text(t, step)}</text>"
            for t in (ticks if labelled else ())
        ]

    def axis_x(self, places: Iterable[tuple[float, str]]) -> None:
        """The bottom line with labels at the given data positions."""
        base = self.height - self.bottom
        self.body.append(f'<path class="a" d="M{self.left} {base}H{self.width - self.right}"/>')
        for value, label in places:
            x = coord(self.x(value))
            lines = "".join(
                f'<tspan x="{x}" y="{base + 16 + 13 * i}">{esc(t)}</tspan>' for i, t in enumerate(label.split("\n"))
            )
            self.body.append(
                f'<text class="t" text-anchor="middle">{lines}</text>'
                if "\n" in label
                else f'<text class="t" x="{x}" y="{base + 16}" text-anchor="middle">{esc(label)}</text>'
            )

    def labels(self, x_label: str, y_label: str) -> None:
        """Axis titles: x below, y above the top left corner (no turned text to read)."""
        if y_label:
            self.body.append(f'<text class="t y" x="4" y="13">{esc(y_label)}</text>')
        if x_label:
            middle = coord((self.left + self.width - self.right) / 2)
            self.body.append(
                f'<text class="t" x="{middle}" y="{self.height - 5}" text-anchor="middle">{esc(x_label)}</text>'
            )

    def svg(self, title: str, description: str, kind: str) -> str:
        return document(self.width, self.height, title, description, "".join(self.body), kind)


def document(width: float, height: float, title: str, description: str, body: str, kind: str) -> str:
    """The svg element round a drawing; it scales with its container and keeps its proportions."""
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {coord(width)} {coord(height)}" role="img">'
        f"<title>{esc(title)}</title><desc>{esc(description)}</desc>{body}</svg>"
    )


def marker(shape: int, x: float, y: float, tip: str, radius: float = 3.4) -> str:
    """A data point: circle, square, diamond or triangle, with a tooltip."""
    label = f"<title>{esc(tip)}</title>" if tip else ""
    if shape % MARKERS == 0:
        return f'<circle class="m" cx="{coord(x)}" cy="{coord(y)}" r="{coord(radius)}">{label}</circle>'
    r = radius
    outline = {
        1: f"m{-r} {-r}h{2 * r}v{2 * r}h{-2 * r}z",
        2: f"m0 {-1.35 * r:.1f}l{1.35 * r:.1f} {1.35 * r:.1f}l{-1.35 * r:.1f} {1.35 * r:.1f}"
        f"l{-1.35 * r:.1f} {-1.35 * r:.1f}z",
        3: f"m0 {-1.2 * r:.1f}l{1.2 * r:.1f} {2.2 * r:.1f}h{-2.4 * r:.1f}z",
    }[shape % MARKERS]
    return f'<path class="m" d="M{coord(x)} {coord(y)}{outline}">{label}</path>'


def draw_series(frame: Frame, series: Series, shift: float = 0.0, radius: float = 3.4) -> str:
    """The line, error bars and markers of one series; `shift` (user units) keeps error bars of several
    series apart."""
    line, bars, marks = "", "", []
    pen_down = False
    low, high = frame.y_range
    for point in series.points:
        if point is None:
            pen_down = False
            continue
        x, y = frame.x(point.x) + shift, frame.y(point.y)
        line += f"{'L' if pen_down else 'M'}{coord(x)} {coord(y)}"
        pen_down = True
        if point.error:
            top, foot = frame.y(min(point.y + point.error, high)), frame.y(max(point.y - point.error, low))
            bars += f"M{coord(x - 2.5)} {coord(top)}h5M{coord(x)} {coord(top)}V{coord(foot)}m-2.5 0h5"
        marks.append(marker(series.style.marker, x, y, point.tip, radius))
    if not marks:
        return ""
    errors = f'<path class="e" d="{bars}"/>' if bars else ""
    return (
        f'<g class="s {series.style.classes}" data-s="{series.key}"><path class="l" d="{line}"/>'
        f"{errors}{''.join(marks)}</g>"
    )


def value_range(
    series: Iterable[Series],
    more: Iterable[float] = (),
    *,
    floor: float | None = None,
    ceiling: float | None = None,
    ticks: int = 5,
) -> list[float]:
    """Ticks that enclose all points with their error bars and the values of `more`, within [floor,
    ceiling]."""
    values = list(more)
    for point in (p for s in series for p in s.points if p is not None):
        values += [point.y - (point.error or 0), point.y + (point.error or 0)]
    if not values:
        return [0.0, 1.0]
    low, high = min(values), max(values)
    if floor is not None:
        low = max(low, floor)
    if ceiling is not None:
        high = min(high, ceiling)
    found = nice_ticks(low, high, ticks)
    if floor is not None:
        found = [t for t in found if t >= floor - 1e-9] if found[-1] > floor else found
    if ceiling is not None:
        found = [t for t in found if t <= ceiling + 1e-9] if found[0] < ceiling else found
    return found if len(found) > 1 else [found[0] - 1, found[0] + 1]


def below(chance: float | None) -> tuple[float, ...]:
    """What a y range must reach so that the chance level stands clear of the bottom line."""
    return () if chance is None else (max(chance - 1.5, 0.0),)


def line_chart(
    series: Sequence[Series],
    places: Sequence[tuple[float, str]],
    *,
    title: str,
    description: str,
    y_label: str,
    x_label: str = "",
    chance: float | None = None,
    floor: float | None = None,
    ceiling: float | None = None,
    ticks: Sequence[float] | None = None,
    kind: str = "lines",
) -> str:
    """Lines with error bars over the x positions of `places` (position, label).

    chance: a dashed level with the word "chance" at its end. ticks: the y ticks, where several panels share
    a range.
    """
    marks = list(ticks) if ticks else value_range(series, below(chance), floor=floor, ceiling=ceiling)
    xs = [p for p, _ in places]
    pad = 0.5 if len(xs) < 2 else 0.35 * min(b - a for a, b in pairwise(xs))
    frame = Frame((min(xs) - pad, max(xs) + pad), (marks[0], marks[-1]), top=26, bottom=40 if x_label else 26)
    labels = fitting_labels(frame, places)
    if any("\n" in label for _, label in labels):
        frame.bottom += 12
    frame.grid_y(marks)
    frame.axis_x(labels)
    frame.labels(x_label, y_label)
    drawn = [s for s in series if any(p is not None for p in s.points)]
    if chance is not None and marks[0] <= chance <= marks[-1]:
        frame.body.append(chance_line(frame, chance, drawn))
    spread = min(2.4, 16 / max(len(drawn), 1))
    for i, one in enumerate(drawn):
        frame.body.append(draw_series(frame, one, (i - (len(drawn) - 1) / 2) * spread, 3.4 if len(drawn) <= 8 else 2.6))
    return frame.svg(title, description, kind)


def fitting_labels(frame: Frame, places: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Labels as they are; where neighbours would touch, "W4A8" is set on two lines, W4 over A8."""
    xs = [frame.x(v) for v, _ in places]
    room = min((b - a for a, b in pairwise(xs)), default=400.0)
    if room > 8.2 * max((len(label) for _, label in places), default=0) + 4:
        return list(places)
    return [(v, re.sub(r"^(W\d+)(A\d+)$", r"\1\n\2", label)) for v, label in places]


def chance_line(frame: Frame, chance: float, series: Sequence[Series]) -> str:
    """The dashed chance level; its label stands under the line where there is room, at the end that lines
    keep away from."""

    def distance(index: int) -> float:
        near = [abs(p.y - chance) for s in series if (p := s.points[index]) is not None]
        return min(near, default=math.inf)

    y, right = frame.y(chance), frame.width - frame.right
    at_left = distance(0) > distance(-1)
    below_line = frame.height - frame.bottom - y >= 15
    return (
        f'<path class="ch" d="M{frame.left} {coord(y)}H{right}"/>'
        f'<text class="t cht" x="{frame.left + 4 if at_left else right}" '
        f'y="{coord(y + 13 if below_line else y - 4)}" text-anchor="{"start" if at_left else "end"}">'
        f"chance {tick_text(chance, 0.1)}</text>"
    )


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    error: float | None
    text: str
    style: Style
    tip: str = ""


def bar_chart(bars: Sequence[Bar], *, title: str, description: str, width: int = 400) -> str:
    """Horizontal bars from a zero line, one below another, each with its label above it and its figure at
    its end."""
    ends = [b.value + (b.error or 0) for b in bars] + [b.value - (b.error or 0) for b in bars] + [0.0]
    low, high = min(ends), max(ends)
    if high == low:
        high = low + 1.0
    room = 92
    row, top = 35, 2
    frame = Frame(
        (low, high),
        (0, 1),
        width=width,
        height=top + row * len(bars) + 4,
        left=8 if low >= 0 else 30,
        right=room,
    )
    zero = frame.x(0.0)
    side, anchor = (-1, ' text-anchor="end"') if -low > high else (1, "")
    for i, bar in enumerate(bars):
        y = top + row * i
        x = frame.x(bar.value)
        left, span = min(zero, x), max(abs(x - zero), 0.8)
        frame.body.append(
            f'<g class="b {bar.style.classes}"><title>{esc(bar.tip or bar.label)}</title>'
            f'<text class="t" x="{coord(zero + side)}" y="{y + 14}"{anchor}>{esc(bar.label)}</text>'
            f'<rect x="{coord(left)}" y="{y + 19}" width="{coord(span)}" height="10" rx="1.5"/>'
        )
        end = max(x, zero)
        if bar.error:
            a, b = frame.x(bar.value - bar.error), frame.x(bar.value + bar.error)
            end = max(end, b)
            frame.body.append(f'<path class="w" d="M{coord(a)} {y + 21}v6m0-3H{coord(b)}m0-3v6"/>')
        frame.body.append(f'<text class="t v" x="{coord(end + 5)}" y="{y + 28}">{esc(bar.text)}</text></g>')
    frame.body.append(f'<path class="a" d="M{coord(zero)} {top}V{frame.height - 2}"/>')
    return frame.svg(title, description, "bars")


def swatch(style: Style) -> str:
    """The legend's sample of a series: its line and marker."""
    return (
        f'<svg class="swatch {style.classes}" viewBox="0 0 30 12" aria-hidden="true">'
        '<path class="l" d="M1 6H29"/>'
        f"{marker(style.marker, 15, 6, '')}</svg>"
    )
