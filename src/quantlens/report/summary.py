"""The first paragraph and the tiles: what was compared, and the headline, in words made from the metrics."""

from quantlens.metrics import METRICS
from quantlens.plots.precisions import PART_NAMES
from quantlens.report.runinfo import cells_text
from quantlens.studies.board import Board, Group, Path
from quantlens.studies.text import BASELINE, Stat, fixed, join_words, score_label

Loss = tuple[Stat, Group]
"""A group's loss at the lowest precision, in points (positive = worse)."""


def ranked(board: Board, path: Path | None) -> list[Loss]:
    """Groups by their loss of a share (top-1, AUPR-out) at the lowest precision, the largest loss first."""
    if board.lowest is None or path is None:
        return []
    changes = [(board.shown(g, board.lowest, path, change=True), g) for g in board.groups]
    return sorted(((s.scaled(-1), g) for s, g in changes if s is not None), key=lambda entry: -entry[0].mean)


def sentences(board: Board) -> list[str]:
    """The findings, in words."""
    bits, ood = board.lowest, board.ood_path
    if not board.groups:
        return ["No cell of this study has finished, so there is nothing to show; the errors are listed below."]
    if bits is None:
        return ["Nothing has been quantized yet: the store holds FP32 cells only."]
    judged, what = ("id", board.summary[0]), METRICS[board.summary[0]].title
    found, oods = ranked(board, judged), ranked(board, ood)
    parts = []
    if not found and not oods:
        parts.append("The FP32 metrics are missing, so what quantization changed cannot be given.")
    if found:
        parts.append(largest(board, f"At {bits}, the lowest precision, ", what, judged, found[0]))
    if oods and ood:
        by_score = f"AUPR-out by {score_label(ood[2])} ({PART_NAMES[ood[1]]})"
        parts.append(largest(board, f"At {bits} ", by_score, ood, oods[0]))
    return [part for part in (*parts, least(board, bits, found, what)) if part]


def sets_by_kind(board: Board) -> list[str]:
    """The OOD sets: the far ones and the near ones together, and each that is neither."""
    known = {kind: [name for name, k in board.sets.items() if k == kind] for kind in ("far", "near")}
    sets = [f"{kind}: {', '.join(names)}" for kind, names in known.items() if names]
    return sets + [name for name, kind in board.sets.items() if kind not in known]


def largest(board: Board, opening: str, what: str, path: Path, worst: Loss) -> str:
    """ "… the largest loss of top-1 is 49.0 points: model · method falls from 81.9 % to 32.9 %."."""
    loss, group = worst
    if loss.mean <= 0:
        return f"{opening}nothing loses {what}."
    text = f"{opening}the largest loss of {what} is {points(loss)}: {group.name}"
    before, after = board.shown(group, BASELINE, path), board.shown(group, str(board.lowest), path)
    if before and after:
        text += f" falls from {fixed(before.mean, 1)} % to {fixed(after.mean, 1)} %"
    return f"{text}."


def least(board: Board, bits: str, order: list[Loss], what: str) -> str:
    """Which method (or, with one method, which model) loses least of a metric at the lowest precision."""
    said = f"loses least {what} at {bits}"
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
    return f"{fixed(loss.mean, 1)} points"


def tiles(board: Board) -> list[tuple[str, str, str]]:
    """The metrics at a glance: label, value, note."""
    done, _, rest = cells_text(board).partition(", ")
    losses, oods = ranked(board, ("id", board.summary[0])), ranked(board, board.ood_path)
    what = METRICS[board.summary[0]].title
    entries = [
        (f"Largest {what} loss", losses[:1]),
        ("Largest AUPR-out loss", oods[:1]),
        (f"Least {what} loss", losses[1:][-1:]),
    ]
    return [("Cells", done, rest)] + [
        (f"{label} at {board.lowest}", f"{fixed(-loss.mean, 1, sign=True)} points", group.name)
        for label, found in entries
        for loss, group in found
    ]
