"""`quantlens study`: a whole grid of experiments from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

if TYPE_CHECKING:
    from quantlens.studies.runner import Summary

HELP = """Run a study: models × methods × bits × seeds, measured on one ID set and any number of OOD sets.

Every finished cell is written to DIR/store.sqlite at once. Run the same command again after Ctrl-C, a crash or a change
of the file: only what is not finished runs. Several such commands may work on one DIR together.

[bold]Examples[/bold]

    quantlens study examples/shared-data-study.yaml --out results

    quantlens study my-study.yaml --out results --dry-run

    quantlens study my-study.yaml --out results --plan

    quantlens study my-study.yaml --out results --workers 4 --report

    quantlens study my-study.yaml --out results --executor ray --address auto
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "study", HELP, study)


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file (see examples/).")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the store (default: the file's name, here).")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share the work (default: 1; on a cluster, all that find room)."),
    ] = None,
    executor: Annotated[str, typer.Option(metavar="NAME", help="local, or ray for a Ray cluster.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster; auto is this machine's (default: one of its own on this machine)."),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(metavar="X", help="What part of a GPU each worker of a cluster gets, such as 0.25."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Run at most so many cells now.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and run nothing.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="List the cells with an estimate of time, memory and disk; run nothing.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the report at the end.")] = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.errors import QuantlensError
    from quantlens.studies.cells import plan_study
    from quantlens.studies.config import load_config
    from quantlens.studies.runner import run_study

    config = load_config(file)
    directory = out or Path(file.stem)
    if dry_run or plan:
        cells = plan_study(config)
        for cell in cells:
            _common.say(str(cell))
        _common.say(f"{len(cells)} cells")
        if plan:
            from quantlens.studies.estimate import estimate

            for line in estimate(config, directory, workers=workers or 1, progress=not quiet).lines():
                _common.say(line)
        return
    summary = run_study(
        config,
        directory,
        workers=workers,
        executor=executor,
        address=address,
        gpus_per_worker=gpus_per_worker,
        progress=not quiet,
        retry_failed=retry_failed,
        limit=limit,
    )
    if summary.done:
        from quantlens.cli._tables import means_table
        from quantlens.studies.results import results

        title = f"{config.name}: mean ± standard deviation over seeds"
        _common.stdout().print(means_table(results(directory).means(), title))
        if report:
            from quantlens.report import write_report

            _common.say(f"report: {write_report(directory)}")
        else:
            _common.say(f"{summary}; `quantlens report {directory}` writes the report")
    if summary.failed:
        if not summary.done:
            raise QuantlensError(f"every cell failed; the first: {summary.failed[0][0]}: {summary.failed[0][1]}")
        tell_failures(summary)
        raise typer.Exit(1)


def tell_failures(summary: Summary) -> None:
    """The failed cells on stderr, each with its reason."""
    from quantlens.cli import _common

    console = _common.stderr()
    for label, reason in summary.failed:
        console.print(f"failed: {label}: {reason}", markup=False, soft_wrap=True)
    console.print("run again with --retry-failed once the reason is mended", markup=False)
