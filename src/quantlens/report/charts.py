"""The line and bar charts: the paper's Figure 1, the sensitivity curves, the ranked changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from quantlens import _moved
from quantlens.metrics import METRICS, Metric
from quantlens.plots import svg
from quantlens.plots.svg import Bar, Point, Series, Style
from quantlens.report.collect import Board, Group, Path
from quantlens.report.text import (
    BASELINE,
    Stat,
    count,
    fixed,
    join_words,
    mean_std,
    metric_title,
    parse_bits,
    score_label,
)

AUPR = metric_title("aupr_out")

MAX_LINES = 8
"""More lines than this in one panel are split into a panel per model."""
MAX_BARS = 20

PART_TITLES = {"far": "Far sets, mean", "near": "Near sets, mean", "all": "All OOD sets, mean"}
PART_NAMES = {"far": "mean of the far sets", "near": "mean of the near sets", "all": "mean of all OOD sets"}


@dataclass(frozen=True)
class Panel:
    """One chart with its caption and a second, smaller line; shown when the reader selects its score,
    precision or group.

    alternative: not among those shown first.
    """

    svg: Markup
    caption: str
    detail: str = ""
    score: str = ""
    bits: str = ""
    group: str = ""
    alternative: bool = False


@dataclass
class PanelRow:
    """Panels under one heading; `note` says what is missing."""

    heading: str
    panels: list[Panel] = field(default_factory=list)
    note: str = ""
    large: bool = False


@dataclass(frozen=True)
class LegendEntry:
    key: int
    label: str
    swatch: Markup


class GroupStyles:
    """Which colour, dash and marker each group has, and whether models stand in panels of their own."""

    def __init__(self, board: Board):
        self.board = board
        self.split = len(board.models) > 1 and len(board.methods) > 1 and len(board.groups) > MAX_LINES
        self.crossed = len(board.models) > 1 and len(board.methods) > 1 and not self.split

    def style(self, group: Group) -> Style:
        method, model = self.board.methods.index(group.method), self.board.models.index(group.model)
        if self.split:
            return Style.numbered(method)
        if self.crossed:
            return Style(Style.numbered(method).colour, model % svg.DASHES, model % svg.MARKERS)
        return Style.numbered(group.index)

    def key(self, group: Group) -> int:
        """The number by which the legend finds the lines: one per method where models have their own
        panels."""
        return self.board.methods.index(group.method) if self.split else group.index

    def label(self, group: Group) -> str:
        if self.split or len(self.board.models) == 1:
            return group.method
        return group.model if len(self.board.methods) == 1 else group.name

    def legend(self) -> list[LegendEntry]:
        entries: dict[int, LegendEntry] = {}
        for group in self.board.groups:
            entries.setdefault(
                self.key(group),
                LegendEntry(self.key(group), self.label(group), Markup(svg.swatch(self.style(group)))),
            )
        return list(entries.values())

    def facets(self) -> list[tuple[str, list[Group]]]:
        """(panel name, its groups): one panel for everything, or one per model."""
        if not self.split:
            return [("", self.board.groups)]
        return [(m, [g for g in self.board.groups if g.model == m]) for m in self.board.models]


def series_of(
    board: Board,
    styles: GroupStyles,
    groups: Sequence[Group],
    places: Sequence[tuple[float, str]],
    path: Path,
    *,
    factor: float,
    digits: int,
    unit: str,
) -> list[Series]:
    """One line per group through the precisions of `places` (x position, bits); a precision without a figure
    is a gap."""
    found = []
    for group in groups:
        points: list[Point | None] = []
        for x, bits in places:
            stat = board.stat(group, bits, path)
            if stat is None:
                points.append(None)
                continue
            scaled = stat.scaled(factor)
            words = f"{styles.label(group)}, {bits}: {mean_std(stat, digits, factor=factor)}{unit}"
            points.append(Point(x, scaled.mean, scaled.std, words))
        if any(points):
            found.append(Series(styles.label(group), styles.style(group), styles.key(group), points))
    return found


def describe(series: Sequence[Series], what: str) -> str:
    """The chart in words for a screen reader: the figures of two lines, the names of more (the tables have
    the figures)."""
    if len(series) > 2:
        return f"{what}: {count(len(series), 'line')}, {join_words([s.name for s in series], limit=4)}."
    return f"{what}. " + ". ".join(p.tip for s in series for p in s.points if p is not None) + "."


def chance_level(board: Board, groups: Sequence[Group], path: Path) -> float | None:
    """The chance level in percent: the same for every cell on the same images, so the mean over the cells
    shown."""
    stats = [board.stat(g, b, path) for g in groups for b in board.precisions]
    level = Stat.of(s.mean for s in stats if s is not None)
    return None if level is None else 100 * level.mean


def aupr_panels(
    board: Board, styles: GroupStyles, score: str, prefix: Path, what: str, detail: str = ""
) -> list[Panel]:
    """AUPR-out by precision of one OOD set or mean of sets, one panel or one per model with a common y
    range."""
    places = [(float(i), b) for i, b in enumerate(board.precisions)]
    path, label = (*prefix, score, "aupr_out"), score_label(score)
    drawn = [
        (name, groups, series_of(board, styles, groups, places, path, factor=100, digits=1, unit=" %"))
        for name, groups in styles.facets()
    ]
    levels = [chance_level(board, groups, (*prefix, score, "chance_aupr_out")) for _, groups, _ in drawn]
    everything = [s for _, _, series in drawn for s in series]
    ticks = svg.value_range(everything, [v for c in levels for v in svg.below(c)], floor=0, ceiling=100)
    panels = []
    for (name, _, series), chance in zip(drawn, levels, strict=True):
        if not series:
            continue
        title = f"{AUPR} by precision, {what}, score {label}" + (f", {name}" if name else "")
        words = describe(series, title) + ("" if chance is None else f" Chance level {fixed(chance, 1)} %.")
        drawing = svg.line_chart(
            series,
            places,
            title=title,
            description=words,
            y_label=METRICS["aupr_out"].label,
            chance=chance,
            ticks=ticks,
        )
        notes = " · ".join(filter(None, [name, detail, label]))
        panels.append(Panel(Markup(drawing), what, notes, score, alternative=score != board.score))
    return panels


def figure_1(board: Board, styles: GroupStyles) -> list[PanelRow]:
    """The paper's Figure 1: AUPR-out by precision, the means of far and near sets, then every OOD set."""
    rows = []
    means = PanelRow("Far and near sets", large=not styles.split)
    for part in board.parts():
        for score in board.scores:
            means.panels += aupr_panels(board, styles, score, ("ood_mean", part), PART_TITLES[part])
    if means.panels:
        rows.append(means)
    each = PanelRow("Every OOD set")
    for name, kind in board.sets.items():
        for score in board.scores:
            each.panels += aupr_panels(board, styles, score, ("ood", name), name, kind)
    if each.panels:
        rows.append(each)
    return rows


