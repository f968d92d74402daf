"""Figures of single cells (the lowest seed): histograms of OOD scores, reliability diagrams."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import altair as alt

from quantlens.metrics import METRICS
from quantlens.plots.precisions import SCORED, GroupLines
from quantlens.plots.style import COLOURS, MUTED, PAPER, Panel, PanelRow, one_row, tooltips
from quantlens.studies.board import Board, Group, dig
from quantlens.studies.text import BASELINE, number, percent, score_label

HISTOGRAMS = 3000
"""Histograms of a page at most; what comes after them is left out, and a note says so."""
CHOSEN = f"(datum.bits == bits || datum.bits == '{BASELINE}')"


def outline(result: Mapping[str, Any] | None, score: str, name: str | None) -> dict[str, Any] | None:
    """The outline of the histogram of the ID scores (name None) or of an OOD set, as densities: "edge" and "height",
    with the outline's ends on the axis. None where it is absent or empty."""
    tree = dig(result, ("histograms", score))
    edges, counts = dig(tree, ("edges",)), dig(tree, ("id",) if name is None else ("ood", name))
    if not edges or not counts or not sum(counts):
        return None
    widths = [max(b - a, 1e-12) * sum(counts) for a, b in pairwise(edges)]
    heights = [float(f"{c / w:.4g}") for c, w in zip(counts, widths, strict=True)]
    return {"edge": [float(f"{e:.5g}") for e in (edges[0], *edges)], "height": [0.0, *heights, 0.0]}


