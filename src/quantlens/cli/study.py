"""`quantlens study`: a whole grid of experiments from a YAML file."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.errors import QuantlensError

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
        float | None, typer.Option(metavar="X", help="What part of a GPU each worker of a cluster gets, such as 0.25.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of cells to run now.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and run nothing.")] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="List the cells and estimate time, memory and disk from a small cell per method."),
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the report at the end.")] = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.studies.cells import plan_study
    from quantlens.studies.config import load_config
    from quantlens.studies.runner import run_study

    config = load_config(file)
    directory = out or Path(file.stem)
    if dry_run or plan:
        cells = plan_study(config)
        print("\n".join([*map(str, cells), f"{len(cells)} cells"]))
        if plan:
            from quantlens.studies.estimate import estimate

            print("\n".join(estimate(config, directory, workers=workers or 1, progress=not quiet).lines()))
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
        _show(summary, config.name, report)
    elif summary.failed:
        raise QuantlensError(f"every cell failed; the first: {summary.failed[0][0]}: {summary.failed[0][1]}")
    tell_failures(summary)


def _show(summary: Any, name: str, report: bool) -> None:
    """The means over seeds, and the report where it is asked for."""
    from quantlens.report import write_report
    from quantlens.studies.results import results

    directory = summary.directory
    written = write_report(directory) if report else None  # first, as not every console can show a table
    title = f"{name}: mean ± standard deviation over seeds"
    _common.console().print(means_table(results(directory).means(), title))
    rest = f"{summary}; `quantlens report {directory}` writes the report"
    print(rest if written is None else f"report: {written}")


def tell_failures(summary: Any) -> None:
    """The failed cells on stderr, each with its reason; Exit(1) where there are any."""
    if summary.failed:
        console = _common.console(stderr=True)
        for label, reason in summary.failed:
            console.print(f"failed: {label}: {reason}", soft_wrap=True)
        console.print("run again with --retry-failed after fixing the cause", soft_wrap=True)
        raise typer.Exit(1)


def means_table(means: Sequence[Any], title: str) -> Any:
    """Means over seeds, a row for every model, method and precision; metrics that none has are left out."""
    from quantlens.evaluation.result import title_of

    paths = dict.fromkeys(path for one in means for path, spread in one.metrics.items() if spread is not None)
    numbers = [title_of(path).replace(", ", "\n", 1) for path in paths]
    words = ["model", "method", "bits"][0 if len({one.model for one in means}) > 1 else 1 :]
    made = _common.table([*words, *numbers], right=numbers, whole=numbers, title=title)
    for _, group in groupby(means, key=lambda one: (one.model, one.method)):
        for i, one in enumerate(group):
            texts = [getattr(one, word) if i == 0 or word == "bits" else "" for word in words]
            made.add_row(*texts, *(_mean(path, one.metrics.get(path)) for path in paths))
        made.add_section()
    return made


def _mean(path: str, spread: Any) -> str:
    """ "81.25 ± 0.31"; the mean alone of one seed, and of a size, which no seed changes."""
    from quantlens.metrics import metric_of

    metric = metric_of(path)
    if spread is None or spread.std is None or metric.family == "size":
        return metric.text(spread and spread.mean)
    return f"{metric.text(spread.mean)} ± {metric.text(spread.std)}"
