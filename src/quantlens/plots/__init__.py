"""Results -> plots, drawn by Altair (Vega-Lite): in the report, and as PDF, PNG and SVG. Nothing is computed here
that is not in the results but shares of stored counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantlens.arguments import checked
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.plots import cells, points, precisions, shift
from quantlens.plots.style import Figure as Figure, PanelRow, composed, finished
from quantlens.studies.board import Board, board_of

FIGURES: dict[str, tuple[str, Callable[[Board], list[PanelRow]]]] = {
    "aupr": ("AUPR-out by precision", precisions.aupr),
    "sensitivity": ("top-1, NLL and AUPR-out against bit width", precisions.sensitivity),
    "changes": ("what quantization changed, ranked", precisions.changes),
    "histograms": ("OOD scores of ID and OOD images", cells.histograms),
    "reliability": ("accuracy against confidence", cells.reliability),
    "shift": ("accuracy, calibration and OOD detection under shift by precision", shift.shift),
    "corruptions": ("change of top-1 under each corruption", shift.corruptions),
    "drift": ("drift of attention against bits", precisions.drift),
    "drift-aupr": ("change of AUPR-out against drift of attention", points.association),
    "widths": ("widths that mixed precision chose", points.widths),
    "fronts": ("Pareto fronts of mixed precision", points.fronts),
    "layers": ("every layer alone", points.layers),
    "latency": ("top-1 and AUPR-out of exported files against latency", points.latency),
}
"""Every figure of the report by its name -> what it shows, and the function that makes its panels."""


@checked
def plot(
    directory: str | Path | Any, figure: str = "aupr", *, score: str | None = None, bits: str | None = None
) -> Figure:
    """A figure of the study in `directory`: `plot(DIR, "aupr").save("aupr.pdf")`.

    figure: a name of `FIGURES`. score, bits: the OOD score and the precision shown (default: MSP, the lowest). Raises
    UnknownNameError, and QuantlensError for a study without what the figure shows.
    """
    check_figure(figure)
    return draw(board_of(directory), figure, score=score, bits=bits)


def draw(board: Board, figure: str, *, score: str | None = None, bits: str | None = None) -> Figure:
    """:func:`plot` of a board."""
    for what, name, known in (("score", score, board.scores), ("precision", bits, board.quantized)):
        if name is not None and name not in known:
            raise UnknownNameError(f"{what} of this study", name, known, f"it has {', '.join(known) or 'none'}")
    rows = check_figure(figure)(board)
    if not any(row.panels for row in rows):
        raise QuantlensError(f"this study holds no data for the figure {figure!r}: {FIGURES[figure][0]}")
    return Figure(finished(composed(rows), score or board.score or "", bits or board.lowest or ""))


def check_figure(name: str) -> Callable[[Board], list[PanelRow]]:
    """The function that makes a figure's panels. Raises UnknownNameError where there is none of that name."""
    if name not in FIGURES:
        raise UnknownNameError("figure", name, FIGURES, "`quantlens plot DIR --list` names those of a study")
    return FIGURES[name][1]


def available(board: Board) -> dict[str, str]:
    """Name -> what it shows, of the plots that a study has the data for."""
    return {name: title for name, (title, make) in FIGURES.items() if any(row.panels for row in make(board))}
