"""Drift of attention in the report: curves against bits, and its correlation with the change of AUPR-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantlens.attention.association import Association, associate
from quantlens.attention.metrics import CAUSES, KL, OUTLIERS, RANK, WHERE, DriftMetric, value_in
from quantlens.plots import svg
from quantlens.plots.svg import Frame, Point, Series, coord, marker
from quantlens.report.charts import FAMILIES, GroupStyles, Panel, PanelRow, describe, family_widths
from quantlens.report.collect import Board, Group, Path, change_of
from quantlens.report.text import BASELINE, MISSING, Stat, count, fixed, mean_std, score_label

CURVES = (RANK, KL, OUTLIERS)

LINK_COLUMNS = [
    "Drift",
    "Measured on",
    "Cells",
    "Pearson",
    "Spearman",
    "95 % interval",
    "Spearman within precisions",
]


def stat_of(group: Group, bits: str, where: str, metric: DriftMetric) -> Stat | None:
    """Mean and standard deviation over seeds."""
    results = [group.fp32] if bits == BASELINE else group.cells.get(bits, [])
    return Stat.of(value_in(r, where, metric) for r in results)


# -- curves -----------------------------------------------------------------------------------------------------------
def curves(board: Board, styles: GroupStyles) -> list[PanelRow]:
    """Drift against bits: both operands, weights alone, activations alone; ID and OOD images apart."""
    rows = []
    for heading, x_label, width_of in FAMILIES:
        widths = family_widths(board, width_of)
        if len(widths) < 2:
            continue
        places = [(float(w), b) for w, b in widths.items()]
        last = float(max(8, *widths))
        labels = [(float(n), str(n)) for n in range(min(widths), int(last) + 1)]
        if BASELINE in board.precisions:
            places.append((last + 1.2, BASELINE))
            labels.append((last + 1.2, BASELINE))
        panels: dict[str, list[Panel]] = {where: [] for where in WHERE}
        for metric in CURVES:
            for where, panel in _curve_panels(styles, metric, places, labels, x_label):
                panels[where].append(panel)
        rows.append(PanelRow(heading, [p for drawn_there in panels.values() for p in drawn_there]))
    return rows


def _curve_panels(
    styles: GroupStyles,
    metric: DriftMetric,
    places: Sequence[tuple[float, str]],
    labels: Sequence[tuple[float, str]],
    x_label: str,
) -> list[tuple[str, Panel]]:
    """(where it was measured, panel) of one metric, with one range of values for all."""
    drawn = [
        (where, name, _lines(styles, groups, places, where, metric))
        for where in WHERE
        for name, groups in styles.facets()
    ]
    ticks = svg.value_range([s for _, _, series in drawn for s in series], floor=metric.floor, ceiling=metric.ceiling)
    panels = []
    for where, name, series in drawn:
        if not series:
            continue
        title = f"{metric.title}, {WHERE[where]}, against {x_label}" + (f", {name}" if name else "")
        drawing = svg.line_chart(
            series,
            labels,
            title=title,
            description=describe(series, title),
            y_label=metric.label,
            x_label=x_label,
            ticks=ticks,
        )
        notes = " · ".join(filter(None, [WHERE[where], name]))
        panels.append((where, Panel(Markup(drawing), metric.title, notes)))
    return panels


def _lines(
    styles: GroupStyles, groups: Sequence[Group], places: Sequence[tuple[float, str]], where: str, metric: DriftMetric
) -> list[Series]:
    """A line per group; a precision without a value is a gap."""
    found = []
    for group in groups:
        points: list[Point | None] = []
        for x, bits in places:
            stat = stat_of(group, bits, where, metric)
            if stat is None:
                points.append(None)
                continue
            words = f"{styles.label(group)}, {bits}: {mean_std(stat, metric.digits)}"
            points.append(Point(x, stat.mean, stat.std, words))
        if any(points):
            found.append(Series(styles.label(group), styles.style(group), styles.key(group), points))
    return found


# -- drift and the change of AUPR-out ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pair:
    """One quantized cell: its group, precision, drift (x) and change of AUPR-out (y)."""

    group: Group
    bits: str
    seed: str
    x: float
    y: float


def pairs(board: Board, path: Path, where: str, metric: DriftMetric) -> list[Pair]:
    """(drift, change of AUPR-out in points) of every quantized cell that has both."""
    found = []
    for group in board.groups:
        for bits, results in group.cells.items():
            for result in results:
                x, change = value_in(result, where, metric), change_of(group, result, path)
                if x is not None and change is not None:
                    found.append(Pair(group, bits, str(result.get("seed")), x, 100 * change))
    return found


def correlations(board: Board, styles: GroupStyles) -> tuple[list[Panel], list[list[str]], str]:
    """(scatter plots, rows of the table in LINK_COLUMNS, what it is that changes)."""
    parts, score = board.parts(), board.score
    if not parts or score is None:
        return [], [], ""
    names = {"far": "mean of the far sets", "near": "mean of the near sets", "all": "mean of all sets"}
    what = f"AUPR-out by {score_label(score)}, {names[parts[0]]}"
    path = ("ood_mean", parts[0], score, "aupr_out")
    panels, rows = [], []
    for metric in CAUSES:
        for where in WHERE:
            points = pairs(board, path, where, metric)
            if not points:
                continue
            found = associate(
                [p.x for p in points],
                [p.y for p in points],
                [(p.group.index, p.bits) for p in points],
                [p.bits for p in points],
            )
            rows.append(_link(metric, where, found))
            if metric in CAUSES[:2]:
                panels.append(scatter(points, styles, metric, where, what, found))
    return panels, rows, what


def _link(metric: DriftMetric, where: str, found: Association) -> list[str]:
    return [
        metric.title,
        "ID" if where == "id" else "OOD",
        f"{found.n} ({count(found.conditions, 'condition')})",
        _r(found.pearson),
        _r(found.spearman),
        MISSING if found.low is None else f"{_r(found.low)} to {_r(found.high)}",
        _r(found.within),
    ]


def _r(value: float | None) -> str:
    return fixed(value, 2)


def scatter(
    points: Sequence[Pair], styles: GroupStyles, metric: DriftMetric, where: str, what: str, found: Association
) -> Panel:
    """Change of AUPR-out against drift, a mark per cell."""
    xs = svg.nice_ticks(min(0.0, *(p.x for p in points)), max(p.x for p in points), 5)
    ys = svg.nice_ticks(min(p.y for p in points), max(0.0, *(p.y for p in points)), 8)
    frame = Frame((xs[0], xs[-1]), (ys[0], ys[-1]), top=26)
    frame.grid_y(ys)
    frame.axis_x((x, svg.tick_text(x, xs[1] - xs[0])) for x in xs)
    frame.labels(metric.label, "Δ AUPR-out, points")
    if ys[-1] > 0:
        y = coord(frame.y(0.0))
        frame.body.append(f'<path class="a" d="M{frame.left} {y}H{frame.width - frame.right}"/>')
    by_key: dict[int, list[str]] = {}
    classes = {}
    for p in points:
        key, style = styles.key(p.group), styles.style(p.group)
        tip = f"{p.group.name}, {p.bits}, seed {p.seed}: drift {fixed(p.x, metric.digits)}, "
        tip += f"Δ AUPR-out {fixed(p.y, 1, sign=True)} points"
        classes[key] = style.classes
        by_key.setdefault(key, []).append(marker(style.marker, frame.x(p.x), frame.y(p.y), tip))
    for key, marks in by_key.items():
        frame.body.append(f'<g class="s {classes[key]}" data-s="{key}">{"".join(marks)}</g>')
    title = f"Change of {what} against {metric.label} on {WHERE[where]}"
    rho = "too few cells for a correlation" if found.spearman is None else f"Spearman {_r(found.spearman)}"
    interval = "" if found.low is None else f" (95 % {_r(found.low)} to {_r(found.high)})"
    words = f"{rho}{interval}, {count(found.n, 'cell')}"
    drawing = frame.svg(title, f"{title}: {words}.", "lines scatter")
    return Panel(Markup(drawing), metric.title, f"on {WHERE[where]} · {words}")
