"""`quantlens report`: the HTML report of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli._common import command

HELP = """Write the report of a study: one HTML file that needs no network.

It shows the cells that are finished, also while the study still runs.

[bold]Examples[/bold]

    quantlens report quantlens-demo

    quantlens report results --out paper.html --title "Four small vision transformers"

    quantlens report results --csv results.csv
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "report", HELP, report)


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The --out directory of a study.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file (default: DIR/report.html).")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the report (default: the study's name).")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every figure of every cell as a table, and no report.")
    ] = None,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.report import write_report
    from quantlens.report.build import open_store

    if csv is not None:
        from quantlens.studies.flat import write_csv

        open_store(directory)
        _common.say(f"table: {write_csv(directory, csv)}")
        return
    _common.say(f"report: {write_report(directory, out, title=title)}")
