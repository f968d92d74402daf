"""Mixed precision on the page: the widths of a study's MPn cells as a table, and the page beside an allocation."""

from pathlib import Path
from typing import Any

from quantlens.plots.points import UNITS, front, mixed_cells, widths_of
from quantlens.report.page import write_page
from quantlens.studies.board import Board


def widths(board: Board) -> dict[str, Any] | None:
    """The widths of a study's cells as a table: a column per cell with mixed precision, a row (name, widths) per group.
    None for a study without mixed precision."""
    cells = mixed_cells(board)
    found = [{g["name"]: str(g["bits"]) for g in allocation["groups"]} for _, allocation in cells]
    names = dict.fromkeys(n for one in found for n in one)
    rows = [(n, [one.get(n, "") for one in found]) for n in names]
    return {"columns": [name for name, _ in cells], "rows": rows} if cells else None


def write_front(allocation: Any, path: str | Path) -> Path:
    """Write one self-contained HTML page: the front, the widths, and every group's sensitivities; an existing file is
    replaced at once or not at all. Raises StorageError."""
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
    return write_page(
        path,
        "front.html.j2",
        title=f"{allocation.model} {allocation.name}",
        kicker="mixed precision",
        lead=lead,
        panels=[panel for panel in panels if panel.rows],
        allocation=allocation,
    )
