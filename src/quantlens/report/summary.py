"""The first paragraph and the tiles: what was compared, and the headline, in words made from the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantlens.plots.precisions import PART_NAMES
from quantlens.report.runinfo import cells_text
from quantlens.studies.board import Board, Group, Path, dig
from quantlens.studies.text import (
    BASELINE,
    Stat,
    count,
    fixed,
    join_words,
    number,
    percent,
    score_label,
)


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Ranked:
    """A group's loss at the lowest precision (positive = worse), with its metrics at FP32 and quantized."""

    group: Group
    loss: Stat
    before: Stat | None
    after: Stat | None


def ranked(board: Board, path: Path) -> list[Ranked]:
    """Groups by their loss of a share (top-1, AUPR-out) at the lowest precision, the largest loss first."""
    bits = board.lowest
    if bits is None:
        return []
    found = [
        Ranked(g, change.scaled(-1), board.stat(g, BASELINE, path), board.stat(g, bits, path))
        for g in board.groups
        if (change := board.change(g, bits, path)) is not None
    ]
    return sorted(found, key=lambda r: -r.loss.mean)


def ood_path(board: Board) -> tuple[str, Path] | None:
    """(its words, path) of the headline OOD metric: AUPR-out of the far mean, else of all or near sets."""
    if board.score is None or not board.parts():
        return None
    part = board.parts()[0]
    return (
        f"AUPR-out by {score_label(board.score)} ({PART_NAMES[part]})",
        ("ood_mean", part, board.score, "aupr_out"),
    )


def sentences(board: Board) -> list[str]:
    """The findings, in words."""
    if not board.groups:
        return ["No cell of this study has finished, so there is nothing to show; the errors are listed below."]
    parts = []
    bits = board.lowest
    if bits is None:
        return ["Nothing has been quantized yet: the store holds FP32 cells only."]
    top1 = ranked(board, ("id", "top1"))
    ood = ood_path(board)
    oods = ranked(board, ood[1]) if ood else []
    if not top1 and not oods:
        parts.append("The FP32 metrics are missing, so what quantization changed cannot be given.")
    if top1:
        parts.append(largest(f"At {bits}, the lowest precision, ", "top-1", top1))
    if oods and ood:
        parts.append(largest(f"At {bits} ", ood[0], oods))
    if top1:
        parts.append(least(board, bits, top1))
    return [p for p in parts if p]


def scope(board: Board) -> str:
    quantized = [m for m in board.methods if m != "fp32"]
    text = join_words(board.models)
    if quantized:
        text += f" {'was' if len(board.models) == 1 else 'were'} quantized by {join_words(quantized)}"
        text += f" at {join_words(board.quantized, limit=12)}"
        if BASELINE in board.precisions:
            text += " and compared with FP32"
    else:
        text += f" {'was' if len(board.models) == 1 else 'were'} measured at FP32"
    n_id = sorted({int(n) for r in board.results if (n := number(dig(r, ("id", "n")))) is not None})
    if n_id:
        sizes = str(n_id[0]) if len(n_id) == 1 else f"{n_id[0]} to {n_id[-1]}"
        text += f" on {sizes} in-distribution images"
    if board.sets:
        kinds = [
            f"{kind}: {', '.join(names)}"
            for kind in ("far", "near", "")
            if (names := [n for n, k in board.sets.items() if k == kind]) and kind
        ]
        kinds += [n for n, k in board.sets.items() if k not in ("far", "near")]
        text += f" and {count(len(board.sets), 'out-of-distribution set')} ({'; '.join(kinds)})"
    else:
        text += ", without out-of-distribution sets"
    text += "."
    if quantized and len(board.seeds) > 1:
        seeds = join_words([fixed(s, 0) for s in board.seeds], limit=12)
        text += f" Quantized metrics are means over seeds {seeds}."
    elif quantized and board.seeds:
        text += f" There is one seed ({fixed(board.seeds[0], 0)}), so no spread over seeds is given."
    return text


def largest(opening: str, what: str, order: Sequence[Ranked]) -> str:
    """ "… the largest loss of top-1 is 49.0 points: model · method falls from 81.9 % to 32.9 %."."""
    worst = order[0]
    if worst.loss.mean <= 0:
        return f"{opening}nothing loses {what}."
    text = f"{opening}the largest loss of {what} is {percent(worst.loss.mean)} points: {worst.group.name}"
    if worst.before and worst.after:
        return f"{text} falls from {percent(worst.before.mean)} % to {percent(worst.after.mean)} %."
    return f"{text}."


def least(board: Board, bits: str, order: Sequence[Ranked]) -> str:
    """Which method (or, with one method, which model) loses least top-1 at the lowest precision."""
    if len(order) < 2:
        return ""
    if len(board.methods) == 1:
        best = order[-1]
        return f"{best.group.model} loses least top-1 at {bits}: {points(best.loss)}."
    winners = {}
    for entry in order:
        if sum(e.group.model == entry.group.model for e in order) > 1:
            winners[entry.group.model] = entry
    names = {w.group.method for w in winners.values()}
    if not winners:
        return ""
    if len(names) == 1 and len(winners) > 1:
        found = ", ".join(f"{points(w.loss)} for {m}" for m, w in list(winners.items())[:6])
        return f"{names.pop()} loses least top-1 at {bits} for every model: {found}."
    said = [
        f"{w.group.method} loses least top-1 at {bits}"
        + (f" for {m}" if len(board.models) > 1 else "")
        + f" ({points(w.loss)})"
        for m, w in list(winners.items())[:6]
    ]
    return join_words(said) + "."


def points(loss: Stat) -> str:
    return f"{percent(loss.mean)} points"


def tiles(board: Board) -> list[Tile]:
    """The metrics at a glance."""
    done, _, rest = cells_text(board).partition(", ")
    cells = Tile("Cells", done, rest)
    bits = board.lowest
    if bits is None:
        return [cells]
    found = [cells]
    top1 = ranked(board, ("id", "top1"))
    ood = ood_path(board)
    if top1:
        found.append(Tile(f"Largest top-1 loss at {bits}", loss_text(top1[0].loss), top1[0].group.name))
    if ood and (oods := ranked(board, ood[1])):
        found.append(Tile(f"Largest AUPR-out loss at {bits}", loss_text(oods[0].loss), oods[0].group.name))
    if len(top1) > 1:
        found.append(Tile(f"Least top-1 loss at {bits}", loss_text(top1[-1].loss), top1[-1].group.name))
    return found


def loss_text(loss: Stat) -> str:
    """A loss as the change it is: −49.0 points; a gain with a plus."""
    return f"{fixed(-100 * loss.mean, 1, sign=True)} points"
