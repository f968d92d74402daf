"""`quantlens demo`: the main job on what ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

HELP = """Quantize the embedded model at several precisions, evaluate it on embedded images, and write the report.

Nothing is downloaded. It takes about two minutes on two cores, can be stopped with Ctrl-C, and goes on where it was.

[bold]Examples[/bold]

    quantlens demo

    quantlens demo --methods all --out all-methods

    quantlens demo --methods repq-vit --bits W8A8,W4A4 --seeds 0
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "demo", HELP, demo)


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the store and the report.")] = Path("quantlens-demo"),
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
    from quantlens.cli import _common
    from quantlens.cli._tables import means_table
    from quantlens.report import demo as room
    from quantlens.studies.progress import duration

    chosen = _common.names(methods)
    found = room.run_demo(
        out,
        tuple(chosen) if chosen else room.METHODS,
        tuple(_common.names(bits) or room.BITS),
        tuple(_common.whole_numbers(seeds, "--seeds") or room.SEEDS),
        scores=_common.names(scores),
        progress=not quiet,
        workers=workers,
    )
    _common.stdout().print(means_table(found.means, found.title))
    _common.say(f"{found.summary}, in {duration(found.seconds)} with the report")
    _common.say(f"report: {found.report}")
    if found.summary.failed:
        from quantlens.cli.study import tell_failures

        tell_failures(found.summary)
        raise typer.Exit(1)
