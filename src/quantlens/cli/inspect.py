"""`quantlens inspect`: the sensitivity of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

HELP = """Measure the sensitivity of every layer: quantize every site and every block alone, rank them by what that does
to the output, and show the statistics of their weights and activations.

Ranked by the noise of the logits (SQNR, low hurts) or, with [bold]--rank kl[/bold], by the KL divergence of the
classes. Range ratio, kurtosis, token norms, dead channels and outlier channels say why.

[bold]Examples[/bold]

    quantlens inspect digits-vit --bits W4A4

    quantlens inspect deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --images imagenet:train --n 32 --html layers.html --json layers.json

    quantlens inspect digits-vit --bits W4A4 --method repq-vit --by edge --all
"""

Images = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Images to measure on (default: a shipped model's calibration images)."),
]
Count = Annotated[int | None, typer.Option("--n", min=1, help="How many images the seed draws (default: 32).")]
Widths = Annotated[str, typer.Option(help="W4A8 is 4-bit weights and 8-bit activations.")]
Method = Annotated[str, typer.Option(help="Whose quantizers; a method that sets ranges only.")]
By = Annotated[str, typer.Option(metavar="NAMES", help="What is quantized alone: site, block, edge.")]
Rank = Annotated[str, typer.Option(help="Rank by [bold]sqnr[/bold] or kl.")]
Top = Annotated[int, typer.Option(min=1, metavar="N", help="Rows of each table.")]
Everything = Annotated[bool, typer.Option("--all", help="All rows.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every metric as JSON.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page.")]
Seed = Annotated[int, typer.Option(min=0, help="Draws the images, and all else that is random.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "inspect", HELP, inspect)


def inspect(
    model: _options.ModelName,
    images: Images = None,
    weights: _options.Weights = None,
    n: Count = None,
    bits: Widths = "W8A8",
    method: Method = "minmax",
    by: By = "site,block",
    rank: Rank = "sqnr",
    top: Top = 10,
    everything: Everything = False,
    json: Json = None,
    html: Html = None,
    seed: Seed = 0,
    option: _options.MethodOptions = None,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.allocation import quantizing as api
    from quantlens.cli import _common
    from quantlens.data.sources import open_calibration
    from quantlens.files import check_writable
    from quantlens.methods import registry
    from quantlens.sensitivity.inspection import check_names

    check_writable(json)
    check_writable(html)
    settings, parts = _common.settings(option), _common.names([by]) or []
    check_names(parts, rank)
    registry.get(method).options(settings)
    widths = api.read_bits(bits)
    source = open_calibration(images or _shipped_images(model), n, seed)
    opening: dict[str, Any] = {"skip_bad": skip_bad, "no_cache": no_cache, "what": "images"}
    with _common.stages(quiet) as step:
        loaded, opened = _common.open_run(model, weights, source, device, step, **opening)
        found = api.inspect(loaded, opened, widths, method=method, seed=seed, by=parts, progress=step, **settings)
    _show(found, rank, None if everything else top)
    if json is not None:
        _common.say(f"written: {found.save(json)}")
    if html is not None:
        from quantlens.report.inspection import write_inspection

        _common.say(f"written: {write_inspection(found, html, rank)}")


def _shipped_images(model: str) -> str:
    """The calibration images that ship with a model of the zoo. Raises QuantlensError for another model."""
    from quantlens import zoo
    from quantlens.errors import QuantlensError

    if model.endswith(".safetensors"):
        raise QuantlensError(f"{model}: the float model is inspected; name it and give its checkpoint as --weights")
    entry = zoo.available().get(model)
    if entry is None:
        raise QuantlensError(f"{model} ships without images: give --images SOURCE (`quantlens sources`)")
    return entry.sources.calibration


def _show(found: Any, rank: str, top: int | None) -> None:
    """The ranked tables on the terminal, ``top`` rows of each, or all."""
    from rich.table import Table

    from quantlens.cli import _common
    from quantlens.report import inspection

    console = _common.stdout()
    for by in found.parts:
        ranked = found.ranked(by, rank)
        shown = ranked[:top]
        size = f"all {len(ranked)}" if len(shown) == len(ranked) else f"{len(shown)} of {len(ranked)}"
        table = Table(box=None, pad_edge=False)
        titles = inspection.columns(by)
        for i, name in enumerate(titles):
            text = i == 0 or (by != "block" and i == len(titles) - 1)
            table.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=i == 0)
        for row in inspection.table_rows(shown, by):
            table.add_row(*row)
        _common.say(f"{found.model} {found.bits}, {by}s {inspection.RANKED[rank]}: {size}")
        console.print(table, markup=False)
        _common.say("")
    _common.say(inspection.explanation(found))
    _common.say(f"statistics in {found.seconds['statistics']:.1f} s, parts alone in {found.seconds['alone']:.1f} s")
