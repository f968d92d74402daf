"""`quantlens demo`: the main job on what ships with the package."""

import time
from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli import _common, _options
from quantlens.cli.study import means_table, tell_failures

HELP = """Quantize the embedded model at several precisions, evaluate it on embedded images, and write the report.

Nothing is downloaded. It takes about two minutes on two cores, can be stopped with Ctrl-C, and goes on where it was.
With --task detect the model is a detector of digits in photographs, and the report shows its boxes before and after.

[bold]Examples[/bold]

    quantlens demo

    quantlens demo --task detect

    quantlens demo --methods all --out all-methods

    quantlens demo --methods repq-vit --bits W8A8,W4A4 --seeds 0
"""


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the store and the report (default: quantlens-demo, with -detect of a detector)."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="[bold]classify[/bold] or [bold]detect[/bold].", metavar="TASK")
    ] = "classify",
    methods: Annotated[
        list[str] | None, typer.Option(help="Methods, with commas between, or [bold]all[/bold].", metavar="NAMES")
    ] = None,
    bits: Annotated[list[str] | None, typer.Option(help="Precisions, such as W8A8,W4A4.", metavar="BITS")] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="Seeds, such as 0,13,37.", metavar="SEEDS")] = None,
    scores: Annotated[list[str] | None, typer.Option(help="OOD scores (default: all).", metavar="NAMES")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the work (default: 2 where there are two cores).")
    ] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.report import demo as room
    from quantlens.studies.results import results
    from quantlens.studies.text import count, duration

    started, shown = time.monotonic(), room.demo_of(task)
    chosen = _common.whole_numbers(seeds, "--seeds") or shown.seeds
    out = out or Path("quantlens-demo" if task == "classify" else f"quantlens-demo-{task}")
    summary, report = room.run_demo(
        out,
        _common.names(methods) or None,
        _common.names(bits) or None,
        chosen,
        task=task,
        scores=_common.names(scores) or None,
        progress=not quiet,
        workers=workers,
    )
    means = results(out).means()
    title = f"{shown.model}: {len(means)} rows, mean ± standard deviation over {count(len(set(chosen)), 'seed')}"
    _common.console().print(means_table(means, title))
    print(f"{summary}, in {duration(time.monotonic() - started)} with the report")
    print(f"report: {report}")
    tell_failures(summary)
