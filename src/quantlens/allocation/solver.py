"""The exact choice of one width per group: least total sensitivity within a budget.

Both the sensitivity and the cost of a choice are sums over groups (a multiple-choice knapsack). The dynamic programme
of Nemhauser and Ullmann (1969) takes in one group after the other and keeps, of all partial choices, those that no
other one beats in both cost and sensitivity; a dominated partial choice can be part of no better whole. What is left
after the last group is the whole Pareto front, exactly, and the answer for every budget at once. Costs are integers,
so there are at most as many points as there are costs; a transformer's blocks are equal, so there are few (a
hundred or so for DeiT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Front:
    """All choices that no other beats, by rising cost and falling sensitivity.

    costs: int64 [P]. values: float64 [P]. choices: int [P, G], the index of each group's width.
    """

    costs: np.ndarray
    values: np.ndarray
    choices: np.ndarray

    def within(self, budget: int) -> int:
        """Index of the best point that costs at most ``budget``; −1 if there is none."""
        return int(np.searchsorted(self.costs, budget, side="right")) - 1


def pareto_front(costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]]) -> Front:
    """The exact Pareto front of choosing one column in each row.

    costs: [G][W] integers. values: [G][W] finite sensitivities, smaller is better. Of choices with equal sensitivity
    the cheapest is kept. Raises ValueError for values that are not finite.
    """
    cost, value = np.asarray(costs, dtype=np.int64), np.asarray(values, dtype=np.float64)
    if cost.shape != value.shape or cost.ndim != 2 or 0 in cost.shape:
        raise ValueError(f"costs {cost.shape} and values {value.shape} must be equal, non-empty tables")
    if not np.isfinite(value).all():
        raise ValueError("a sensitivity is not finite")
    total_cost, total_value = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for group_cost, group_value in zip(cost, value, strict=True):
        sums = (total_cost[:, None] + group_cost).ravel()
        losses = (total_value[:, None] + group_value).ravel()
        order = np.lexsort((losses, sums))
        best = np.minimum.accumulate(losses[order])
        kept = order[np.r_[True, best[1:] < best[:-1]]]
        total_cost, total_value = sums[kept], losses[kept]
        steps.append(np.divmod(kept, len(group_cost)))
    choices, at = np.empty((len(total_cost), len(steps)), dtype=np.int64), np.arange(len(total_cost))
    for group, (parent, column) in reversed(list(enumerate(steps))):
        choices[:, group] = column[at]
        at = parent[at]
    return Front(total_cost, total_value, choices)
