"""The choice of widths under a budget: :func:`allocate` measures, counts, solves and keeps the result."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlens.allocation.allocation import (
    NARROWEST,
    POINTS,
    WIDEST,
    Allocation,
    FrontPoint,
    GroupChoice,
    default_candidates,
    evenly_spaced,
    parse_target,
)
from quantlens.allocation.groups import BOPS, COSTS, SIZE, CostTable, Group, cost_table, find_groups
from quantlens.allocation.sensitivity import (
    Candidates,
    hessian_sensitivity,
    kl_sensitivity,
    nuclear_norm_sensitivity,
    random_sensitivity,
)
from quantlens.arguments import checked
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.graph import Graph, graph_of
from quantlens.methods.base import Progress
from quantlens.transforms import fold_layer_scale

SENSITIVITIES: dict[str, Callable[..., Any] | None] = {
    "nuclear-norm": nuclear_norm_sensitivity,
    "hessian": hessian_sensitivity,
    "kl": kl_sensitivity,
    "random": None,
}
"""Names of the sensitivities; ``random`` needs no images."""


@checked
def allocate(
    model: Any,
    calibration: Any,
    target: str | int = "MP6",
    *,
    sensitivity: str = "nuclear-norm",
    cost: str = SIZE,
    budget: float | None = None,
    candidates: Sequence[int] | None = None,
    front: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Allocation:
    """Choose a width for the attention and the MLP of every block: least total sensitivity within a budget, exactly.

    model: :class:`quantlens.models.Model`. calibration: as for :func:`quantlens.quantize`. target: ``MP6``, ``W6A6``
    or 6: the uniform model whose size (or bit operations) is the budget, and the width of what is in no group (patch
    embedding, patch merging, classifier). sensitivity: "nuclear-norm", "hessian", "kl" or "random". cost: "size" or
    "bops". budget: bytes or bit operations of the whole model, in place of the uniform model's. candidates: widths,
    by default target − 2 … target + 2. front: keep the whole Pareto front. options: the sensitivity's own.

    Raises QuantlensError: a budget that no choice meets, a sensitivity that is not finite, an unknown name or option.
    """
    width = parse_target(target)
    widths = _candidate_widths(width, candidates)
    settings = sensitivity_options(sensitivity, options)
    _check_task(sensitivity, model)
    if cost not in COSTS:
        raise UnknownNameError("cost", cost, COSTS)
    images = Calibration.of(calibration, model.preprocess, device=model.device, seed=seed)
    graph = graph_of(model).clone()  # as methods quantize it
    fold_layer_scale(graph)
    groups = find_groups(graph)
    table = cost_table(graph, groups, {*widths, width}, width)
    limit = table.total(cost, [width] * len(groups)) if budget is None else _budget(budget)
    started = time.perf_counter()
    values, info = _measured(sensitivity, graph, groups, widths, images, seed, progress, settings)
    seconds = round(time.perf_counter() - started, 3)
    found = pareto_front([[row[b] for b in widths] for row in table.groups[cost]], values.tolist())
    bits = _best_within(found, limit, table.fixed[cost], cost, widths)
    return Allocation(
        name=_name(width, sensitivity, cost, None if budget is None else limit),
        model=model.name,
        checkpoint_sha256=model.checkpoint_sha256,
        target=width,
        candidates=widths,
        sensitivity=sensitivity,
        cost=cost,
        budget=limit,
        total=table.total(cost, bits),
        groups=_group_choices(groups, bits, widths, values, table),
        fixed=table.fixed,
        seed=seed,
        seconds=seconds,
        calibration=images.info(),
        options=settings,
        info=info,
        front=_points(found, widths, table.fixed[cost]) if front else (),
    )


def _check_task(sensitivity: str, model: Any) -> None:
    """Raises UnsupportedError where a sensitivity is of classes, and the model gives none."""
    task = getattr(model, "task", "classify")
    if sensitivity in ("kl", "hessian") and task != "classify":
        raise UnsupportedError(
            f"sensitivity {sensitivity!r} is of the softmax over classes, and {model.name} is a model for {task!r}; "
            "take nuclear-norm"
        )


def _budget(given: float) -> int:
    """A budget of a person's own. Raises QuantlensError for what is none."""
    if not 0 <= given < math.inf:
        raise QuantlensError(f"a budget of {given} is none; give bytes or bit operations, a number of at least 0")
    return int(given)


