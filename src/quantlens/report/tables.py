"""The tables: metrics by precision (the paper's Table 1), changes ranked, one row per OOD set and score,
classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from quantlens.metrics import METRICS, names_of
from quantlens.studies.board import Board, Group, Path, dig
from quantlens.studies.significance import SIGN
from quantlens.studies.text import (
    BASELINE,
    MISSING,
    Stat,
    count,
    fixed,
    mean_std,
    metric_digits,
    metric_heading,
    number,
    percent,
    plain,
    score_label,
    span,
)

CLASS_ROWS = 8000
"""Rows of all per-class tables together; with more, every table keeps its worst classes and says so."""

PARTS = {"far": "far sets", "near": "near sets", "all": "all sets"}


@dataclass(frozen=True)
class Column:
    """A column for every precision: its title, the value of a group at a precision as it is shown, and its decimals.
    sign: +1 where larger is better, -1 where smaller is, 0 where the best is not marked. spread: whether the standard
    deviation is shown."""

    title: str
    of: Callable[[Group, str], Stat | None]
    digits: int = 3
    sign: int = 0
    spread: bool = True


def metric_column(board: Board, path: Path, digits: int | None = None, title: str = "") -> Column:
    """A metric of the result by its path, whose last part is its name in METRICS."""
    metric = METRICS[path[-1]]
    rated = metric.family != "size"
    return Column(
        title or metric_heading(metric.name),
        lambda g, b: board.shown(g, b, path),
        metric_digits(metric.name) if digits is None else digits,
        metric.sign if rated else 0,
        rated,
    )


@dataclass(frozen=True)
class Value:
    """A table cell: mean, standard deviation, a tooltip, and whether it is the best of its model's
    methods."""

    text: str
    spread: str = ""
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    model: str
    method: str
    seeds: str
    values: Sequence[Value]


@dataclass(frozen=True)
class Table:
    """Rows of groups; `heads` are (metric title, precisions) spans; `score` where it belongs to one OOD score, which is
    an `alternative` if another one is shown first."""

    caption: str
    heads: list[tuple[str, list[str]]]
    rows: list[Row]
    score: str
    alternative: bool
    has_best: bool
    more: bool


def value_of(stat: Stat | None, column: Column, best: bool = False) -> Value:
    if stat is None:
        return Value(MISSING)
    spread = fixed(stat.std, column.digits) if column.spread and stat.std is not None else ""
    return Value(fixed(stat.mean, column.digits), spread, count(stat.n, "seed") if stat.n > 1 else "", best)


def by_precision(
    board: Board, caption: str, columns: Sequence[Column], score: str = "", more: bool = False
) -> Table | None:
    """A table of groups × (metric, precision); None where the store has none of the metrics."""
    stats = {(g.index, c, b): c.of(g, b) for g in board.groups for c in columns for b in board.precisions}
    if not any(stats.values()):
        return None
    best: set[tuple[int, Column, str]] = set()
    for rivals in ([g.index for g in board.groups if g.model == model] for model in board.models):
        for column in (c for c in columns if c.sign):
            for bits in board.quantized:
                found = [(column.sign * s.mean, i) for i in rivals if (s := stats[i, column, bits]) is not None]
                if len(found) > 1:
                    best.update((i, column, bits) for value, i in found if value == max(found)[0])
    rows = []
    for g in board.groups:
        keys = [(g.index, c, b) for c in columns for b in board.precisions]
        rows.append(
            Row(
                g.model,
                g.method,
                span(len(results) for results in g.cells.values()),
                [value_of(stats[k], k[1], k in best) for k in keys],
            )
        )
    heads = [(c.title, board.precisions) for c in columns]
    return Table(caption, heads, rows, score, score not in ("", board.score), bool(best), more)


TABLE_1 = {
    "Table 1. Accuracy and negative log-likelihood on the ID images": ("top1", "nll"),
    "Expected calibration error on the ID images; size of the packed weights": ("ece", "size_mb"),
    "Top-5 accuracy and Brier score": ("top5", "brier"),
    "Adaptive ECE (bins of equal count); packed size as a share of FP32": ("ece_adaptive", "size_ratio"),
}


def table_1(board: Board) -> list[Table]:
    """The paper's Table 1 (top-1 and NLL by precision), then ECE and packed size, then further metrics
    (`more`)."""
    sizes = [n for r in board.results if (n := number(dig(r, ("id", "n")))) is not None]
    finer = {"top1": 2} if sizes and min(sizes) >= 5000 else {}
    tables = []
    for i, (caption, names) in enumerate(TABLE_1.items()):
        paths = [(name,) if METRICS[name].family == "size" else ("id", name) for name in names]
        columns = [metric_column(board, path, finer.get(path[-1])) for path in paths]
        tables.append(by_precision(board, caption, columns, more=i > 1))
    return [table for table in tables if table is not None]


def table_2(board: Board) -> list[Table]:
    """The metrics of Figure 1: mean AUPR-out of far and near sets by precision, one table per score."""
    tables = []
    for score in board.scores:
        columns = [
            metric_column(board, ("ood_mean", p, score, "aupr_out"), None, f"{metric_heading('aupr_out')}, {PARTS[p]}")
            for p in board.parts()
        ]
        caption = f"Table 2. AUPR-out by {score_label(score)}, means over the OOD sets"
        tables.append(by_precision(board, caption, columns, score))
    return [table for table in tables if table is not None]


@dataclass
class DeltaTable:
    """Rows (model, method, bits, seeds, metrics …), worst top-1 loss first; `by_score` holds the last
    columns per score."""

    columns: list[str]
    parts: list[str]
    rows: list[list[str]]
    by_score: dict[str, list[list[str]]] = field(default_factory=dict)


def delta_table(board: Board) -> DeltaTable:
    """Quantized less FP32, mean ± standard deviation over seeds; top-1, ECE and AUPR-out in points. The largest loss of
    top-1 comes first."""
    parts, names, shown = board.parts(), ("top1", "nll", "ece"), board.score or ""
    columns = [*map(delta_title, names), *(f"{delta_title('aupr_out')}, {PARTS[p]}" for p in parts)]

    def top1(entry: tuple[Group, str]) -> float:
        change = board.change(*entry, ("id", "top1"))
        return float("inf") if change is None else change.mean

    entries = sorted(((g, b) for g, b in product(board.groups, board.quantized) if g.cells.get(b)), key=top1)

    def oods(score: str) -> list[list[str]]:
        paths = [("ood_mean", p, score, "aupr_out") for p in parts]
        return [[delta_text(board, g, b, path) for path in paths] for g, b in entries]

    rows = [
        [g.model, g.method, b, str(len(g.cells[b])), *(delta_text(board, g, b, ("id", name)) for name in names), *last]
        for (g, b), last in zip(entries, oods(shown), strict=True)
    ]
    return DeltaTable(columns, parts, rows, {score: oods(score) for score in board.scores} if parts else {})


def delta_title(name: str) -> str:
    """ "Δ top-1 ↑": a larger delta is better where a larger metric is."""
    return f"Δ {METRICS[name].title} {METRICS[name].arrow}"


def delta_text(board: Board, group: Group, bits: str, path: Path) -> str:
    """A change as it is shown, marked where it is not significant."""
    text = mean_std(board.shown(group, bits, path, change=True), metric_digits(path[-1]), sign=True)
    return text + SIGN if (group.index, bits, ".".join(path)) in board.unsure else text


SET_SHARES = names_of("ood")
SET_CHANCES = names_of("chance")
SET_COLUMNS = [
    "Model",
    "Method",
    "Bits",
    "OOD set",
    "Group",
    "Score",
    "Seeds",
    metric_heading("aupr_out"),
    delta_title("aupr_out"),
    *(metric_heading(name) for name in SET_SHARES[1:]),
    *(metric_heading(name) for name in SET_CHANCES),
    "n ID",
    "n OOD",
]
SET_TEXT_COLUMNS = 6


def set_rows(board: Board) -> list[list[str]]:
    """One row per score, OOD set (and mean of sets), group and precision, in SET_COLUMNS."""
    places: list[tuple[str, str, Path]] = [(name, kind or MISSING, ("ood", name)) for name, kind in board.sets.items()]
    means = {part for result in board.results for part in result.get("ood_mean") or {}}
    places += [(f"mean, {PARTS[p]}", p, ("ood_mean", p)) for p in PARTS if p in means]
    rows = []
    for score, (name, kind, path), group, bits in product(board.scores, places, board.groups, board.precisions):
        row = set_row(board, group, bits, (*path, score))
        if row is not None:
            rows.append([group.model, group.method, bits, name, kind, score_label(score), *row])
    return rows


def set_row(board: Board, group: Group, bits: str, path: Path) -> list[str] | None:
    """The metrics of one row of the per-set table from "Seeds" on; None where the store has none."""
    stats = {key: board.shown(group, bits, (*path, key)) for key in (*SET_SHARES, *SET_CHANCES, "n_id", "n_ood")}
    if not any(stats.values()):
        return None
    means = {key: None if stat is None else stat.mean for key, stat in stats.items()}
    seeds, delta = MISSING, MISSING
    if bits != BASELINE:
        seeds = str(max(stat.n for stat in stats.values() if stat))
        delta = delta_text(board, group, bits, (*path, "aupr_out"))
    first, *shares = (mean_std(stats[key], 1) for key in SET_SHARES)
    chances = [fixed(means[key], 1) for key in SET_CHANCES]
    return [seeds, first, delta, *shares, *chances, fixed(means["n_id"], 0), fixed(means["n_ood"], 0)]


@dataclass(frozen=True)
class ClassTable:
    """One group's classes, worst first: columns after class, name and n are precisions, then the delta at
    the lowest."""

    model: str
    method: str
    precisions: list[str]
    delta_bits: str
    rows: list[list[str]]
    total: int
    median_n: int


def class_tables(board: Board) -> list[ClassTable]:
    """Top-1 per class (mean over seeds) at every precision."""
    tables = []
    for group in board.groups:
        found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        for bits in board.precisions:
            for result in group.results(bits):
                for entry in dig(result, ("id", "per_class")) or ():
                    found.setdefault(plain(entry.get("class")), {}).setdefault(bits, []).append(entry)
        precisions = [b for b in board.precisions if any(b in entries for entries in found.values())]
        if precisions:
            rows = [_class_row(name, entries, precisions) for name, entries in found.items()]
            rows.sort(key=lambda row: row[0])
            keep = max(20, CLASS_ROWS // len(board.groups))
            sizes = sorted(n for _, n, _ in rows)
            texts = [text for _, _, text in rows[:keep]]
            middle = int(sizes[len(sizes) // 2])
            tables.append(ClassTable(group.model, group.method, precisions, precisions[-1], texts, len(rows), middle))
    return tables


def _class_row(
    key: str, entries: Mapping[str, list[Mapping[str, Any]]], precisions: list[str]
) -> tuple[tuple[float, ...], float, list[str]]:
    """(what it is sorted by, number of images, texts) of a class. entries: of every seed at each precision."""
    stats = [Stat.of(e.get("top1") for e in entries.get(b, ())) for b in precisions]
    values = [None if stat is None else stat.mean for stat in stats]
    first, last, delta = values[0], values[-1], None
    if first is not None and last is not None and precisions[0] == BASELINE != precisions[-1]:
        delta = last - first
    named = next(entries[b][0] for b in reversed(precisions) if b in entries)
    n = number(named.get("n"))
    order = (2.0 if last is None else last, delta or 0.0, -(n or 0))
    texts = [key, str(named.get("name") or ""), fixed(n, 0), *map(percent, values), percent(delta, sign=True)]
    return order, n or 0.0, texts
