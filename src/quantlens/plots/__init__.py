"""Results -> figures, drawn by Altair (Vega-Lite): in the report, and as PDF, PNG and SVG. Nothing is computed here
that is not in the results but shares of stored counts."""

from quantlens.plots.figures import FIGURES, available, check_figure, draw, plot
from quantlens.plots.style import Figure

__all__ = ["FIGURES", "Figure", "available", "check_figure", "draw", "plot"]
