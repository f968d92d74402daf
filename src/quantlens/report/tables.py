"""The tables: metrics by precision (the paper's Table 1), changes ranked, one row per OOD set and score,
classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from quantlens.evaluation.operating import ClassLoss
from quantlens.metrics import METRICS, names_of
from quantlens.studies.board import Board, Group, Path, dig
from quantlens.studies.significance import SIGN
from quantlens.studies.text import (
    BASELINE,
    MISSING,
    Stat,
    count,
    fixed,
    join_words,
    mean_std,
    metric_digits,
    metric_heading,
    metric_title,
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


def cell_of(stat: Stat | None, column: Column, best: bool) -> dict[str, Any]:
    """A table cell: mean, standard deviation, a tooltip, and whether it is the best of its model's methods."""
    shown = column.spread and stat is not None and stat.std is not None
    return {
        "text": fixed(mean_of(stat), column.digits),
        "spread": fixed(stat.std, column.digits) if stat is not None and shown else "",
        "note": count(stat.n, "seed") if stat is not None and stat.n > 1 else "",
        "best": best,
    }


def by_precision(
    board: Board, caption: str, columns: Sequence[Column], score: str = "", more: bool = False
) -> dict[str, Any] | None:
    """A table of groups × (metric, precision); None where the store has none of the metrics.

    heads: spans of columns, (metric title, precisions). rows: group, number of seeds and cells (:func:`cell_of`).
    score: the one that the table belongs to, an alternative if another one is shown first. more: whether it is folded.
    """
    stats = {(g.index, c, b): c.of(g, b) for g in board.groups for c in columns for b in board.precisions}
    if not any(stats.values()):
        return None
    best: set[tuple[int, Column, str]] = set()
    for model, column, bits in product(board.models, columns, board.quantized):
        keys = [(g.index, column, bits) for g in board.groups if g.model == model]
        found = {key: column.sign * stat.mean for key in keys if (stat := stats[key]) is not None}
        if column.sign and len(found) > 1:
            best.update(key for key, value in found.items() if value == max(found.values()))
    return {
        "caption": caption,
        "heads": [(column.title, board.precisions) for column in columns],
        "rows": [
            {
                "group": group,
                "seeds": span(len(results) for results in group.cells.values()),
                "cells": [cell_of(stat, key[1], key in best) for key, stat in stats.items() if key[0] == group.index],
            }
            for group in board.groups
        ],
        "score": score,
        "alternative": score not in ("", board.score),
        "has_best": bool(best),
        "more": more,
    }


TABLE_1 = {
    "Table 1. Accuracy of k-NN and a linear probe on the features of the ID images": ("knn1", "linear1"),
    "Table 1. Average precision and AUROC on the ID images": ("average_precision", "map", "auroc"),
    "Accuracy and F1 at a probability of one half": ("accuracy", "f1"),
    "Likeness of the features to those of the FP32 model": ("cosine", "cka"),
    "Table 1. Accuracy and negative log-likelihood on the ID images": ("top1", "nll"),
    "Expected calibration error on the ID images; size of the packed weights": ("ece", "size_mb"),
    "Top-5 accuracy and Brier score": ("top5", "brier"),
    "Adaptive ECE (bins of equal count); packed size as a share of FP32": ("ece_adaptive", "size_ratio"),
    "ECE after temperature scaling; the temperature, fitted on other ID images": ("ece_temperature", "temperature"),
}


TABLE_1_OF_DETECTORS = {
    "Table 1. Mean average precision on the ID images (COCO: over IoU 0.50 to 0.95, at 0.50)": ("map", "map50"),
    "What quantization does to the FP32 model's boxes: those that match, those that are gone": ("matched_iou", "lost"),
    "Boxes that the FP32 model has not; change of the score of those that match": ("invented", "score_drift"),
    "Detection calibration error; size of the packed weights": ("d_ece", "size_mb"),
    "mAP of small, medium and large objects": ("map_small", "map_medium", "map_large"),
    "Recall of 100 detections; object-level calibration error": ("mar_100", "oce"),
}


def id_sizes(board: Board) -> list[int]:
    """How many ID images each result is of."""
    return [int(n) for result in board.results if (n := number(dig(result, ("id", "n")))) is not None]


def table_1(board: Board) -> list[dict[str, Any]]:
    """The paper's Table 1 (top-1 and NLL by precision), then ECE and packed size, then further metrics
    (`more`); of other tasks than one label of several, their metrics."""
    finer = {"top1": 2} if min(id_sizes(board), default=0) >= 5000 else {}
    tables = []
    captions, more = (TABLE_1_OF_DETECTORS, 2) if board.task == "detect" else (TABLE_1, 3)
    for i, (caption, names) in enumerate(captions.items()):
        paths = [(name,) if METRICS[name].family == "size" else ("id", name) for name in names]
        columns = [metric_column(board, path, finer.get(path[-1])) for path in paths]
        there = [any(c.of(g, b) for g in board.groups for b in board.precisions) for c in columns]
        if captions is TABLE_1 and i >= len(captions) - 5 and not all(there):  # of another task than classification
            caption = join_words([metric_title(n) for n, has in zip(names, there, strict=True) if has])
        columns = [column for column, has in zip(columns, there, strict=True) if has]
        tables.append(by_precision(board, caption, columns, more=i >= len(captions) - more))
    return [table for table in tables if table is not None]


