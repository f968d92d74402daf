"""Which layer hurts, on a page of its own and in a study's report: every site alone in a chart, and the ranked tables.
Columns are those of the terminal's tables too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quantlens.errors import QuantlensError
from quantlens.files import write_whole
from quantlens.metrics import METRICS
from quantlens.plots import svg
from quantlens.plots.svg import Frame, Style, esc
from quantlens.report.collect import Board
from quantlens.report.frontier import legend_of
from quantlens.report.page import page
from quantlens.report.text import MISSING, count, fixed, percent

KINDS = {"linear and convolution layers": ("linear", "conv"), "attention products": ("scores", "probs", "context")}
OTHER = "other sites"
RANKED = {"sqnr": "by the noise of the logits", "kl": "by the KL divergence"}

Row = tuple[str, ...]


def _largest(part: Any, figure: str, weights: bool | None = None) -> float | None:
    """The largest of a figure over the edges of a part: all of them, its weights, or its activations."""
    values = [getattr(e, figure) for e in part.edges if weights is None or e.is_weight is weights]
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


def effect_chart(parts: Sequence[Any], title: str) -> str:
    """SQNR of every part in execution order, a mark each, as svg; empty where none has any noise."""
    shown = [(i, p) for i, p in enumerate(parts) if p.effect.sqnr_db is not None]
    if not shown:
        return ""
    values = [p.effect.sqnr_db for _, p in shown]
    ticks = svg.nice_ticks(min(values), max(values), 6)
    frame = Frame((-1.0, float(len(parts))), (ticks[0], ticks[-1]), width=720, height=300, top=26)
    frame.grid_y(ticks)
    frame.axis_x(svg.fitting_labels(frame, _block_starts(parts)))
    frame.labels("execution order, by block", "SQNR of the logits, dB: low marks hurt")
    groups: dict[int, list[str]] = {}
    for i, part in shown:
        style = _kind(part)
        tip = f"{part.name}, {part.bits}: {fixed(part.effect.sqnr_db, 1)} dB"
        mark = svg.marker(style, frame.x(float(i)), frame.y(part.effect.sqnr_db), tip)
        groups.setdefault(style, []).append(mark)
    frame.body += [f'<g class="s c{style} d0">{"".join(marks)}</g>' for style, marks in sorted(groups.items())]
    worst = min((p for _, p in shown), key=lambda p: p.effect.sqnr_db)
    words = f"{title}: {len(shown)} marks, the lowest is {worst.name} at {fixed(worst.effect.sqnr_db, 1)} dB."
    return frame.svg(title, words, "effects")


def _kind(part: Any) -> int:
    return next((i for i, kinds in enumerate(KINDS.values()) if part.kind in kinds), len(KINDS))


def _block_starts(parts: Sequence[Any]) -> list[tuple[float, str]]:
    """Where each block's first part stands, with the block's number in the model."""
    first: dict[str, int] = {}
    for i, part in enumerate(parts):
        if part.block is not None:
            first.setdefault(part.block, i)
    return [(float(i), str(number)) for number, i in enumerate(first.values())]


def _table(found: Any, by: str, rank: str, head: str = "h2") -> str:
    """A ranked table under its heading; inside a report (``head`` is not "h2") its columns sort."""
    titles = columns(by)
    text = {0} if by == "block" else {0, len(titles) - 1}
    sorts = head != "h2"

    def attributes(i: int) -> str:
        kind = "text" if i in text else "num"
        return (" class=text" if i in text else "") + (f" data-sort={kind}" if sorts else "")

    heads = "".join(
        f'<th scope="col"{attributes(i)}>{esc(t.capitalize() if i in text else t)}</th>' for i, t in enumerate(titles)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td{' class=text' if i in text else ''}>{esc(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in table_rows(found.ranked(by, rank), by)
    )
    name = f"{by.capitalize()}s, ranked {RANKED[rank]}"
    return (
        f"<{head}>{esc(name)}</{head}>\n"
        f'<div class="scroll tall" tabindex="0" role="region" aria-label="{esc(name)}">\n'
        f"<table{' class=sortable' if sorts else ''}>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _chart(found: Any) -> str:
    """The chart of all sites under its legend; empty without sites."""
    if not found.sites:
        return ""
    styles = [(name, Style(i, 0, i)) for i, name in enumerate([*KINDS, OTHER])]
    used = {_kind(p) for p in found.sites}
    legend = legend_of([entry for i, entry in enumerate(styles) if i in used])
    chart = effect_chart(found.sites, f"Every site of {found.model} alone at {found.bits}")
    return f'<ul class="legend still">{legend}</ul>\n<figure>{chart}</figure>'


@dataclass(frozen=True)
class Layers:
    """One model of a study: which layer hurts, in a sentence, a chart and the ranked tables."""

    model: str
    bits: str
    sentence: str
    explanation: str
    chart: Markup
    sites: Markup
    blocks: Markup


def layers(board: Board) -> list[Layers]:
    """What the report shows of each model that the study inspected; empty where there is none.

    Raises QuantlensError for an inspection of a newer quantlens.
    """
    from quantlens.sensitivity import Inspection

    shown = []
    for cell in board.inspections:
        data = cell.result.get("inspection")
        if not isinstance(data, dict):
            raise QuantlensError(f"the inspection {cell.key[:24]} of the store holds no figures; run the study again")
        found = Inspection.from_dict(data)
        tables = {by: Markup(_table(found, by, "sqnr", "h4")) for by in ("site", "block") if found.parts.get(by)}
        chart = Markup(_chart(found))
        empty = Markup()
        shown.append(
            Layers(
                found.model,
                found.bits,
                verdict(found),
                explanation(found),
                chart,
                tables.get("site", empty),
                tables.get("block", empty),
            )
        )
    return shown


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
    body = [_chart(found)] if found.sites else []
    body += [_table(found, by, rank) for by in found.parts]
    return page(f"{found.model} {found.bits}: which layer hurts", "inspection", explanation(found), "\n".join(body))


def write_inspection(found: Any, path: str | Path, rank: str = "sqnr") -> Path:
    """Write :func:`inspection_page`; an existing file is replaced at once or not at all. Raises StorageError."""
    target = Path(path)
    write_whole(target, inspection_page(found, rank), what="the page")
    return target
