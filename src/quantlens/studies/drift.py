"""Drift of attention over the cells of a study, and whether it goes with the change of AUPR-out."""

from __future__ import annotations

from dataclasses import dataclass

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


def changed_path(board: Board) -> Path | None:
    """Path of the metric that drift is compared with: AUPR-out of the far sets, else of all or near ones."""
    if not board.parts() or board.score is None:
        return None
    return ("ood_mean", board.parts()[0], board.score, "aupr_out")


def links(board: Board) -> list[Link]:
    """Every metric of drift that cells have beside a change of AUPR-out."""
    path = changed_path(board)
    found = []
    for metric, where in ((m, w) for m in CAUSES for w in WHERE if path is not None):
        of_cells = pairs(board, path or (), where, metric)
        if of_cells:
            association = associate(
                [p.x for p in of_cells],
                [p.y for p in of_cells],
                [(p.group.index, p.bits) for p in of_cells],
                [p.bits for p in of_cells],
            )
            found.append(Link(metric, where, of_cells, association))
    return found


def pairs(board: Board, path: Path, where: str, metric: DriftMetric) -> list[Pair]:
    """(drift, change of AUPR-out in points) of every quantized cell that has both."""
    found = []
    for group in board.groups:
        for bits, results in group.cells.items():
            for result in results:
                x, change = value_in(result, where, metric), change_of(group, result, path)
                if x is not None and change is not None:
                    found.append(Pair(group, bits, str(result.get("seed")), x, 100 * change))
    return found
