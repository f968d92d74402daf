"""`quantlens reproduce`: does a number come out again?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.files import check_writable

if TYPE_CHECKING:
    from quantlens.studies.reproduce import Metric, Reproduced

HELP = """Measure again what a row of a report or a result says, and say whether it agrees.

ROW is DIR:key=value,… (cells of a study; the keys are model, method, bits and seed), DIR (all of them), or FILE.json of
`evaluate --json`. On the same processor with the same versions every digit is the same. Otherwise a metric agrees
within one image, or within what noise of a millionth on the calibration images makes of it. Exit code 1: one does not.

[bold]Examples[/bold]

    quantlens reproduce quantlens-demo:method=repq-vit,bits=W4A4,seed=0

    quantlens reproduce result.json --weights deit_tiny.safetensors
"""


def reproduce(
    row: Annotated[str, typer.Argument(metavar="ROW", help="DIR:key=value,…, DIR or FILE.json.")],
    weights: Annotated[
        str | None, typer.Option(metavar="W", help="The model's checkpoint, instead of what the study says.")
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON; - is stdout.")
    ] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.studies.reproduce import reproduce as again

    if json != "-":
        check_writable(json)
    found = again(row, weights=weights, progress=not quiet)
    _common.show(_parts(found), [one.to_dict() for one in found], json, "what came out again")
    if not all(one.agrees for one in found):
        raise typer.Exit(1)


def _parts(found: list[Reproduced]) -> Iterator[Any]:
    """A table for every cell that is not identical, and a sentence for each."""
    numbers = ["kept", "now", "now − kept", "may differ by"]
    for one in found:
        if one.identical:
            yield f"{one.title}: identical, {len(one.metrics)} metrics"
            continue
        rows = [_row(metric) for metric in one.metrics if metric.now != metric.kept]
        yield _common.table(["metric", *numbers, "agrees"], rows, right=numbers, title=one.title)
        yield f"{one.title}: {'agrees' if one.agrees else 'does not agree'}"
        yield from (f"  {text}" for text in one.differs)


def _row(metric: Metric) -> list[str]:
    from quantlens.evaluation.result import title_of
    from quantlens.metrics import metric_of

    text = metric_of(metric.path).text
    values = [text(metric.kept), text(metric.now), text(metric.now - metric.kept, "+"), text(metric.tolerance)]
    return [title_of(metric.path), *values, "yes" if metric.agrees else "no"]
