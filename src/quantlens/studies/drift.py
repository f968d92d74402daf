"""Drift of attention over the cells of a study, and whether it goes with the change of AUPR-out."""

from dataclasses import dataclass
from itertools import product

from quantlens.attention.metrics import CAUSES, WHERE, DriftMetric, value_in
from quantlens.metrics.correlation import Association, associate
from quantlens.studies.board import Board, Group, change_of
from quantlens.studies.text import Stat


def drift_of(where: str, metric: DriftMetric, group: Group, bits: str, score: str = "") -> Stat | None:
    """Mean and standard deviation over seeds, in the unit of the metric's label; it depends on no score."""
    stat = Stat.of(value_in(r, where, metric) for r in group.results(bits))
    return None if stat is None else stat.scaled(metric.factor)


Pair = tuple[Group, str, str, float, float]
"""One quantized cell: its group, precision, seed, drift (x) and change of AUPR-out in points (y)."""


@dataclass(frozen=True)
class Link:
    """A metric of drift on ID or OOD images against the change of AUPR-out: the cells and their correlation."""

    metric: DriftMetric
    where: str
    pairs: list[Pair]
    found: Association


def links(board: Board) -> list[Link]:
    """Every metric of drift that cells have beside a change of AUPR-out (`Board.ood_path`)."""
    found = []
    for metric, where in product(CAUSES, WHERE) if board.ood_path else ():
        pairs: list[Pair] = []
        for group, bits, result in board.cells:
            x, change = value_in(result, where, metric), change_of(group, result, board.ood_path or ())
            if x is not None and change is not None:
                pairs.append((group, bits, str(result["seed"]), x, 100 * change))
        if pairs:
            groups, precisions, _, drifts, changes = zip(*pairs, strict=True)
            conditions = [(group.index, bits) for group, bits in zip(groups, precisions, strict=True)]
            linked = associate(drifts, changes, conditions, precisions)
            found.append(Link(metric, where, pairs, linked))
    return found
