"""The tables: metrics by precision (the paper's Table 1), changes ranked, one row per OOD set and score,
classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantlens.metrics import METRICS, names_of
from quantlens.report.marks import signed
from quantlens.studies.board import Board, Group, Path, dig
from quantlens.studies.text import (
    BASELINE,
    MISSING,
    Stat,
    count,
    fixed,
    mean_std,
    metric_heading,
    number,
    percent,
    plain,
    score_label,
)

CLASS_ROWS = 8000
"""Rows of all per-class tables together; with more, every table keeps its worst classes and says so."""


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


def metric_column(board: Board, path: Path, digits: int = 3, title: str = "") -> Column:
    """A metric of the result by its path, whose last part is its name in METRICS."""
    metric = METRICS[path[-1]]
    rated = metric.family != "size"
    title = title or metric_heading(metric.name)
    return Column(title, lambda g, b: board.shown(g, b, path), digits, metric.sign if rated else 0, rated)


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


@dataclass
class Table:
    """Rows of groups; `heads` are (metric title, precisions) spans; `score` where it belongs to one OOD
    score."""

    caption: str
    heads: list[tuple[str, list[str]]]
    rows: list[Row]
    score: str = ""
    alternative: bool = False
    has_best: bool = False
    more: bool = False


def value_of(stat: Stat | None, column: Column, best: bool = False) -> Value:
    if stat is None:
        return Value(MISSING)
    spread = fixed(stat.std, column.digits) if column.spread and stat.std is not None else ""
    return Value(fixed(stat.mean, column.digits), spread, count(stat.n, "seed") if stat.n > 1 else "", best)


def seeds_text(group: Group) -> str:
    """How many seeds the group's precisions have: "3", or "1 to 3" where they differ."""
    counts = sorted({len(results) for results in group.cells.values()})
    if not counts:
        return MISSING
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def by_precision(board: Board, caption: str, columns: Sequence[Column], score: str = "") -> Table | None:
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
        rows.append(Row(g.model, g.method, seeds_text(g), [value_of(stats[k], k[1], k in best) for k in keys]))
    return Table(
        caption,
        [(c.title, board.precisions) for c in columns],
        rows,
        score,
        score != (board.score or ""),
        bool(best),
    )


def accuracy_columns(board: Board) -> list[Column]:
    sizes = [n for r in board.results if (n := number(dig(r, ("id", "n")))) is not None]
    digits = 2 if sizes and min(sizes) >= 5000 else 1
    return [metric_column(board, ("id", "top1"), digits), metric_column(board, ("id", "nll"))]


def table_1(board: Board) -> list[Table]:
    """The paper's Table 1 (top-1 and NLL by precision), then ECE and packed size, then further metrics
    (`more`)."""
    wanted = [
        ("Table 1. Accuracy and negative log-likelihood on the ID images", accuracy_columns(board)),
        (
            "Expected calibration error on the ID images; size of the packed weights",
            [metric_column(board, ("id", "ece"), 1), metric_column(board, ("size_mb",), 2)],
        ),
        (
            "Top-5 accuracy and Brier score",
            [metric_column(board, ("id", "top5"), 1), metric_column(board, ("id", "brier"))],
        ),
        (
            "Adaptive ECE (bins of equal count); packed size as a share of FP32",
            [metric_column(board, ("id", "ece_adaptive"), 1), metric_column(board, ("size_ratio",), 1)],
        ),
    ]
    tables = []
    for i, (caption, columns) in enumerate(wanted):
        table = by_precision(board, caption, columns)
        if table is not None:
            table.alternative, table.more = False, i > 1
            tables.append(table)
    return tables


PARTS = {"far": "far sets", "near": "near sets", "all": "all sets"}


def table_2(board: Board) -> list[Table]:
    """The metrics of Figure 1: mean AUPR-out of far and near sets by precision, one table per score."""
    tables = []
    for score in board.scores:
        columns = [
            metric_column(board, ("ood_mean", p, score, "aupr_out"), 1, f"{metric_heading('aupr_out')}, {PARTS[p]}")
            for p in board.parts()
        ]
        table = by_precision(
            board, f"Table 2. AUPR-out by {score_label(score)}, means over the OOD sets", columns, score
        )
        if columns and table is not None:
            tables.append(table)
    return tables


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
    parts = board.parts()
    names = ("top1", "nll", "ece")
    columns = [*map(delta_title, names), *(f"{delta_title('aupr_out')}, {PARTS[p]}" for p in parts)]
    entries = []
    for group in board.groups:
        for bits in (b for b in board.quantized if group.cells.get(b)):
            top1 = board.change(group, bits, ("id", "top1"))
            head = [group.model, group.method, bits, str(len(group.cells[bits]))]
            head += [delta_text(board, group, bits, ("id", name)) for name in names]
            oods = {
                s: [delta_text(board, group, bits, ("ood_mean", p, s, "aupr_out")) for p in parts] for s in board.scores
            }
            entries.append((top1.mean if top1 else float("inf"), head, oods))
    entries.sort(key=lambda entry: entry[0])
    shown = board.score or ""
    table = DeltaTable(columns, parts, [head + oods.get(shown, [MISSING] * len(parts)) for _, head, oods in entries])
    if parts:
        table.by_score = {s: [oods[s] for _, _, oods in entries] for s in board.scores}
    return table