def table_2(board: Board) -> list[dict[str, Any]]:
    """The metrics of Figure 1: mean AUPR-out of far and near sets by precision, one table per score."""
    titles = {part: f"{metric_heading('aupr_out')}, {PARTS[part]}" for part in board.parts()}
    tables = []
    for score in board.scores:
        columns = [metric_column(board, ("ood_mean", p, score, "aupr_out"), None, title) for p, title in titles.items()]
        caption = f"Table 2. AUPR-out by {score_label(score)}, means over the OOD sets"
        tables.append(by_precision(board, caption, columns, score))
    return [table for table in tables if table is not None]


def delta_table(board: Board) -> dict[str, Any]:
    """Quantized less FP32, mean ± standard deviation over seeds; percentages in points. The largest loss of top-1 (or
    of what another task is judged by) comes first. rows: model, method, bits, seeds, metrics …; by_score: the last
    columns per score."""
    parts, names, shown = board.parts(), board.summary, board.score or ""

    def loss(entry: tuple[Group, str]) -> float:
        change = board.shown(*entry, ("id", names[0]), change=True)
        return float("inf") if change is None else change.mean

    entries = sorted(((g, b) for g, b in product(board.groups, board.quantized) if g.cells.get(b)), key=loss)

    def oods(score: str) -> list[list[str]]:
        paths = [("ood_mean", p, score, "aupr_out") for p in parts]
        return [[delta_text(board, g, b, path) for path in paths] for g, b in entries]

    return {
        "columns": [*map(delta_title, names), *(f"{delta_title('aupr_out')}, {PARTS[p]}" for p in parts)],
        "parts": parts,
        "rows": [
            [g.model, g.method, b, str(len(g.cells[b])), *(delta_text(board, g, b, ("id", n)) for n in names), *last]
            for (g, b), last in zip(entries, oods(shown), strict=True)
        ],
        "by_score": {score: oods(score) for score in board.scores} if parts else {},
    }


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
    digits = {**dict.fromkeys(SET_CHANCES, 1), "n_id": 0, "n_ood": 0}
    rows = []
    for score, (name, kind, path), group, bits in product(board.scores, places, board.groups, board.precisions):
        stats = {key: board.shown(group, bits, (*path, score, key)) for key in (*SET_SHARES, *digits)}
        if not any(stats.values()):
            continue
        seeds, delta = MISSING, MISSING
        if bits != BASELINE:
            seeds = str(max(stat.n for stat in stats.values() if stat))
            delta = delta_text(board, group, bits, (*path, score, "aupr_out"))
        first, *shares = (mean_std(stats[key], 1) for key in SET_SHARES)
        counted = (fixed(mean_of(stats[key]), n) for key, n in digits.items())
        texts = [group.model, group.method, bits, name, kind, score_label(score), seeds, first, delta]
        rows.append([*texts, *shares, *counted])
    return rows


def class_tables(board: Board, losses: Mapping[Any, Mapping[int, ClassLoss]] | None = None) -> list[dict[str, Any]]:
    """Top-1 (of detectors AP) per class (mean over seeds) at every precision, a table per group, worst first: columns
    after class, name and n are precisions, then the delta at the lowest, and its interval where `losses` (by number of
    the group and precision, then by class) has the group."""
    tables = []
    for group in board.groups:
        found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        for bits in board.precisions:
            for result in group.results(bits):
                for entry in dig(result, ("id", "per_class")) or ():
                    found.setdefault(plain(entry.get("class")), {}).setdefault(bits, []).append(entry)
        precisions = [b for b in board.precisions if any(b in entries for entries in found.values())]
        if precisions:
            rows = sorted((_class_row(*item, precisions) for item in found.items()), key=lambda row: row[0])
            intervals = (losses or {}).get((group.index, precisions[-1]))
            if intervals is not None:
                for _, _, texts in rows:
                    texts.append(interval_text(intervals.get(int(texts[0])) if texts[0].isdigit() else None))
            sizes = sorted(n for _, n, _ in rows)
            keep = max(20, CLASS_ROWS // len(board.groups))
            tables.append(
                {
                    "group": group,
                    "precisions": precisions,
                    "intervals": intervals is not None,
                    "rows": [texts for _, _, texts in rows[:keep]],
                    "total": len(rows),
                    "median_n": int(sizes[len(sizes) // 2]),
                }
            )
    return tables


def _class_row(
    key: str, entries: Mapping[str, list[Mapping[str, Any]]], precisions: list[str]
) -> tuple[tuple[float, ...], float, list[str]]:
    """(what it is sorted by, number of images, texts) of a class. entries: of every seed at each precision."""
    values = [mean_of(Stat.of(e.get("top1", e.get("ap")) for e in entries.get(b, ()))) for b in precisions]
    first, last, delta = values[0], values[-1], None
    if first is not None and last is not None and precisions[0] == BASELINE != precisions[-1]:
        delta = last - first
    named = next(entries[b][0] for b in reversed(precisions) if b in entries)
    n = number(named.get("n"))
    order = (2.0 if last is None else last, delta or 0.0, -(n or 0))
    texts = [key, str(named.get("name") or ""), fixed(n, 0), *map(percent, values), percent(delta, sign=True)]
    return order, n or 0.0, texts


def interval_text(one: ClassLoss | None) -> str:
    """The interval of what a class lost, in points."""
    if one is None:
        return MISSING
    return f"{percent(one.low, sign=True)} to {percent(one.high, sign=True)}{' (few images)' if one.few else ''}"


def mean_of(stat: Stat | None) -> float | None:
    return None if stat is None else stat.mean
