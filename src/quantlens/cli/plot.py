"""`quantlens plot`: the plots of a study as files."""

from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli import _options

HELP = """Write a figure of the report as PDF, PNG or SVG, ready for a paper.

[bold]--list[/bold] names the figures that the study has data for.

[bold]Examples[/bold]

    quantlens plot quantlens-demo --list

    quantlens plot results --figure aupr --format pdf

    quantlens plot results --figure changes --bits W4A8 --score energy --out changes.svg
"""


def plot(
    directory: _options.StudyDirectory,
    figure: Annotated[str, typer.Option(metavar="NAME", help="Which figure.")] = "aupr",
    format: Annotated[str | None, typer.Option(help="pdf, png or svg (default: as --out ends, else pdf).")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to (default: NAME.FORMAT in DIR).")] = None,
    score: Annotated[str | None, typer.Option(metavar="NAME", help="The OOD score shown (default: msp).")] = None,
    bits: Annotated[str | None, typer.Option(help="The precision shown (default: the lowest).")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Name the figures; write nothing.")] = False,
) -> None:
    """See HELP."""
    from quantlens import plots
    from quantlens.studies.board import board_of

    plots.check_figure(figure)
    board = board_of(directory)
    if listed:
        for name, title in plots.available(board).items():
            print(f"{name:<12} {title}")
        return
    target = out or directory / f"{figure}.{format or 'pdf'}"
    print(f"figure: {plots.draw(board, figure, score=score, bits=bits).save(target, format or '')}")
