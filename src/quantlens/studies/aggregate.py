"""Means and standard deviations over seeds, for tables in a terminal. (The report reads the store by itself.)"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlens.studies.store import Cell


@dataclass(frozen=True)
class Figure:
    """A figure to show: its path in a result ("ood_mean.far.msp.aupr_out"), its title, and how it is written."""

    path: str
    title: str
    percent: bool = True
    spread: bool = True
    """whether it varies with the seed"""

    def of(self, result: Mapping[str, Any]) -> float | None:
        """The figure in a result dict; None where it is not."""
        value: Any = result
        for key in self.path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


TOP1 = Figure("id.top1", "top-1 %")
NLL = Figure("id.nll", "NLL", percent=False)
FAR = Figure("ood_mean.far.msp.aupr_out", "AUPR-out far %")
NEAR = Figure("ood_mean.near.msp.aupr_out", "AUPR-out near %")
SIZE = Figure("size_mb", "MB", percent=False, spread=False)
SUMMARY = (TOP1, NLL, FAR, NEAR, SIZE)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1; None for a single seed) of a figure over seeds."""

    mean: float
    std: float | None
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """None when there is no value."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.fmean(values), std, len(values))

    def text(self, percent: bool, spread: bool = True) -> str:
        """`81.25 ± 0.31` in percent, or three digits after the point; without `spread` the mean alone."""
        scale, digits = (100, 2) if percent else (1, 3)
        mean = f"{self.mean * scale:.{digits}f}"
        return mean if self.std is None or not spread else f"{mean} ± {self.std * scale:.{digits}f}"


@dataclass
class Row:
    """One model, method and precision; each figure by its path."""

    model: str
    method: str
    bits: str
    seeds: list[int] = field(default_factory=list)
    figures: dict[str, Spread | None] = field(default_factory=dict)


def aggregate(cells: Iterable[Cell], figures: Sequence[Figure] = SUMMARY) -> list[Row]:
    """Rows in the order of the cells, each over all its seeds. Failed cells are left out."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        if cell.status == "done" and cell.result is not None:
            groups.setdefault((cell.spec["model"], cell.spec["method"], cell.spec["bits"]), []).append(cell)
    rows = []
    for (model, method, bits), members in groups.items():
        row = Row(model, method, bits, [int(cell.spec["seed"]) for cell in members])
        for figure in figures:
            values = [figure.of(cell.result or {}) for cell in members]
            row.figures[figure.path] = Spread.of([v for v in values if v is not None])
        rows.append(row)
    return rows


def table(rows: Sequence[Row], figures: Sequence[Figure] = SUMMARY, title: str | None = None) -> Any:
    """A rich Table of aggregated rows; figures that no row has are left out."""
    from rich.table import Table

    shown = [figure for figure in figures if any(row.figures.get(figure.path) is not None for row in rows)]
    several = len({row.model for row in rows}) > 1
    grid = Table(title=title, title_justify="left")
    if several:
        grid.add_column("model")
    grid.add_column("method")
    grid.add_column("bits")
    for figure in shown:
        grid.add_column(figure.title, justify="right", no_wrap=True)
    last: tuple[str, str] | None = None
    for row in rows:
        group = (row.model, row.method)
        if last is not None and group != last:
            grid.add_section()
        first = group != last
        last = group
        cells = [spread.text(f.percent, f.spread) if (spread := row.figures.get(f.path)) else "–" for f in shown]
        names = [row.model if first else ""] if several else []
        grid.add_row(*names, row.method if first else "", row.bits, *cells)
    return grid
