"""Mixed precision on the page: the widths of a study's MPn cells as a table, and the page beside an allocation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlens.files import write_whole
from quantlens.plots.points import UNITS, front, mixed_cells, widths_of
from quantlens.report.charts import Charts
from quantlens.report.page import render
from quantlens.studies.board import Board


@dataclass(frozen=True)
class Widths:
    """A table: a column per cell with mixed precision, a row (name, widths) per group."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


def widths(board: Board) -> Widths | None:
    """The widths of a study's cells; None for a study without mixed precision."""
    cells = mixed_cells(board)
    if not cells:
        return None
    found = [{g["name"]: str(g["bits"]) for g in allocation["groups"]} for _, allocation in cells]
    names = dict.fromkeys(n for one in found for n in one)
    return Widths([name for name, _ in cells], [(n, [one.get(n, "") for one in found]) for n in names])


def front_page(allocation: Any) -> str:
    """One self-contained HTML page: the front, the widths, and every group's sensitivities."""
    unit, name, what = UNITS[allocation.cost]
    total, budget = allocation.total / unit, allocation.budget / unit
    lead = (
        f"The {what} is {total:.3f} {name} of a budget of {budget:.3f} {name}; sensitivity {allocation.loss:.3g} by "
        f"{allocation.sensitivity}, candidates {', '.join(map(str, allocation.candidates))} bits, "
        f"{allocation.calibration.get('n', 0)} calibration images, {allocation.seconds:.1f} s."
    )
    detail = (
        f"Every point is the least total sensitivity that its cost allows ({len(allocation.front)} points, exact); "
        f"the scale of sensitivity is logarithmic. {allocation.name} is the allocation of this file."
    )
    panels = [
        front(allocation.frontier(), "Pareto front", detail),
        widths_of(allocation.summary()["groups"], f"Widths of {allocation.name}"),
    ]
    return render(
        "front.html.j2",
        Charts(),
        title=f"{allocation.model} {allocation.name}",
        kicker="mixed precision",
        lead=lead,
        panels=[panel for panel in panels if panel is not None],
        allocation=allocation,
    )


def write_front(allocation: Any, path: str | Path) -> Path:
    """Write :func:`front_page`; an existing file is replaced at once or not at all. Raises StorageError."""
    target = Path(path)
    write_whole(target, front_page(allocation), what="the page")
    return target