# ------------------------------------------------------------------------------------------------ sensitivity

FAMILIES: list[tuple[str, str, Callable[[int, int], int | None]]] = [
    (
        "Weights and activations together (W n A n)",
        "bits of weights and activations",
        lambda w, a: w if w == a else None,
    ),
    ("Weights alone (W n A 8)", "bits of weights", lambda w, a: w if a == 8 else None),
    ("Activations alone (W 8 A n)", "bits of activations", lambda w, a: a if w == 8 else None),
]
FULL_RANGE = range(2, 9)


def family_widths(board: Board, width_of: Callable[[int, int], int | None]) -> dict[int, str]:
    """Bit width → precision name, of the cells that belong to a family."""
    found = {}
    for bits in board.quantized:
        widths = parse_bits(bits)
        width = width_of(*widths) if widths else None
        if width is not None:
            found[width] = bits
    return dict(sorted(found.items()))


def sensitivity(board: Board, styles: GroupStyles) -> list[PanelRow]:
    """Top-1, NLL and AUPR-out against bit width, for the three families of precisions; says which widths are
    missing."""
    rows = []
    for heading, x_label, width_of in FAMILIES:
        widths = family_widths(board, width_of)
        missing = [str(n) for n in FULL_RANGE if n not in widths]
        row = PanelRow(heading)
        if len(widths) < 2:
            have = (
                f"only {join_words(list(widths.values()))} is in the store"
                if widths
                else "no such cell is in the store"
            )
            row.note = f"No curve: {have}, and a curve takes two widths or more."
        else:
            if missing:
                row.note = (
                    f"Measured at {join_words([str(w) for w in widths])} bits; "
                    f"{join_words(missing)} bits {'is' if len(missing) == 1 else 'are'} not in the store."
                )
            row.panels = family_panels(board, styles, widths, x_label)
            row.large = not styles.split and sum(not p.alternative for p in row.panels) != 3
        rows.append(row)
    return rows


