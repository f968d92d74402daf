"""The choice of widths: made by :func:`allocate`, kept as an :class:`Allocation`, which is a JSON file."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from quantlens.allocation.costs import BOPS, COSTS, SIZE, cost_table
from quantlens.allocation.groups import find_groups
from quantlens.allocation.hessian import hessian_sensitivity
from quantlens.allocation.sensitivity import (
    Candidates,
    kl_sensitivity,
    nuclear_norm_sensitivity,
    random_sensitivity,
)
from quantlens.allocation.solver import Front, pareto_front
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.files import write_whole
from quantlens.graph import graph_of
from quantlens.methods.base import Progress
from quantlens.qmodel import Bits
from quantlens.transforms import fold_layer_scale

FORMAT = 1
VERSION = 1
"""Part of every allocation; raised when the same input gives other widths."""

NARROWEST, WIDEST = 2, 10
POINTS = 500
"""Most points of a front that a file holds: all of them for transformers of equal blocks, else a regular choice."""
DRAWN = 80
"""Most points of a front that a quantized model remembers, for drawing."""

SENSITIVITIES: dict[str, Callable[..., Any] | None] = {
    "nuclear-norm": nuclear_norm_sensitivity,
    "hessian": hessian_sensitivity,
    "kl": kl_sensitivity,
    "random": None,
}
"""Names of the sensitivities; ``random`` needs no images."""


@dataclass(frozen=True)
class GroupChoice:
    """One group and its width.

    modules: what it covers, as names of :class:`Bits`. sensitivity, size (bytes), bops: by candidate width.
    """

    name: str
    kind: str
    block: str
    modules: tuple[str, ...]
    bits: int
    sensitivity: dict[int, float]
    size: dict[int, int]
    bops: dict[int, int]


@dataclass(frozen=True)
class FrontPoint:
    """A choice that no other beats: the cost of the whole model, total sensitivity, width of each group."""

    cost: int
    sensitivity: float
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """A width for the attention and the MLP of every block, and how it was chosen. ``bits()`` is what
    :func:`quantlens.quantize` takes; so is the allocation itself, and the file that :meth:`save` writes.

    name: ``MP6``. target: width of what is in no group, and of the uniform model. cost: "size" (bytes) or "bops".
    budget, total: of the whole model, in the unit of ``cost``. fixed: cost of what is in no group, by kind of cost.
    sensitivity: its name; options, info: its settings and by-products. seconds: time taken by the sensitivities.
    front: the Pareto front, by rising cost; empty if not asked for.
    """

    name: str
    model: str
    checkpoint_sha256: str | None
    target: int
    candidates: tuple[int, ...]
    sensitivity: str
    cost: str
    budget: int
    total: int
    groups: tuple[GroupChoice, ...]
    fixed: dict[str, int]
    seed: int
    seconds: float
    calibration: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    front: tuple[FrontPoint, ...] = ()
    version: int = VERSION

    def bits(self) -> Bits:
        """Widths per module, weights and activations alike."""
        named = {module: group.bits for group in self.groups for module in group.modules}
        return Bits.parse({"name": self.name, "default": self.target, **named})

    @property
    def loss(self) -> float:
        """Total sensitivity of the choice."""
        return sum(group.sensitivity[group.bits] for group in self.groups)

    def cost_of(self, kind: str, bits: int | None = None) -> int:
        """Cost of the whole model ("size" or "bops"): as chosen, or with every group at one width."""
        rows = [getattr(group, kind) for group in self.groups]
        return self.fixed[kind] + sum(
            row[group.bits if bits is None else bits] for group, row in zip(self.groups, rows, strict=True)
        )

    def loss_of(self, bits: int) -> float:
        """Total sensitivity with every group at one of the candidate widths."""
        return sum(group.sensitivity[bits] for group in self.groups)

    def frontier(self, most: int = POINTS) -> dict[str, Any]:
        """The front as plain data, for drawing: (cost, sensitivity) of ``most`` of its points at most, of every
        candidate width used everywhere ("uniform": [bits, cost, sensitivity]) and of the choice."""
        front = [[p.cost, p.sensitivity] for p in self.front]
        return {
            **{key: getattr(self, key) for key in ("name", "model", "sensitivity", "cost")},
            "points": [front[i] for i in _spread(len(front), most)],
            "uniform": [[b, self.cost_of(self.cost, b), self.loss_of(b)] for b in self.candidates],
            "chosen": [self.total, self.loss],
        }

    def check(self, model: Any) -> None:
        """Raises QuantlensError if this allocation was made for another model."""
        if self.checkpoint_sha256 == model.checkpoint_sha256:
            return
        mine, given = (str(sha or "unknown")[:12] for sha in (self.checkpoint_sha256, model.checkpoint_sha256))
        raise QuantlensError(
            f"this allocation was made for {self.model} (checkpoint {mine}), not for {model.name} (checkpoint "
            f"{given}); run `quantlens allocate {model.name}` for a new one"
        )

    # -- files ------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain data that is valid JSON."""
        return {"format": FORMAT, **asdict(self)}

    def summary(self) -> dict[str, Any]:
        """What a quantized model remembers of it."""
        kept = ("name", "sensitivity", "target", "candidates", "cost", "budget", "total", "seconds", "seed", "options")
        groups = [{"name": g.name, "kind": g.kind, "block": g.block, "bits": g.bits} for g in self.groups]
        return {
            **{key: getattr(self, key) for key in kept},
            "candidates": list(self.candidates),
            "groups": groups,
            "frontier": self.frontier(DRAWN),
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; the file is there whole or not at all. Raises StorageError."""
        target = Path(path)
        write_whole(target, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", what="the allocation")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read what :meth:`save` wrote. Raises QuantlensError for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise QuantlensError(f"the allocation {path} does not exist; `quantlens allocate` writes one") from None
        except (OSError, ValueError) as error:
            raise QuantlensError(f"{path} cannot be read as an allocation ({error})") from error
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "this") -> Allocation:
        """The inverse of :meth:`to_dict`. Raises QuantlensError, naming ``where``."""
        if not isinstance(data, Mapping) or "groups" not in data:
            raise QuantlensError(f"{where} is no allocation of quantlens; `quantlens allocate` writes one")
        if data.get("format") != FORMAT:
            raise QuantlensError(
                f"{where} has format {data.get('format')!r}, and this quantlens reads {FORMAT}; make it anew with "
                "`quantlens allocate`"
            )
        try:
            rest = {key: value for key, value in data.items() if key != "format"}
            return cls(
                **{
                    **rest,
                    "candidates": tuple(rest["candidates"]),
                    "groups": tuple(_group(one) for one in rest["groups"]),
                    "front": tuple(
                        FrontPoint(int(p["cost"]), float(p["sensitivity"]), tuple(p["bits"])) for p in rest["front"]
                    ),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise QuantlensError(f"{where} is no allocation of quantlens, or a damaged one ({error})") from None


def _group(data: Mapping[str, Any]) -> GroupChoice:
    tables = {key: {int(bits): value for bits, value in data[key].items()} for key in ("sensitivity", "size", "bops")}
    return GroupChoice(**{**data, "modules": tuple(data["modules"]), **tables})


# -- targets ----------------------------------------------------------------------------------------------------------
def parse_target(text: str | int) -> int:
    """The width that ``MP6``, ``W6A6`` or ``6`` names. Raises QuantlensError for anything else."""
    match = re.fullmatch(r"(?:MP|W(?=(\d+)A\1$))?(\d+)(?:A\d+)?", str(text).strip().upper())
    if match is None or ("A" in str(text).upper() and match[1] is None):
        raise QuantlensError(
            f"target {text!r} not understood: write MP6, W6A6 or 6 (weights and activations of a group share a width)"
        )
    width = int(match[2])
    if not NARROWEST <= width <= WIDEST:
        raise QuantlensError(f"target {text!r}: choose {NARROWEST} to {WIDEST} bits")
    return width


def is_target(text: object) -> bool:
    """Whether ``text`` is a mixed-precision target such as ``MP6``."""
    return isinstance(text, str) and re.fullmatch(r"MP\d+", text.strip().upper()) is not None


def default_candidates(target: int) -> tuple[int, ...]:
    """{target − 2 … target + 2} (the paper's {4 … 8} for 6 and {6 … 10} for 8), within 2 … 10."""
    return tuple(range(max(NARROWEST, target - 2), min(WIDEST, target + 2) + 1))


# -- the choice -------------------------------------------------------------------------------------------------------
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
    widths = default_candidates(width) if candidates is None else tuple(sorted({int(b) for b in candidates}))
    if not widths or not all(NARROWEST <= b <= WIDEST for b in widths):
        raise QuantlensError(
            f"candidates {list(widths)}: give widths of {NARROWEST} to {WIDEST} bits, such as 4,5,6,7,8"
        )
    if cost not in COSTS:
        raise UnknownNameError("cost", cost, COSTS)
    if sensitivity not in SENSITIVITIES:
        raise UnknownNameError("sensitivity", sensitivity, SENSITIVITIES)
    settings = sensitivity_options(sensitivity, options)
    images = Calibration.of(calibration, model.preprocess, device=model.device)
    graph = graph_of(model).clone()
    fold_layer_scale(graph)
    graph.invalidate()
    groups = find_groups(graph)
    table = cost_table(graph, groups, widths, width)
    uniform = table if width in widths else cost_table(graph, groups, [width], width)
    limit = uniform.total(cost, [uniform.widths.index(width)] * len(groups)) if budget is None else int(budget)
    started = time.perf_counter()
    with torch.no_grad():
        function = SENSITIVITIES[sensitivity]
        if function is None:
            values, info = random_sensitivity(groups, widths, seed=seed)
        else:
            prepared = Candidates(graph, images, groups, widths, seed=seed)
            values, info = function(prepared, images, seed=seed, progress=progress, **settings)
    if not bool(torch.isfinite(values).all()):
        worst = groups[int((~torch.isfinite(values)).any(1).nonzero()[0])].name
        raise QuantlensError(f"{worst}: its sensitivity is not finite; check the weights and the calibration images")
    seconds = round(time.perf_counter() - started, 3)
    found = pareto_front(table.groups[cost], values.tolist())
    fixed = table.fixed[cost]
    if limit - fixed < found.costs[0]:
        unit, name = (1e6, "MB") if cost == SIZE else (1e9, "G bit operations")
        raise QuantlensError(
            f"no choice of {widths[0]} to {widths[-1]} bits fits the budget of {limit / unit:.3f} {name}: the least "
            f"possible is {(found.costs[0] + fixed) / unit:.3f} {name}; raise the budget or allow narrower candidates"
        )
    best = found.within(limit - fixed)
    choice = found.choices[best].tolist()
    rows = values.tolist()
    return Allocation(
        name=_name(width, sensitivity, cost, None if budget is None else limit),
        model=model.name,
        checkpoint_sha256=model.checkpoint_sha256,
        target=width,
        candidates=widths,
        sensitivity=sensitivity,
        cost=cost,
        budget=limit,
        total=table.total(cost, choice),
        groups=tuple(
            GroupChoice(
                group.name,
                group.kind,
                group.block,
                group.modules,
                widths[choice[i]],
                dict(zip(widths, rows[i], strict=True)),
                dict(zip(widths, table.groups[SIZE][i], strict=True)),
                dict(zip(widths, table.groups[BOPS][i], strict=True)),
            )
            for i, group in enumerate(groups)
        ),
        fixed=table.fixed,
        seed=seed,
        seconds=seconds,
        calibration=images.info(),
        options=settings,
        info=info,
        front=_points(found, widths, fixed) if front else (),
    )


def sensitivity_options(sensitivity: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a sensitivity with their values. Raises UnknownNameError for one that it does not have."""
    function = SENSITIVITIES[sensitivity]
    known = (
        {}
        if function is None
        else {
            name: p.default
            for name, p in signature(function).parameters.items()
            if p.kind is p.KEYWORD_ONLY and name not in ("seed", "progress")
        }
    )
    for name in given:
        if name not in known:
            raise UnknownNameError(f"option of {sensitivity}", name, known)
    return {**known, **given}


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


def _points(front: Front, widths: Sequence[int], fixed: int) -> tuple[FrontPoint, ...]:
    return tuple(
        FrontPoint(
            int(front.costs[i]) + fixed, float(front.values[i]), tuple(widths[c] for c in front.choices[i].tolist())
        )
        for i in _spread(len(front), POINTS)
    )


def _spread(count: int, most: int) -> Sequence[int]:
    """``most`` of ``count`` positions at most, evenly spread, both ends among them."""
    return range(count) if count <= most else sorted({math.floor(i * (count - 1) / (most - 1)) for i in range(most)})
