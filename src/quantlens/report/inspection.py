"""Which layer hurts, on a page of its own and in a study's report: every site alone in a chart, and the ranked tables.
Columns are those of the terminal's tables too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlens.files import write_whole
from quantlens.metrics import METRICS
from quantlens.studies.board import Board
from quantlens.studies.text import MISSING, count, fixed, percent

RANKED = {"sqnr": "by the noise of the logits", "kl": "by the KL divergence"}

Row = tuple[str, ...]


def _largest(part: Any, metric: str, weights: bool | None = None) -> float | None:
    """The largest of a metric over the edges of a part: all of them, its weights, or its activations."""
    values = [getattr(e, metric) for e in part.edges if weights is None or e.is_weight is weights]
    return max((v for v in values if v is not None), default=None)


def _short(value: float | None) -> str:
    """Three digits, without an exponent below a hundred thousand."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.3g}"


EFFECT: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("bits", lambda p: p.bits),
    (METRICS["sqnr_db"].heading, lambda p: fixed(p.effect.sqnr_db, 1)),
    (METRICS["kl"].heading, lambda p: f"{p.effect.kl:.2g}"),
    (METRICS["changed"].heading, lambda p: percent(p.effect.changed)),
)
STATISTICS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("ratio A", lambda p: _short(_largest(p, "range_ratio", False))),
    ("ratio W", lambda p: _short(_largest(p, "range_ratio", True))),
    ("kurtosis A", lambda p: _short(_largest(p, "kurtosis", False))),
    ("kurtosis W", lambda p: _short(_largest(p, "kurtosis", True))),
    ("token norm", lambda p: _short(_largest(p, "token_norm"))),
)


def columns(by: str) -> list[str]:
    """Titles of a table's columns; the first and, but for blocks, the last hold text."""
    if by == "block":
        return [by, *(name for name, _ in EFFECT)]
    return [by, *(name for name, _ in (*EFFECT, *STATISTICS)), "stands out"]


def table_rows(parts: Iterable[Any], by: str) -> list[Row]:
    """The cells of each part, in the order of :func:`columns`."""
    if by == "block":
        return [(p.name, *(of(p) for _, of in EFFECT)) for p in parts]
    return [(p.name, *(of(p) for _, of in (*EFFECT, *STATISTICS)), p.remark()) for p in parts]


def explanation(found: Any) -> str:
    """What the columns are, in one paragraph of plain text."""
    return (
        f"One part alone is quantized by {found.method}, the rest of the model is float; "
        f"{count(int(found.images.get('n', 0)), 'image')}. SQNR: signal over quantization noise of the logits. KL: "
        "nats per image. Ratio: range of the widest channel over that of the median one, of activations (A) and weight "
        "(W); it, the kurtosis (normal: 3) and the token norm are the largest of what the part quantizes."
    )


@dataclass(frozen=True)
class Ranked:
    """A ranked table: its name, (title, whether it holds text) of the columns, and the cells."""

    name: str
    columns: list[tuple[str, bool]]
    rows: list[Row]


def ranked(found: Any, by: str, rank: str) -> Ranked:
    """The parts of one kind, those that hurt most first."""
    titles = columns(by)
    text = {0} if by == "block" else {0, len(titles) - 1}
    heads = [(title.capitalize() if i in text else title, i in text) for i, title in enumerate(titles)]
    return Ranked(f"{by.capitalize()}s, ranked {RANKED[rank]}", heads, table_rows(found.ranked(by, rank), by))


@dataclass(frozen=True)
class Layers:
    """One model of a study: which layer hurts, in a sentence, a chart and the ranked tables."""

    model: str
    sentence: str
    explanation: str
    panel: Any
    tables: dict[str, Ranked]


def layers(board: Board) -> list[Layers]:
    """What the report shows of each model that the study inspected; empty where there is none.

    Raises QuantlensError for an inspection of a newer quantlens.
    """
    from quantlens.plots.points import effects, inspected

    return [
        Layers(
            found.model,
            verdict(found),
            explanation(found),
            effects(found),
            {by: ranked(found, by, "sqnr") for by in ("site", "block") if found.parts.get(by)},
        )
        for found in inspected(board)
    ]


def verdict(found: Any) -> str:
    """The part that hurts most and by how much, in one sentence."""
    by = "site" if found.sites else "block"
    ranked = [part for part in found.ranked(by) if part.effect.sqnr_db is not None]
    if not ranked:
        return f"At {found.bits} no {by} alone changes the logits."
    first = ranked[0]
    said = f"At {found.bits} {first.name} alone hurts most: {fixed(first.effect.sqnr_db, 1)} dB"
    if len(ranked) > 1:
        said += f", {fixed(ranked[1].effect.sqnr_db - first.effect.sqnr_db, 1)} dB below the next, {ranked[1].name}"
    return f"{said} ({first.remark()})." if first.remark() else f"{said}."


def inspection_page(found: Any, rank: str = "sqnr") -> str:
    """One self-contained HTML page of a :class:`quantlens.sensitivity.Inspection`."""
    from quantlens.plots.points import effects
    from quantlens.report.page import render

    return render(
        "inspection.html.j2",
        title=f"{found.model} {found.bits}: which layer hurts",
        kicker="inspection",
        lead=explanation(found),
        panel=effects(found),
        tables=[ranked(found, by, rank) for by in found.parts],
    )


def write_inspection(found: Any, path: str | Path, rank: str = "sqnr") -> Path:
    """Write :func:`inspection_page`; an existing file is replaced at once or not at all. Raises StorageError."""
    target = Path(path)
    write_whole(target, inspection_page(found, rank), what="the page")
    return target