def sensitivity_options(sensitivity: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a sensitivity with their values. Raises UnknownNameError for a sensitivity that does not exist,
    and for an option that it does not have."""
    if sensitivity not in SENSITIVITIES:
        raise UnknownNameError("sensitivity", sensitivity, SENSITIVITIES)
    function = SENSITIVITIES[sensitivity]
    parameters = {} if function is None else signature(function).parameters
    known = {
        name: p.default
        for name, p in parameters.items()
        if p.kind is p.KEYWORD_ONLY and name not in ("seed", "progress")
    }
    for name in given:
        if name not in known:
            raise UnknownNameError(f"option of {sensitivity}", name, known)
    return {**known, **given}


def _candidate_widths(target: int, given: Sequence[int] | None) -> tuple[int, ...]:
    """The widths to choose from, narrowest first. Raises QuantlensError for widths that do not exist."""
    widths = default_candidates(target) if given is None else tuple(sorted({int(b) for b in given}))
    if not widths or not all(NARROWEST <= b <= WIDEST for b in widths):
        raise QuantlensError(
            f"candidates {list(widths)}: give widths of {NARROWEST} to {WIDEST} bits, such as 4,5,6,7,8"
        )
    return widths


def _measured(
    sensitivity: str,
    graph: Graph,
    groups: Sequence[Group],
    widths: Sequence[int],
    images: Calibration,
    seed: int,
    progress: Progress | None,
    settings: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Sensitivities, float64 [G, W], and what else was found. Raises QuantlensError for one that is not finite."""
    function = SENSITIVITIES[sensitivity]
    with torch.no_grad():
        if function is None:
            values, info = random_sensitivity(groups, widths, seed=seed)
        else:
            candidates = Candidates(graph, images, groups, widths, seed=seed)
            values, info = function(candidates, images, seed=seed, progress=progress, **settings)
    broken = ~torch.isfinite(values).all(1)
    if bool(broken.any()):
        name = groups[int(broken.nonzero()[0])].name
        raise QuantlensError(f"{name}: its sensitivity is not finite; check the weights and the calibration images")
    return values, info


def _best_within(front: "Front", budget: int, fixed: int, cost: str, widths: Sequence[int]) -> list[int]:
    """The width of every group: the best choice within the budget of the whole model. Raises QuantlensError where even
    the cheapest costs more."""
    if budget - fixed < front.costs[0]:
        unit, name = (1e6, "MB") if cost == SIZE else (1e9, "G bit operations")
        raise QuantlensError(
            f"no choice of {widths[0]} to {widths[-1]} bits fits the budget of {budget / unit:.3f} {name}: the least "
            f"possible is {(front.costs[0] + fixed) / unit:.3f} {name}; raise the budget or allow narrower candidates"
        )
    return [widths[c] for c in front.choices[front.within(budget - fixed)]]


def _group_choices(
    groups: Sequence[Group], chosen: Sequence[int], widths: Sequence[int], values: Tensor, table: CostTable
) -> tuple[GroupChoice, ...]:
    """Every group with its width, and its sensitivity and costs by width."""
    rows = zip(groups, chosen, values.tolist(), table.groups[SIZE], table.groups[BOPS], strict=True)
    return tuple(
        GroupChoice(
            group.name,
            group.kind,
            group.block,
            group.modules,
            bits,
            dict(zip(widths, losses, strict=True)),
            {b: sizes[b] for b in widths},
            {b: bops[b] for b in widths},
        )
        for group, bits, losses, sizes, bops in rows
    )


def _name(width: int, sensitivity: str, cost: str, budget: int | None) -> str:
    """``MP6``; with the cost, the budget and the sensitivity where they are not the paper's."""
    parts = [f"MP{width}"]
    if budget is not None:
        parts.append(f"{budget / 1e6:.2f}MB" if cost == SIZE else f"{budget / 1e9:.1f}GBOPs")
    elif cost != SIZE:
        parts.append(cost)
    if sensitivity != "nuclear-norm":
        parts.append(sensitivity)
    return "-".join(parts)


def _points(front: "Front", widths: Sequence[int], fixed: int) -> tuple[FrontPoint, ...]:
    return tuple(
        FrontPoint(
            int(front.costs[i]) + fixed, float(front.values[i]), tuple(widths[c] for c in front.choices[i].tolist())
        )
        for i in evenly_spaced(len(front.costs), POINTS)
    )


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
    """The exact Pareto front of choosing one column in each row: a multiple-choice knapsack for every budget at once.

    The dynamic programme of Nemhauser and Ullmann (1969) takes in one group after the other and keeps, of all partial
    choices, those that no other one beats in both cost and sensitivity; a dominated partial choice can be part of no
    better whole. Costs are integers and a transformer's blocks are equal, so there are few points (a hundred or so).

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
