"""`quantlens inspect`: the sensitivity of every layer."""

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.errors import QuantlensError
from quantlens.files import check_writable

HELP = """Measure the sensitivity of every layer: quantize every site and every block alone, rank them by what that does
to the output, and show the statistics of their weights and activations.

Ranked by the noise of the logits (SQNR, low hurts), by the KL divergence of the classes ([bold]--rank kl[/bold]) or,
of a detector, by the IoU of its boxes with those of the float model ([bold]--rank iou[/bold]). Range ratio, kurtosis,
token norms, dead channels and outlier channels say why.

[bold]Examples[/bold]

    quantlens inspect digits-vit --bits W4A4

    quantlens inspect deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --images imagenet:train --n 32 --html layers.html --json layers.json

    quantlens inspect digits-vit --bits W4A4 --method repq-vit --by edge --all
"""


def inspect(
    model: _options.ModelName,
    images: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Images to measure on (default: a shipped model's calibration images)."),
    ] = None,
    weights: _options.Weights = None,
    input_size: _options.InputSize = None,
    letterbox: _options.Letterbox = False,
    n: Annotated[int | None, typer.Option("--n", min=1, help="How many images the seed draws (default: 32).")] = None,
    bits: Annotated[str, typer.Option(help="W4A8 is 4-bit weights and 8-bit activations.")] = "W8A8",
    method: Annotated[str, typer.Option(help="Whose quantizers; a method that sets ranges only.")] = "minmax",
    by: Annotated[
        str, typer.Option(metavar="NAMES", help="What is quantized alone: site, block, edge.")
    ] = "site,block",
    rank: Annotated[
        str | None, typer.Option(help="Rank by [bold]sqnr[/bold], kl or, of detectors, iou (their default).")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of each table.")] = 10,
    everything: Annotated[bool, typer.Option("--all", help="All rows.")] = False,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write every metric as JSON; - is stdout.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the images, and all else that is random.")] = 0,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
    *,
    settings: dict[str, Any],
) -> None:
    """See HELP."""
    from quantlens import api
    from quantlens.report.inspection import write_inspection
    from quantlens.sensitivity.inspection import check_names

    check_writable(None if json == "-" else json)
    check_writable(html)
    parts = _common.names([by])
    check_names(parts, rank or "sqnr")
    widths, source = api.read_bits(bits), images or _shipped_images(model)
    with _common.stages(quiet) as step:
        reading = {"letterbox": letterbox, **_common.reading(skip_bad, no_cache)}
        loaded, opened = _common.open_run(step, model, weights, device, source, n, seed, input_size, **reading)
        found = api.inspect(loaded, opened, widths, method=method, seed=seed, by=parts, progress=step, **settings)
    if json == "-":
        print(dumps(found.to_dict(), indent=1, allow_nan=False))
    else:
        _show(found, rank, None if everything else top)
    written = [found.save(json)] if json not in (None, "-") else []
    written += [write_inspection(found, html, rank)] if html is not None else []
    if json != "-":
        print("".join(f"written: {file}\n" for file in written), end="")


def _shipped_images(model: str) -> str:
    """The calibration images that ship with a model of the zoo. Raises QuantlensError for another model."""
    from quantlens import zoo

    if model.endswith(".safetensors"):
        raise QuantlensError(f"{model}: the float model is inspected; name it and give its checkpoint as --weights")
    entry = zoo.available().get(model)
    if entry is None:
        raise QuantlensError(f"{model} ships without images: give --images SOURCE (`quantlens sources`)")
    return entry.sources.calibration


def _show(found: Any, rank: str | None, top: int | None) -> None:
    """The ranked tables on the terminal, ``top`` rows of each, or all."""
    from quantlens.report import inspection

    for by in found.parts:
        ranked = found.ranked(by, rank)
        rows = inspection.table_rows(ranked[:top], by)
        size = f"all {len(ranked)}" if len(rows) == len(ranked) else f"{len(rows)} of {len(ranked)}"
        heads = list(inspection.columns(by, ranked))
        numbers = heads[1:] if by == "block" else heads[1:-1]
        print(f"{found.model} {found.bits}, {by}s {inspection.order(found, rank)}: {size}")
        table = _common.table(heads, rows, right=numbers, whole=heads[:1], box=None, pad_edge=False)
        _common.console().print(table)
        print()
    print(inspection.explanation(found))
    print(f"statistics in {found.seconds['statistics']:.1f} s, parts alone in {found.seconds['alone']:.1f} s")