def family_panels(board: Board, styles: GroupStyles, widths: dict[int, str], x_label: str) -> list[Panel]:
    places = [(float(w), b) for w, b in widths.items()]
    last = float(max(*FULL_RANGE, *widths))
    labels = [(float(n), str(n)) for n in range(2, int(last) + 1)]
    if BASELINE in board.precisions:
        places.append((last + 1.2, BASELINE))
        labels.append((last + 1.2, BASELINE))
    kinds: list[tuple[str, Path, str, float, int, str]] = [
        (metric_title("top1"), ("id", "top1"), "", 100, 1, " %"),
        (metric_title("nll"), ("id", "nll"), "", 1, 3, ""),
    ]
    for part in board.parts():
        kinds += [
            (f"{AUPR}, {PART_NAMES[part]}", ("ood_mean", part, s, "aupr_out"), s, 100, 1, " %") for s in board.scores
        ]
    panels = []
    for what, path, score, factor, digits, unit in kinds:
        ceiling = 100.0 if unit else None
        drawn = [
            (name, series_of(board, styles, groups, places, path, factor=factor, digits=digits, unit=unit))
            for name, groups in styles.facets()
        ]
        chance = chance_level(board, board.groups, (*path[:-1], "chance_aupr_out")) if score else None
        ticks = svg.value_range([s for _, series in drawn for s in series], svg.below(chance), floor=0, ceiling=ceiling)
        for name, series in drawn:
            if not series:
                continue
            title = f"{what} against {x_label}" + (f", {name}" if name else "")
            y_label = f"{AUPR if score else what}{unit}"
            drawing = svg.line_chart(
                series,
                labels,
                title=title,
                description=describe(series, title),
                y_label=y_label,
                x_label=x_label,
                ticks=ticks,
                chance=chance,
            )
            notes = " · ".join(filter(None, [name, score and score_label(score)]))
            panels.append(Panel(Markup(drawing), what, notes, score, alternative=bool(score) and score != board.score))
    return panels


# -------------------------------------------------------------------------------- ranked changes


@dataclass(frozen=True)
class Change:
    """What quantization changed, to be ranked: the metric's path in the result, the words after its name, decimals, and
    the OOD score it belongs to."""

    path: Path
    note: str = ""
    digits: int = 1
    score: str = ""

    @property
    def metric(self) -> Metric:
        return METRICS[self.path[-1]]

    @property
    def title(self) -> str:
        return f"Δ {self.metric.title} {self.metric.arrow}{self.note}"


def changes(board: Board, scores: Sequence[str]) -> list[Change]:
    found = [Change(("id", "top1")), Change(("id", "nll"), digits=3)]
    for part in board.parts():
        found += [Change(("ood_mean", part, s, "aupr_out"), f", {PART_NAMES[part]}", score=s) for s in scores]
    return found


def change_bars(board: Board, styles: GroupStyles) -> list[Panel]:
    """A bar chart per metric and precision, the largest loss first."""
    panels = []
    for bits in reversed(board.quantized):
        for change in changes(board, board.scores):
            ranked = []
            for group in board.groups:
                stat = board.change(group, bits, change.path)
                if stat is not None:
                    ranked.append((stat.scaled(change.metric.factor), group))
            if not ranked:
                continue
            ranked.sort(key=lambda item: item[0].mean, reverse=change.metric.direction == "lower")
            bars = [
                Bar(
                    group.name if len(board.models) > 1 else group.method,
                    s.mean,
                    s.std,
                    mean_std(s, change.digits, sign=True),
                    styles.style(group),
                    count(s.n, "seed"),
                )
                for s, group in ranked[:MAX_BARS]
            ]
            title = f"{change.title} at {bits}"
            unit = change.metric.change_unit
            words = f"{title}, the largest loss first: {bars[0].label} {bars[0].text} {unit}"
            if len(bars) > 1:
                words += f" to {bars[-1].label} {bars[-1].text} {unit}"
            drawing = svg.bar_chart(bars, title=title, description=words)
            cut = f"the {MAX_BARS} largest of {len(ranked)}" if len(ranked) > MAX_BARS else ""
            notes = " · ".join(filter(None, [unit, change.score and score_label(change.score), cut]))
            panels.append(
                Panel(
                    Markup(drawing),
                    title,
                    notes,
                    change.score,
                    bits,
                    alternative=bits != board.lowest or (bool(change.score) and change.score != board.score),
                )
            )
    return panels


def __getattr__(name: str) -> object:
    """Names that have changed are found by their old ones, with a warning."""
    return _moved.find(__name__, name)
