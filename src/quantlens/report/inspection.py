"""Which layer hurts, on a page of its own and in a study's report: every site alone in a chart, and the ranked tables.
Columns are those of the terminal's tables too."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from quantlens.metrics import METRICS
from quantlens.plots.points import effects, inspected
from quantlens.report.page import write_page
from quantlens.studies.board import Board
from quantlens.studies.text import MISSING, count, fixed, percent

RANKED = {"sqnr": "by the noise of the logits", "kl": "by the KL divergence", "iou": "by the IoU of the boxes"}

Row = tuple[str, ...]


def _largest(part: Any, metric: str, weights: bool | None = None) -> str:
    """The largest of a metric over the edges of a part (all of them, its weights, or its activations), in three digits
    without an exponent below a hundred thousand."""
    values = [getattr(e, metric) for e in part.edges if weights is None or e.is_weight is weights]
    value = max((v for v in values if v is not None), default=None)
    if value is None:
        return MISSING
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.3g}"


EFFECT: dict[str, Callable[[Any], str]] = {
    "bits": lambda p: p.bits,
    METRICS["sqnr_db"].heading: lambda p: fixed(p.effect.sqnr_db, 1),
    METRICS["kl"].heading: lambda p: MISSING if p.effect.kl is None else f"{p.effect.kl:.2g}",
    METRICS["changed"].heading: lambda p: percent(p.effect.changed),
}
OF_BOXES = {METRICS["matched_iou"].heading: lambda p: fixed(p.effect.matched_iou, 4)}
OF_EDGES: dict[str, Callable[[Any], str]] = {
    "ratio A": lambda p: _largest(p, "range_ratio", False),
    "ratio W": lambda p: _largest(p, "range_ratio", True),
    "kurtosis A": lambda p: _largest(p, "kurtosis", False),
    "kurtosis W": lambda p: _largest(p, "kurtosis", True),
    "token norm": lambda p: _largest(p, "token_norm"),
    "stands out": lambda p: p.remark(),
}


def columns(by: str, parts: Iterable[Any]) -> dict[str, Callable[[Any], str]]:
    """Titles of a table's columns, and what gives their cells; the first and, but for blocks, the last hold text."""
    boxes = OF_BOXES if any(part.effect.matched_iou is not None for part in parts) else {}
    return {by: lambda p: p.name, **EFFECT, **boxes, **({} if by == "block" else OF_EDGES)}


def table_rows(parts: Sequence[Any], by: str) -> list[Row]:
    """The cells of each part, in the order of :func:`columns`."""
    cells = columns(by, parts).values()
    return [tuple(cell(part) for cell in cells) for part in parts]


def explanation(found: Any) -> str:
    """What the columns are, in one paragraph of plain text."""
    return (
        f"One part alone is quantized by {found.method}, the rest of the model is float; "
        f"{count(int(found.images.get('n', 0)), 'image')}. SQNR: signal over quantization noise of the logits. KL: "
        "nats per image. Ratio: range of the widest channel over that of the median one, of activations (A) and weight "
        "(W); it, the kurtosis (normal: 3) and the token norm are the largest of what the part quantizes."
    )


def ranked(found: Any, by: str, rank: str | None) -> dict[str, Any]:
    """The parts of one kind, those that hurt most first: the table's name, (title, whether it holds text) of its
    columns, and the cells."""
    text = (by, "stands out")
    parts = found.ranked(by, rank)
    heads = [(title.capitalize() if title in text else title, title in text) for title in columns(by, parts)]
    name = f"{by.capitalize()}s, ranked {order(found, rank)}"
    return {"name": name, "columns": heads, "rows": table_rows(parts, by)}


def order(found: Any, rank: str | None) -> str:
    """What parts are ranked by, in words; without a rank the default of the model."""
    return RANKED[rank or ("iou" if found.detects else "sqnr")]


def layers(board: Board) -> list[dict[str, Any]]:
    """What the report shows of each model that the study inspected: which layer hurts, in a sentence, a chart and the
    ranked tables; empty where there is none.

    Raises QuantlensError for an inspection of a newer quantlens.
    """
    return [
        {
            "model": found.model,
            "sentence": verdict(found),
            "explanation": explanation(found),
            "panel": effects(found),
            "tables": {by: ranked(found, by, None) for by in ("site", "block") if found.parts.get(by)},
        }
        for found in inspected(board)
    ]


def verdict(found: Any) -> str:
    """The part that hurts most and by how much, in one sentence."""
    by = "site" if found.sites else "block"
    ranked = [part for part in found.ranked(by) if part.effect.sqnr_db is not None]
    if not ranked:
        return f"At {found.bits} no {by} alone changes the logits."
    first = ranked[0]
    if found.detects:
        iou = fixed(first.effect.matched_iou, 3)
        return f"At {found.bits} {first.name} alone hurts most: IoU {iou} with FP32's boxes."
    said = f"At {found.bits} {first.name} alone hurts most: {fixed(first.effect.sqnr_db, 1)} dB"
    if len(ranked) > 1:
        said += f", {fixed(ranked[1].effect.sqnr_db - first.effect.sqnr_db, 1)} dB below the next, {ranked[1].name}"
    return f"{said} ({first.remark()})." if first.remark() else f"{said}."


def write_inspection(found: Any, path: str | Path, rank: str | None = None) -> Path:
    """Write one self-contained HTML page of a :class:`quantlens.sensitivity.Inspection`; an existing file is replaced
    at once or not at all. Raises StorageError."""
    return write_page(
        path,
        "inspection.html.j2",
        title=f"{found.model} {found.bits}: which layer hurts",
        kicker="inspection",
        lead=explanation(found),
        panel=effects(found),
        tables=[ranked(found, by, rank) for by in found.parts],
    )
