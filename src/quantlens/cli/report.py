"""`quantlens report`: the HTML report of a study."""

from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli import _common, _options

HELP = """Write the report of a study: one HTML file that needs no network.

It shows the cells that are finished, also while the study still runs.

[bold]Examples[/bold]

    quantlens report quantlens-demo

    quantlens report results --out paper.html --title "Four small vision transformers"

    quantlens report results --csv results.csv --parquet results.parquet

    quantlens report results --mlflow http://localhost:5000
"""


def report(
    directory: _options.StudyDirectory,
    out: Annotated[Path | None, typer.Option(help="The HTML file (default: DIR/report.html).")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the report (default: the study's name).")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every metric of every cell as a table, and no report.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same table as Parquet (needs quantlens\\[parquet]).")
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="Log every cell once as a run of MLflow (needs quantlens\\[mlflow]); no report."
        ),
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow's experiment (default: the study's name).")] = None,
) -> None:
    """See HELP."""
    from quantlens.report import write_report
    from quantlens.studies import results, tracking
    from quantlens.studies.board import open_store

    if csv is None and parquet is None and mlflow is None:
        with _common.stages() as step:
            print(f"report: {write_report(directory, out, title=title, progress=step)}")
        return
    open_store(directory)
    if csv is not None:
        print(f"table: {results.write_csv(directory, csv)}")
    if parquet is not None:
        print(f"table: {results.write_parquet(directory, parquet)}")
    if mlflow is not None:
        new, old = tracking.log(directory, mlflow, experiment=experiment)
        print(f"MLflow: {new} runs logged, {old} were there; {mlflow}")
