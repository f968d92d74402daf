"""The report's section on shift: how robustness falls with bits, beside accuracy."""

from typing import Any

from quantlens.evaluation.result import CORRUPTED
from quantlens.metrics import METRICS, metric_of
from quantlens.plots.shift import SEVERAL, interval_text, titles
from quantlens.report.tables import delta_title
from quantlens.studies.board import Board
from quantlens.studies.robustness import EXTRA, RATIO, Measured, Robustness, has_shift, robustness
from quantlens.studies.text import BASELINE, count, fixed, join_words, metric_digits, score_label


def shift(board: Board) -> dict[str, Any] | None:
    """The section as its template shows it; None for a study without shifted images. lead: what it says, in words."""
    if not has_shift(board):
        return None
    found = robustness(board)
    measured = next(result["shift_mean"] for result in board.results if result.get("shift"))
    sets = measured.get(CORRUPTED, {}).get("n_sets", 0)
    named = [name for place, name in titles(board).items() if place.startswith("shift.")]
    images = [*([f"{count(sets, 'corruption')} of the ID images (by severity)"] if sets else []), *named]
    with_ends = any(one.low is not None for cell in found.values() for one in cell.values.values())
    return {
        "images": join_words(images),
        "corrupted": bool(sets),
        "intervals": with_ends,
        "score": score_label(board.score or ""),
        "tables": [one for one in (accuracy(board, found, bool(sets)), detection(board, found)) if one["rows"]],
    }


Cells = dict[tuple[int, str], Robustness]


def accuracy(board: Board, found: Cells, corrupted: bool) -> dict[str, Any]:
    """Top-1 of ID and of shifted images and what quantization changed of both, a row per group and precision."""
    places = {
        place: SEVERAL.lower() if place == f"shift_mean.{CORRUPTED}" else name
        for place, name in titles(board).items()
        if not place.startswith("shift_mean.severity")
    }
    columns: list[tuple[str, str, bool]] = [
        (f"{place}.top1", f"Top-1 % ↑, {name}", False) for place, name in places.items()
    ]
    columns += [(f"{place}.top1", f"{delta_title('top1')}, {name}", True) for place, name in places.items()]
    if corrupted:
        mean = f"shift_mean.{CORRUPTED}"
        columns += [(EXTRA, "difference of these", True), (RATIO, "mCE, % of FP32's ↓", True)]
        columns += [(f"{mean}.{name}", f"{delta_title(name)}, {SEVERAL.lower()}", True) for name in ("nll", "ece")]
    return table(board, found, columns, "Accuracy of ID and of shifted images; Δ = quantized − FP32")


def detection(board: Board, found: Cells) -> dict[str, Any]:
    """OOD detection without and with the shifted images as in-distribution."""
    columns = []
    for group in ("far", "near"):
        for name in ("auroc", "aupr_out"):
            for part, words in (("ood_mean", f"{group} sets"), ("full_spectrum_mean", f"{group} sets, full spectrum")):
                path = f"{part}.{group}.{board.score}.{name}"
                columns += [(path, f"{METRICS[name].heading}, {words}", False)]
                columns += [(path, f"{delta_title(name)}, {words}", True)]
    caption = (
        f"OOD detection by {score_label(board.score or '')}; in the full spectrum shifted images are in-distribution"
    )
    return table(board, found, columns, caption)


def table(board: Board, found: Cells, columns: list[tuple[str, str, bool]], caption: str) -> dict[str, Any]:
    """As the template's listing shows it. columns: (path, title, whether it is a change); those that no cell has are
    left out."""
    cells = [(group, bits, found[group.index, bits]) for group in board.groups for bits in board.precisions
             if (group.index, bits) in found]  # fmt: skip
    shown = {
        (path, changed): [(cell.changes if changed else cell.values).get(path) for *_, cell in cells]
        for path, _, changed in columns
    }
    kept = [(path, title, changed) for path, title, changed in columns if any(shown[path, changed])]
    rows = [[group.model, BASELINE if bits == BASELINE else group.method, bits] for group, bits, _ in cells]
    for path, _, changed in kept:
        for row, one in zip(rows, shown[path, changed], strict=True):
            row.append(text_of(path, one, changed))
    unique = list(dict.fromkeys(map(tuple, rows)))  # FP32 is the same for every method
    titles_of = ["Model", "Method", "Bits", *(title for _, title, _ in kept)]
    return {"caption": caption, "columns": titles_of, "rows": unique, "numeric": range(3, len(titles_of))}


def text_of(path: str, one: Measured | None, changed: bool) -> str:
    """A number with its interval."""
    metric = METRICS["top1"] if path == EXTRA else metric_of(path)
    if one is None:
        return fixed(None, 0)
    return interval_text(one, metric, metric_digits(metric.name), signed=changed and path != RATIO)
