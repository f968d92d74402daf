"""How robustness falls with bits: metrics of shifted images by precision, beside those of the ID images, with intervals
by a bootstrap over images; and what each corruption costs."""

from collections.abc import Iterator
from typing import Any

import altair as alt

from quantlens.evaluation.result import CORRUPTED
from quantlens.metrics import METRICS
from quantlens.plots.precisions import PART_NAMES, GroupLines, drawn, line_chart, point
from quantlens.plots.style import COLOURS, INK, Panel, PanelRow, one_row, tooltips
from quantlens.studies.board import Board
from quantlens.studies.robustness import EXTRA, RATIO, Measured, losses, parts_of, robustness, sets_of
from quantlens.studies.text import BASELINE, Stat, fixed, metric_title, score_label


def titles(board: Board) -> dict[str, str]:
    """Place of a metric -> what it is of, those of top-1: the ID images, corrupted ones by severity, other sets."""
    parts = {f"shift_mean.{name}": name.replace("severity_", "severity ") for name in parts_of(board)}
    if len(parts) == 2:  # of one severity alone, which the mean over all is
        parts = dict(list(parts.items())[1:])
    parts = {place: "all severities" if name == CORRUPTED else name for place, name in parts.items()}
    return {"id": "ID images", **parts, **{f"shift.{name}": name for name in sets_of(board)}}


def shift(board: Board) -> list[PanelRow]:
    """Top-1 of ID images and of shifted ones; what corruption adds to the loss, NLL and ECE; full-spectrum OOD
    detection."""
    found = robustness(board)
    if not found:
        return []
    lines, title = GroupLines(board), metric_title("top1")
    row = [one for place, name in titles(board).items() for one in panels(lines, f"{place}.top1", title, name, found)]
    shared = [entry for panel in row for entry in panel.rows]
    rows = one_row((with_range(lines, panel, "top1", shared) for panel in row), "Top-1 of ID and shifted images")
    mean = f"shift_mean.{CORRUPTED}"
    under = [
        *panels(lines, RATIO, "mCE of FP32's", "100 %: as robust as FP32", found, changes=True),
        *panels(lines, EXTRA, "Δ top-1 on corrupted less Δ on ID images", "points", found, changes=True),
        *panels(lines, f"{mean}.nll", metric_title("nll"), "corrupted images", found),
        *panels(lines, f"{mean}.ece", metric_title("ece"), "corrupted images", found),
    ]
    rows += one_row(under, "Corrupted images, mean over corruptions and severities", large=True)
    detection: list[Panel] = []
    for group in ("far", "near"):
        for part, words in (("ood_mean", ""), ("full_spectrum_mean", "full spectrum, ")):
            path, detail = f"{part}.{group}.{board.score}.auroc", f"{words}{PART_NAMES[group]}"
            detection += panels(lines, path, metric_title("auroc"), detail, found)
    heading = f"OOD detection by {score_label(board.score or '')}, without and with shifted images as in-distribution"
    shared = [entry for panel in detection for entry in panel.rows]
    return rows + one_row((with_range(lines, panel, "auroc", shared) for panel in detection), heading, large=True)


def panels(
    lines: GroupLines, path: str, caption: str, detail: str, found: Any, *, changes: bool = False
) -> Iterator[Panel]:
    """A panel of a metric by precision, or one for each model where those stand in panels of their own."""
    board, name = lines.board, path.rpartition(".")[2]
    metric = METRICS["top1" if name == EXTRA else name]
    for facet, groups in lines.facets():
        rows = []
        for group in groups:
            for bits in board.precisions:
                cell = found.get((group.index, bits))
                one = cell and (cell.changes if changes else cell.values).get(path)
                rows.append(entry(lines.name(group), bits, one, metric, signed=name == EXTRA))
        shown = drawn(rows)
        if shown:
            words = " · ".join(filter(None, [facet, detail]))
            label = {EXTRA: "points", RATIO: "% of FP32's mCE"}.get(name, metric.label)
            chart = line_chart(shown, lines.looks, board.precisions, y_label=label)
            yield Panel(chart, shown, caption, words)


def entry(line: str, bits: str, one: Measured | None, metric: Any, *, signed: bool = False) -> dict[str, Any]:
    """A row of a line chart, whose bar is the interval."""
    if one is None:
        return point(line, bits, None, 1)
    digits = 1 if metric.percent else metric.digits
    ends = [one.value if end is None else end for end in one[1:]]
    low, high = (metric.factor * end for end in ends)
    said = interval_text(one, metric, digits, signed=signed)
    return point(line, bits, Stat(one.value * metric.factor, None, 1), digits) | {
        "low": low,
        "high": high,
        "said": said,
    }


def interval_text(one: Measured | None, metric: Any, digits: int, *, signed: bool = False) -> str:
    """ "−4.2 (−5.0 to −3.1)"."""
    if one is None:
        return fixed(None, digits)
    value, *ends = (None if v is None else fixed(metric.factor * v, digits, sign=signed) for v in one)
    return str(value) if None in ends else f"{value} ({' to '.join(map(str, ends))})"


def with_range(lines: GroupLines, panel: Panel, name: str, shared: Any) -> Panel:
    """The same panel with the range of all of them."""
    label = METRICS[name].label
    chart = line_chart(panel.rows, lines.looks, lines.board.precisions, y_label=label, range_of=shared)
    return Panel(chart, panel.rows, panel.caption, panel.detail)


def corruptions(board: Board) -> list[PanelRow]:
    """What quantization changed of top-1 under each corruption, at the chosen precision: a map per model."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for group, bits, corruption, before, change in losses(board):
        said = f"{fixed(100 * before, 1)} % at {BASELINE}, {fixed(100 * change, 1, sign=True)} points"
        shown = {"corruption": corruption.replace("_", " "), "line": group.method, "change": 100 * change}
        row = {"bits": bits, **shown, "text": fixed(100 * change, 1, sign=True), "said": said}
        by_model.setdefault(group.model, []).append(row)
    return one_row(
        (Panel(heat_map(rows), rows, "Δ top-1, points", model, "bars") for model, rows in by_model.items()), large=True
    )


def heat_map(rows: list[dict[str, Any]]) -> Any:
    """Corruptions × methods; the stronger the colour, the more is lost."""
    order = list(dict.fromkeys(row["corruption"] for row in rows))
    least = min(row["change"] for row in rows)
    base = (
        alt.Chart()
        .transform_filter("datum.bits == bits")
        .encode(
            x=alt.X("line:N", title=None, sort=None, axis=alt.Axis(orient="top", labelAngle=0, ticks=False)),
            y=alt.Y("corruption:N", title=None, sort=order, axis=alt.Axis(titleAngle=0, grid=False)),
            tooltip=tooltips(corruption="corruption", line="method", said="top-1"),
        )
    )
    scale = alt.Scale(domain=[min(least, -1.0), 0], range=[0.75, 0], clamp=True)
    layers = [
        base.mark_rect(color=COLOURS[1]).encode(opacity=alt.Opacity("change:Q", scale=scale, legend=None)),
        base.mark_text(fontSize=11, color=INK).encode(text="text:N"),
    ]
    return alt.layer(*layers).properties(height=max(130, 20 * len(order)))
