"""`quantlens compare`: what changed between two models, methods or studies, and whether that is significant."""

from __future__ import annotations

from typing import Annotated

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

HELP = """Compare two studies, two parts of a study, or two models, metric by metric, with intervals.

A and B are each DIR (the store of a study), DIR:key=value,… (cells of it; the keys are model, method, bits and seed,
and a key given twice takes either), FILE.npz of `evaluate --keep`, or FILE.json of `evaluate --json` (which has no
per-image outputs, so that only differences are shown).

Cells pair by model, method, bits and seed, but for what each side has one value of only, which is what is compared.
FP32 alone on one side pairs with every cell of its model. The interval is a paired bootstrap over the images, the same
for both, and over seeds: a difference whose interval holds 0 is no finding. `docs/compare.md` says how.

[bold]Examples[/bold]

    quantlens compare results:method=repq-vit,bits=W4A4 results:method=minmax,bits=W4A4

    quantlens compare results:bits=FP32 results:method=repq-vit

    quantlens compare before after --scores all --json changes.json

    quantlens compare one.npz other.npz
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "compare", HELP, compare)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="DIR, DIR:key=value,…, FILE.npz or FILE.json.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; differences are B less A.")],
    scores: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="OOD scores, or all (default: msp, or the first kept).")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the comparison as JSON; - is stdout.")
    ] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    import json as standard
    from pathlib import Path

    from quantlens.cli import _common
    from quantlens.cli._tables import comparison_tables
    from quantlens.files import write_whole
    from quantlens.studies.compare import compare as measure

    with _common.stages(quiet) as step:
        found = measure(a, b, scores=_common.names(scores), resamples=resamples, seed=seed, progress=step)
    text = standard.dumps(found.to_dict(), indent=1, allow_nan=False)
    if json == "-":
        print(text)
        return
    console = _common.stdout()
    for part in comparison_tables(found):
        console.print(part)
    if json is not None:
        write_whole(Path(json), text + "\n", what="the comparison")
        _common.say(f"written: {json}")
