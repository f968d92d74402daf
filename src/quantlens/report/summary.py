"""The first paragraph and the tiles: what was compared, and the headline, in words made from the metrics."""

from __future__ import annotations

from quantlens.plots.precisions import PART_NAMES
from quantlens.report.runinfo import cells_text
from quantlens.studies.board import Board, Group, Path, dig
from quantlens.studies.text import BASELINE, Stat, count, fixed, join_words, number, percent, score_label, span

Loss = tuple[Stat, Group]
"""A group's loss at the lowest precision (positive = worse)."""


def ranked(board: Board, path: Path | None) -> list[Loss]:
    """Groups by their loss of a share (top-1, AUPR-out) at the lowest precision, the largest loss first."""
    if board.lowest is None or path is None:
        return []
    changes = [(board.change(g, board.lowest, path), g) for g in board.groups]
    return sorted(((s.scaled(-1), g) for s, g in changes if s is not None), key=lambda entry: -entry[0].mean)


def sentences(board: Board) -> list[str]:
    """The findings, in words."""
    bits, ood = board.lowest, board.ood_path
    if not board.groups:
        return ["No cell of this study has finished, so there is nothing to show; the errors are listed below."]
    if bits is None:
        return ["Nothing has been quantized yet: the store holds FP32 cells only."]
    top1, oods = ranked(board, ("id", "top1")), ranked(board, ood)
    parts = []
    if not top1 and not oods:
        parts.append("The FP32 metrics are missing, so what quantization changed cannot be given.")
    if top1:
        parts.append(largest(board, f"At {bits}, the lowest precision, ", "top-1", ("id", "top1"), top1[0]))
    if oods and ood:
        what = f"AUPR-out by {score_label(ood[2])} ({PART_NAMES[ood[1]]})"
        parts.append(largest(board, f"At {bits} ", what, ood, oods[0]))
    return [part for part in (*parts, least(board, bits, top1)) if part]


def scope(board: Board) -> str:
    """What was measured on what."""
    quantized = [m for m in board.methods if m != "fp32"]
    done = f"quantized by {join_words(quantized)} at {join_words(board.quantized, limit=12)}"
    text = f"{join_words(board.models)} {'was' if len(board.models) == 1 else 'were'} "
    text += done if quantized else "measured at FP32"
    if quantized and BASELINE in board.precisions:
        text += " and compared with FP32"
    sizes = [int(n) for r in board.results if (n := number(dig(r, ("id", "n")))) is not None]
    text += f" on {span(sizes)} in-distribution images" if sizes else ""
    known = {kind: [name for name, k in board.sets.items() if k == kind] for kind in ("far", "near")}
    sets = [f"{kind}: {', '.join(names)}" for kind, names in known.items() if names]
    sets += [name for name, kind in board.sets.items() if kind not in known]
    found = f" and {count(len(board.sets), 'out-of-distribution set')} ({'; '.join(sets)})"
    text += found if board.sets else ", without out-of-distribution sets"
    if quantized and len(board.seeds) > 1:
        return f"{text}. Quantized metrics are means over seeds {join_words(list(map(str, board.seeds)), limit=12)}."
    if quantized:
        return f"{text}. There is one seed ({board.seeds[0]}), so no spread over seeds is given."
    return f"{text}."


def largest(board: Board, opening: str, what: str, path: Path, worst: Loss) -> str:
    """ "… the largest loss of top-1 is 49.0 points: model · method falls from 81.9 % to 32.9 %."."""
    loss, group = worst
    if loss.mean <= 0:
        return f"{opening}nothing loses {what}."
    text = f"{opening}the largest loss of {what} is {points(loss)}: {group.name}"
    before, after = board.stat(group, BASELINE, path), board.stat(group, str(board.lowest), path)
    if before and after:
        text += f" falls from {percent(before.mean)} % to {percent(after.mean)} %"
    return f"{text}."


def least(board: Board, bits: str, order: list[Loss]) -> str:
    """Which method (or, with one method, which model) loses least top-1 at the lowest precision."""
    said = f"loses least top-1 at {bits}"
    if len(board.methods) == 1 and len(order) > 1:
        loss, group = order[-1]
        return f"{group.model} {said}: {points(loss)}."
    models = [group.model for _, group in order]
    best = {group.model: (loss, group) for loss, group in order if models.count(group.model) > 1}
    winners = list(best.values())[:6]
    if len(winners) > 1 and len({group.method for _, group in best.values()}) == 1:
        found = ", ".join(f"{points(loss)} for {group.model}" for loss, group in winners)
        return f"{winners[0][1].method} {said} for every model: {found}."
    several = len(board.models) > 1
    words = [f"{g.method} {said}{f' for {g.model}' if several else ''} ({points(loss)})" for loss, g in winners]
    return join_words(words) + "." if words else ""


def points(loss: Stat) -> str:
    return f"{percent(loss.mean)} points"


def tiles(board: Board) -> list[tuple[str, str, str]]:
    """The metrics at a glance: label, value, note."""
    done, _, rest = cells_text(board).partition(", ")
    top1, oods = ranked(board, ("id", "top1")), ranked(board, board.ood_path)
    entries = [
        ("Largest top-1 loss", top1[:1]),
        ("Largest AUPR-out loss", oods[:1]),
        ("Least top-1 loss", top1[1:][-1:]),
    ]
    return [("Cells", done, rest)] + [
        (f"{label} at {board.lowest}", f"{fixed(-100 * loss.mean, 1, sign=True)} points", group.name)
        for label, found in entries
        for loss, group in found
    ]