def shown_histograms(board: Board) -> tuple[list[tuple[str, str]], str]:
    """(precision, score) of the histograms that a page holds, and a sentence on what was left out: the first score at
    all precisions, then every score at the lowest, then the rest."""
    rank = {bits: i for i, bits in enumerate(reversed(board.quantized))}
    order = sorted(
        ((b, s) for s in board.scores for b in board.quantized),
        key=lambda bs: (bs[1] != board.score, bs[0] != board.lowest, board.scores.index(bs[1]), rank[bs[0]]),
    )
    each = 4 * max(len(board.groups) * len(board.sets), 1)
    kept = order[: max(1, HISTOGRAMS // each)]
    left_out = [f"{score_label(score)} at {bits}" for bits, score in order[len(kept) :]]
    shown = ", ".join(left_out[:4]) + (f" and {len(left_out) - 4} more" if len(left_out) > 4 else "")
    return kept, f"Left out to keep the file small: {shown}; the store has them." if left_out else ""


def histograms(board: Board) -> list[PanelRow]:
    """Scores of ID images and of one OOD set's, at FP32 and quantized: a panel per group and set."""
    kept, note = shown_histograms(board)
    panels, chart = [], histogram_chart()
    for group in board.groups:
        for name in board.sets:
            rows = [one for bits, score in kept for one in histogram_rows(group, bits, score, name)]
            panels.append(Panel(chart, rows, f"{group.method} · {name}", group.model, "hist", str(group.index)))
    return one_row(panels, note=note)


def histogram_rows(group: Group, bits: str, score: str, name: str) -> Iterator[dict[str, Any]]:
    """ID and OOD outlines at `bits` and at FP32; none without those at `bits`."""
    for precision, label in ((bits, "quantized"), (BASELINE, BASELINE)):
        for kind, who in (("ID", None), ("OOD", name)):
            found = outline(group.first(precision), score, who) if group.first(bits) is not None else None
            if found:
                yield {"kind": kind, "precision": label, "bits": bits, "score": score, **found}


def histogram_chart() -> Any:
    """Overlaid outlines: filled where quantized, dashed at FP32."""
    legend = alt.Legend(
        title=None, orient="top", symbolType="stroke", symbolSize=200, symbolStrokeWidth=1.6, symbolOpacity=1, offset=2
    )
    base = alt.Chart().encode(
        x=alt.X("edge:Q", title="score (more = more like ID)", scale=alt.Scale(zero=False, nice=False)),
        y=alt.Y("height:Q", title=None, stack=None, axis=alt.Axis(labels=False, grid=False)),
        color=alt.Color("kind:N", scale=alt.Scale(domain=["ID", "OOD"], range=list(COLOURS[:2])), legend=legend),
    )
    filled = base.mark_area(interpolate="step-after", opacity=0.16).transform_filter("datum.precision == 'quantized'")
    dash = alt.Scale(domain=["quantized", BASELINE], range=[[1, 0], [4, 2.5]])
    edged = base.mark_line(interpolate="step-after", strokeWidth=1.4).encode(
        strokeDash=alt.StrokeDash("precision:N", scale=dash, legend=legend),
        order=alt.Order("place:Q"),
        tooltip=["kind:N", "precision:N"],
    )
    return (
        alt.layer(filled, edged)
        .transform_filter(f"datum.bits == bits && {SCORED}")
        .transform_flatten(["edge", "height"])
        .transform_window(place="row_number()", groupby=["kind", "precision"])
        .properties(height=150)
    )


def reliability(board: Board) -> list[PanelRow]:
    """Accuracy against confidence at FP32 (grey) and quantized, a panel per group, with both ECEs."""
    lines, panels = GroupLines(board), []
    for group in board.groups:
        rows = [one for bits in board.precisions for one in reliability_rows(group, bits)]
        if any(one["bits"] != BASELINE for one in rows):
            chart = reliability_chart(COLOURS[lines.looks[lines.name(group)].colour])
            panels.append(Panel(chart, rows, group.method, group.model, "reliability", str(group.index)))
    return one_row(panels)


def reliability_rows(group: Group, bits: str) -> Iterator[dict[str, Any]]:
    """A row per bin that holds images (of a detector detections), in percent, and the ECE (D-ECE) in words."""
    of_id = dig(group.first(bits), ("id",)) or {}
    name = "d_ece" if "d_ece" in of_id else "ece"
    ece = f"{METRICS[name].title} {bits} {percent(number(of_id.get(name)))} %"
    bins = of_id.get("reliability") or {"confidence": [], "accuracy": [], "count": []}
    total = sum(bins["count"])
    for confidence, accuracy, n in zip(bins["confidence"], bins["accuracy"], bins["count"], strict=True):
        if n:
            percents = {"confidence": 100 * confidence, "accuracy": 100 * accuracy, "share": 100 * (n / total)}
            yield {"bits": bits, "ece": ece, **{key: round(value, 3) for key, value in percents.items()}}


def reliability_chart(colour: str) -> Any:
    """Below the diagonal a model is overconfident; the area of a marker grows with the share of images in its bin."""
    axis = {"scale": alt.Scale(domain=[0, 100]), "axis": alt.Axis(tickCount=6)}
    x = alt.X("confidence:Q", title="confidence %", **axis)
    y = alt.Y("accuracy:Q", title="accuracy %", **axis)
    shade = alt.condition(f"datum.bits == '{BASELINE}'", alt.value(MUTED), alt.value(colour))
    base = alt.Chart().encode(x=x, y=y, detail="bits:N")
    diagonal = alt.Chart(alt.Data(values=[{"at": 0}, {"at": 100}])).mark_line(strokeDash=[5, 4], color=MUTED)
    words = (
        alt.Chart()
        .mark_text(align="right", fontSize=11)
        .transform_aggregate(ece="min(ece)", groupby=["bits"])
        .transform_calculate(line=f"datum.bits == '{BASELINE}' ? 12 : 5")
        .encode(x=alt.value("width"), y="line:Q", text="ece:N", color=shade)
    )
    layers = [
        diagonal.encode(x=alt.X("at:Q"), y=alt.Y("at:Q")),
        base.mark_line(strokeWidth=1.1, opacity=0.55).encode(color=shade),
        base.mark_point(filled=True, opacity=0.8, stroke=PAPER, strokeWidth=0.8).encode(
            color=shade,
            size=alt.Size("share:Q", scale=alt.Scale(domain=[0, 100], range=[12, 500]), legend=None),
            tooltip=tooltips(bits="bits", confidence="confidence %", accuracy="accuracy %", share="% of images"),
        ),
        words,
    ]
    return alt.layer(*layers).transform_filter(CHOSEN).properties(height=240)
