"""The report's section on shift: how robustness falls with bits, beside accuracy."""

from typing import Any

from quantlens.evaluation.result import CORRUPTED
from quantlens.metrics import METRICS, metric_of
from quantlens.plots.shift import interval_text, titles
from quantlens.report.tables import delta_title
from quantlens.studies.board import Board, dig
from quantlens.studies.robustness import (
    EXTRA,
    RATIO,
    Measured,
    Robustness,
    has_shift,
    parts_of,
    robustness,
    sets_of,
)
from quantlens.studies.text import BASELINE, count, fixed, join_words, metric_digits, metric_heading, score_label

Cells = dict[tuple[int, str], Robustness]


def shift(board: Board) -> dict[str, Any] | None:
    """The section as its template shows it; None for a study without shifted images. lead: what it says, in words."""
    if not has_shift(board):
        return None
    found = robustness(board)
    counted = [dig(result, ("shift_mean", CORRUPTED, "n_sets")) for result in board.results]
    sets = next((int(n) for n in counted if n), 0)
    images = [*([count(sets, "corrupted version") + " of the ID images"] if sets else []), *sets_of(board)]
    with_ends = any(one.low is not None for cell in found.values() for one in cell.values.values())
    return {
        "images": join_words(images),
        "corrupted": bool(sets),
        "intervals": with_ends,
        "said": said(found),
        "first": accuracy(board, found),
        "folded": [one for one in (others(board, found), detection(board, found)) if len(one["columns"]) > 3],
    }


def said(found: Cells) -> str:
    """In how many cells corruption adds to the loss of accuracy, as far as images tell."""
    ends = [(one.low, one.high) for cell in found.values() if (one := cell.changes.get(EXTRA)) is not None]
    if not ends or (None, None) in ends:
        return ""
    more = sum(high is not None and high < 0 for _, high in ends)
    less = sum(low is not None and low > 0 for low, _ in ends)
    cells = count(len(ends), "cell")
    if not more + less:
        return f"In each of {cells} the interval of what corrupted images lose more of top-1 than ID images holds 0."
    found = f"more top-1 on corrupted images than on ID images in {more} of {cells}, less in {less}"
    return f"Quantization costs {found}; in the others the interval of the difference holds 0."


def accuracy(board: Board, found: Cells) -> dict[str, Any]:
    """Top-1 of ID and of corrupted images (without any, of other shifted ones), and what quantization changed of both,
    a row per group and precision."""
    chosen = {place: name for place, name in names_of(board).items() if place != "id"}
    first = dict(list(chosen.items())[:1]) if f"shift_mean.{CORRUPTED}" in chosen else chosen
    places = {"id": "ID images", **first}
    columns = [(f"{place}.top1", f"Top-1 % ↑, {name}", False) for place, name in places.items()]
    columns += [(f"{place}.top1", f"{delta_title('top1')}, {name}", True) for place, name in places.items()]
    columns += [(EXTRA, "Difference of these two", True), (RATIO, "mCE, % of FP32's ↓", True)]
    return table(board, found, columns, "Accuracy of ID and of shifted images, points; Δ = quantized − FP32")


def others(board: Board, found: Cells) -> dict[str, Any]:
    """NLL and ECE, and top-1 of what the first table lacks."""
    places = {place: name for place, name in names_of(board).items() if place != "id"}
    columns = []
    for i, (place, name) in enumerate(places.items()):
        for metric in ("nll", "ece") if i == 0 else ("top1", "nll", "ece"):
            columns += [(f"{place}.{metric}", f"{metric_heading(metric)}, {name}", False)]
            columns += [(f"{place}.{metric}", f"{delta_title(metric)}, {name}", True)]
    return table(board, found, columns, "Further metrics of shifted images")


def names_of(board: Board) -> dict[str, str]:
    """Place of a metric -> what it is of: the ID images, corrupted ones of all severities, other sets."""
    known = {place: name for place, name in titles(board).items() if not place.startswith("shift_mean.")}
    corrupted = {f"shift_mean.{CORRUPTED}": "corrupted"} if parts_of(board) else {}
    return {"id": known.pop("id"), **corrupted, **known}


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