def delta_title(name: str) -> str:
    """ "Δ top-1 ↑": a larger delta is better where a larger metric is."""
    return f"Δ {METRICS[name].title} {METRICS[name].arrow}"


def delta_text(board: Board, group: Group, bits: str, path: Path) -> str:
    """A change as it is shown, marked where it is not significant."""
    digits = 1 if METRICS[path[-1]].percent else 3
    return signed(board, group, bits, path, mean_std(board.shown(group, bits, path, change=True), digits, sign=True))


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
MEAN_SETS = {"far": "mean, far sets", "near": "mean, near sets", "all": "mean, all sets"}


def set_rows(board: Board) -> list[list[str]]:
    """One row per score, OOD set (and mean of sets), group and precision, in SET_COLUMNS."""
    means = {p for r in board.results for p in (r.get("ood_mean") or {}) if p in MEAN_SETS}
    places: list[tuple[str, str, Path]] = [(name, kind or MISSING, ("ood", name)) for name, kind in board.sets.items()]
    places += [(MEAN_SETS[p], p, ("ood_mean", p)) for p in MEAN_SETS if p in means]
    rows = []
    for score in board.scores:
        for name, kind, prefix in places:
            for group in board.groups:
                for bits in board.precisions:
                    row = set_row(board, group, bits, (*prefix, score))
                    if row is not None:
                        rows.append([group.model, group.method, bits, name, kind, score_label(score), *row])
    return rows


def set_row(board: Board, group: Group, bits: str, path: Path) -> list[str] | None:
    """The metrics of one row of the per-set table from "Seeds" on; None where the store has none."""
    stats = {key: board.stat(group, bits, (*path, key)) for key in (*SET_SHARES, *SET_CHANCES, "n_id", "n_ood")}
    if not any(stats.values()):
        return None
    shares = [mean_std(stats[k], 1, factor=100) for k in SET_SHARES]
    delta = MISSING if bits == BASELINE else delta_text(board, group, bits, (*path, "aupr_out"))
    chances = [percent(s.mean if (s := stats[k]) else None) for k in SET_CHANCES]
    counts = [fixed(s.mean if (s := stats[k]) else None, 0) for k in ("n_id", "n_ood")]
    seeds = MISSING if bits == BASELINE else str(max(s.n for s in stats.values() if s))
    return [seeds, shares[0], delta, *shares[1:], *chances, *counts]


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
    having = [g for g in board.groups if any(class_metrics(g, b) for b in board.precisions)]
    keep = max(20, CLASS_ROWS // max(len(having), 1))
    for group in having:
        found = {b: class_metrics(group, b) for b in board.precisions}
        precisions = [b for b in board.precisions if found[b]]
        last = precisions[-1]
        names = {c: entry for b in precisions for c, entry in found[b].items()}
        rows = []
        for key, (label, n, _) in names.items():
            values = [found[b][key][2] if key in found[b] else None for b in precisions]
            delta = None
            if precisions[0] == BASELINE and last != BASELINE and values[0] is not None and values[-1] is not None:
                delta = values[-1] - values[0]
            order = (values[-1] if values[-1] is not None else 2.0, delta or 0.0, -(n or 0))
            text = [key, label, fixed(n, 0), *map(percent, values), percent(delta, sign=True)]
            rows.append((order, text))
        rows.sort(key=lambda row: row[0])
        sizes = sorted(n for _, n, _ in names.values() if n is not None)
        tables.append(
            ClassTable(
                group.model,
                group.method,
                precisions,
                last,
                [text for _, text in rows[:keep]],
                len(rows),
                int(sizes[len(sizes) // 2]) if sizes else 0,
            )
        )
    return tables


def class_metrics(group: Group, bits: str) -> dict[str, tuple[str, float | None, float | None]]:
    """class → (name, images, mean top-1 over seeds)."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in group.results(bits):
        for entry in dig(result, ("id", "per_class")) or ():
            found.setdefault(plain(entry.get("class")), []).append(entry)
    metrics = {}
    for key, entries in found.items():
        top1 = Stat.of(e.get("top1") for e in entries)
        metrics[key] = str(entries[0].get("name") or ""), number(entries[0].get("n")), top1.mean if top1 else None
    return metrics
