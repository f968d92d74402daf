"""The charts of single cells: histograms of OOD scores, reliability diagrams. One seed each, the lowest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from quantlens.plots.histograms import Outline, Reliability, histogram, reliability_diagram
from quantlens.report.charts import GroupStyles, Panel
from quantlens.report.collect import Board, Group, dig
from quantlens.report.text import BASELINE, number, percent, plain, score_label

HISTOGRAM_BUDGET = 700_000
"""Characters of histogram drawings in the file; what comes after that is left out, and the report says so."""


def numbers(values: Any) -> list[float] | None:
    """A list of finite numbers, or None where it is not one."""
    if not isinstance(values, list | tuple) or not values:
        return None
    found = [number(v) for v in values]
    return None if any(v is None for v in found) else [v for v in found if v is not None]


def bars_of(result: Mapping[str, Any] | None, score: str, name: str | None) -> tuple[list[float], list[float]] | None:
    """(edges, counts) of the ID scores (name None) or of an OOD set; None where absent or empty."""
    tree = dig(result, ("histograms", score))
    edges = numbers(dig(tree, ("edges",)))
    counts = numbers(dig(tree, ("id",)) if name is None else dig(tree, ("ood", name)))
    if edges is None or counts is None or len(edges) != len(counts) + 1 or not sum(counts) > 0:
        return None
    return edges, counts


def histogram_panel(board: Board, group: Group, bits: str, score: str, name: str) -> Panel | None:
    """ID and one OOD set's scores at FP32 and at `bits`, as shares of their images.

    Where the two precisions have unlike bin edges the heights are densities (share per unit of score).
    """
    wanted = [(BASELINE, group.fp32), (bits, group.first(bits))]
    found = []
    for precision, result in wanted:
        for kind, who in (("id", None), ("ood", name)):
            bars = bars_of(result, score, who)
            if bars is not None:
                found.append((precision, kind, *bars))
    if not any(precision == bits for precision, *_ in found):
        return None
    same = all(edges == found[0][2] for _, _, edges, _ in found)
    outlines = []
    for precision, kind, edges, counts in found:
        total = sum(counts)
        heights = [100 * c / total for c in counts]
        if not same:
            heights = [h / 100 / max(b - a, 1e-12) for h, a, b in zip(heights, edges, edges[1:], strict=False)]
        who = "ID images" if kind == "id" else f"OOD images, {name}"
        outlines.append(
            Outline(edges, heights, f"{kind} {'fp' if precision == BASELINE else 'qu'}", f"{who}, {precision}")
        )
    label = score_label(score)
    title = f"{label} of ID and {name} images, FP32 and {bits}, {group.name}"
    lacking = "" if any(p == BASELINE for p, *_ in found) else " FP32 histogram not in the store."
    drawing = histogram(
        outlines,
        title=title,
        description=title + f", as overlaid outlines.{lacking}",
        x_label=f"{label} (more = more like ID)",
        y_label="% of images per bin" if same else "density",
        labelled=same,
    )
    chosen = bits == board.lowest and score == board.score
    return Panel(
        Markup(drawing),
        f"{group.method} · {name}",
        f"{group.model} · {label} · FP32 and {bits}",
        score,
        bits,
        str(group.index),
        not chosen,
    )


def histograms(board: Board) -> tuple[list[Panel], str]:
    """Histogram panels within the size budget and a sentence on what was left out.

    MSP (or the first score) comes first with all precisions, then every score at the lowest precision, then
    the rest.
    """
    panels: list[Panel] = []
    rank = {bits: i for i, bits in enumerate(reversed(board.quantized))}
    order = sorted(
        ((b, s) for s in board.scores for b in board.quantized),
        key=lambda bs: (bs[1] != board.score, bs[0] != board.lowest, board.scores.index(bs[1]), rank[bs[0]]),
    )
    spent, left_out = 0, []
    for bits, score in order:
        batch = [
            p
            for g in board.groups
            for name in board.sets
            if g.first(bits) is not None and (p := histogram_panel(board, g, bits, score, name)) is not None
        ]
        size = sum(len(p.svg) for p in batch)
        if panels and spent + size > HISTOGRAM_BUDGET:
            if batch:
                left_out.append(f"{score_label(score)} at {bits}")
            continue
        panels += batch
        spent += size
    note = ""
    if left_out:
        shown = ", ".join(left_out[:4]) + (f" and {len(left_out) - 4} more" if len(left_out) > 4 else "")
        note = f"Left out to keep the file small: {shown}; the store has them."
    return panels, note


def reliability_bins(result: Mapping[str, Any] | None) -> list[tuple[float, float, float]]:
    """(confidence, accuracy, share of images) of the bins that hold images."""
    tree = dig(result, ("id", "reliability"))
    counts, confidence, accuracy = (dig(tree, (k,)) for k in ("count", "confidence", "accuracy"))
    if not all(isinstance(v, list | tuple) for v in (counts, confidence, accuracy)):
        return []
    rows = [(number(c), number(a), number(n)) for c, a, n in zip(confidence, accuracy, counts, strict=False)]
    total = sum(n for _, _, n in rows if n)
    return [(c, a, n / total) for c, a, n in rows if n and c is not None and a is not None]


def reliability_diagrams(board: Board, styles: GroupStyles) -> list[Panel]:
    """Accuracy against confidence at FP32 and quantized, one panel per group and precision, with both
    ECEs."""
    panels = []
    for bits in reversed(board.quantized):
        for group in board.groups:
            result = group.first(bits)
            bins = reliability_bins(result)
            if not bins:
                continue
            curves, notes = [], []
            base = reliability_bins(group.fp32)
            if base:
                curves.append(Reliability(base, "fp", BASELINE))
                notes.append(f"ECE {BASELINE} {ece(group.fp32)} %")
            curves.append(Reliability(bins, styles.style(group).classes.split()[0], bits))
            notes.append(f"ECE {bits} {ece(result)} %")
            title = f"Reliability of {group.name}, FP32 and {bits}"
            drawing = reliability_diagram(curves, title=title, description=f"{title}. {'; '.join(notes)}.")
            seed = f"seed {plain(result and result.get('seed'))}"
            panels.append(
                Panel(
                    Markup(drawing),
                    f"{group.method} · {', '.join(notes)}",
                    f"{group.model} · {seed}",
                    "",
                    bits,
                    str(group.index),
                    bits != board.lowest,
                )
            )
    return panels


def ece(result: Mapping[str, Any] | None) -> str:
    return percent(number(dig(result, ("id", "ece"))))
