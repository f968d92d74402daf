"""`quantlens study`: a whole grid of experiments from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

if TYPE_CHECKING:
    from quantlens.studies.config import StudyConfig
    from quantlens.studies.runner import Summary

HELP = """Run a study: models × methods × bits × seeds, measured on one ID set and any number of OOD sets.

Every finished cell is written to DIR/store.sqlite at once. Run the same command again after Ctrl-C, a crash or a change
of the file: only what is not finished runs. One such command at a time works on a DIR; --workers shares its work.

[bold]Examples[/bold]

    quantlens study examples/shared-data-study.yaml --out results

    quantlens study my-study.yaml --out results --dry-run

    quantlens study my-study.yaml --out results --plan

    quantlens study my-study.yaml --out results --workers 4 --report

    quantlens study my-study.yaml --out results --executor ray --address auto
"""

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file (see examples/).")]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Directory of the store (default: the file's name, here).")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that share the work (default: 1; on a cluster, all that find room)."),
]
Executor = Annotated[str, typer.Option(metavar="NAME", help="local, or ray for a Ray cluster.")]
Address = Annotated[
    str | None, typer.Option(help="The Ray cluster; auto is this machine's (default: one of its own on this machine).")
]
GpusPerWorker = Annotated[
    float | None, typer.Option(metavar="X", help="What part of a GPU each worker of a cluster gets, such as 0.25.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Maximum number of cells to run now.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cells and run nothing.")]
Plan = Annotated[
    bool,
    typer.Option("--plan", help="List the cells and estimate time, memory and disk from a small cell per method."),
]
Report = Annotated[bool, typer.Option("--report", help="Write the report at the end.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "study", HELP, study)


def study(
    file: StudyFile,
    out: Out = None,
    workers: Workers = None,
    executor: Executor = "local",
    address: Address = None,
    gpus_per_worker: GpusPerWorker = None,
    limit: Limit = None,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
    plan: Plan = False,
    report: Report = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.studies.config import load_config
    from quantlens.studies.runner import run_study

    config = load_config(file)
    directory = out or Path(file.stem)
    if dry_run or plan:
        _plan(config, directory if plan else None, workers or 1, quiet)
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
    _show(summary, config.name, report)


def _plan(config: StudyConfig, directory: Path | None, workers: int, quiet: bool) -> None:
    """The cells, and with a directory what those cost that are not finished in it."""
    from quantlens.cli import _common
    from quantlens.studies.cells import plan_study

    cells = plan_study(config)
    for cell in cells:
        _common.say(str(cell))
    _common.say(f"{len(cells)} cells")
    if directory is not None:
        from quantlens.studies.estimate import estimate

        for line in estimate(config, directory, workers=workers, progress=not quiet).lines():
            _common.say(line)


def _show(summary: Summary, name: str, report: bool) -> None:
    """The report, then the table and the failed cells. Raises Exit(1) where a cell failed."""
    from quantlens.cli import _common
    from quantlens.cli._tables import means_table
    from quantlens.errors import QuantlensError
    from quantlens.report import write_report
    from quantlens.studies.results import results

    directory = summary.directory
    if summary.done:
        written = write_report(directory) if report else None  # first, as not every console can show a table
        title = f"{name}: mean ± standard deviation over seeds"
        _common.stdout().print(means_table(results(directory).means(), title))
        rest = f"{summary}; `quantlens report {directory}` writes the report"
        _common.say(rest if written is None else f"report: {written}")
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
        console.print(f"failed: {label}: {reason}", soft_wrap=True)
    console.print("run again with --retry-failed after fixing the cause", soft_wrap=True)
