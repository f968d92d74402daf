"""Drift of attention over the cells of a study, and whether it goes with the change of AUPR-out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from quantlens.attention.metrics import CAUSES, WHERE, DriftMetric, value_in
from quantlens.metrics.correlation import Association, associate
from quantlens.studies.board import Board, Group, Path, change_of
from quantlens.studies.text import Stat


def drift_of(where: str, metric: DriftMetric, group: Group, bits: str, score: str = "") -> Stat | None:
    """Mean and standard deviation over seeds, in the unit of the metric's label; it depends on no score."""
    stat = Stat.of(value_in(r, where, metric) for r in group.results(bits))
    return None if stat is None else stat.scaled(metric.factor)


@dataclass(frozen=True)
class Pair:
    """One quantized cell: its group, precision, seed, drift (x) and change of AUPR-out in points (y)."""

    group: Group
    bits: str
    seed: str
    x: float
    y: float


@dataclass(frozen=True)
class Link:
    """A metric of drift on ID or OOD images against the change of AUPR-out: the cells and their correlation."""

    metric: DriftMetric
    where: str
    pairs: list[Pair]
    found: Association


def links(board: Board) -> list[Link]:
    """Every metric of drift that cells have beside a change of AUPR-out (`Board.ood_path`)."""
    found: list[Link] = []
    if board.ood_path is None:
        return found
    for metric, where in product(CAUSES, WHERE):
        pairs = _pairs(board, board.ood_path, where, metric)
        if pairs:
            x, y, bits = [p.x for p in pairs], [p.y for p in pairs], [p.bits for p in pairs]
            conditions = [(p.group.index, p.bits) for p in pairs]
            found.append(Link(metric, where, pairs, associate(x, y, conditions, bits)))
    return found


def _pairs(board: Board, path: Path, where: str, metric: DriftMetric) -> list[Pair]:
    """Every quantized cell that has both."""
    found = []
    for group in board.groups:
        for bits, result in ((bits, result) for bits, results in group.cells.items() for result in results):
            x, change = value_in(result, where, metric), change_of(group, result, path)
            if x is not None and change is not None:
                found.append(Pair(group, bits, str(result["seed"]), x, 100 * change))
    return found
