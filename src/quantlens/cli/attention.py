"""`quantlens attention`: what a model looks at, before and after quantization, in pictures and in numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

HELP = """Compare what a model looks at in FP32 and quantized: attention rollout or class activation maps, norms of the
patch tokens, and the drift of attention in numbers.

Written to the directory --out: [bold]maps.png[/bold] (images in rows, precisions in columns, each with its predicted
class and probability), [bold]norms.png[/bold] (norms of the patch tokens after the last block),
[bold]maps.npz[/bold] (the maps and norms of every image as arrays), [bold]drift.json[/bold] (every metric, on ID and
every OOD set, per block and head) and [bold]drift.svg[/bold].

MODEL is a name as for `quantize`, or a quantized checkpoint (.safetensors) whose FP32 checkpoint --weights names.

[bold]Examples[/bold]

    quantlens attention digits-vit --images embedded:digits-test \\
      --calibration embedded:digits-calibration --out maps

    quantlens attention deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --images imagenet:val --ood dtd=images:dtd/images \\
      --calibration imagenet:train --bits W8A8,W6A6,W4A4 --out maps

    quantlens attention digits-vit-w4a4.safetensors --weights pretrained \\
      --images embedded:digits-test --map grad-cam --target 3 --out maps
"""

BITS = "W8A8,W6A6,W4A4"

ModelOrCheckpoint = Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model, or a quantized checkpoint.")]
Images = Annotated[str, typer.Option(metavar="SOURCE", help="In-distribution images (`quantlens sources`).")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Directory of what is written.")]
Ood = Annotated[
    list[str] | None, typer.Option(metavar="NAME=SOURCE", help="An out-of-distribution set; may be repeated.")
]
Widths = Annotated[str | None, typer.Option(metavar="BITS", help=f"Precisions, separated by commas (default: {BITS}).")]
CalibrationImages = Annotated[str | None, typer.Option(metavar="SOURCE", help="Calibration images.")]
Map = Annotated[str, typer.Option(help="[bold]rollout[/bold], grad-cam, hires-cam or gradient-rollout.")]
Discard = Annotated[float, typer.Option(help="Share of the entries that rollout discards.")]
Fusion = Annotated[str, typer.Option(help="How rollout fuses heads: [bold]max[/bold], mean or min.")]
Compat = Annotated[
    str | None, typer.Option(help="[bold]vit-explain[/bold]: rollout as that code does it; reproduces its bugs.")
]
Target = Annotated[
    int | None, typer.Option(min=0, metavar="CLASS", help="Class of gradient maps (default: FP32's prediction).")
]
Limit = Annotated[int, typer.Option(min=1, help="Images of each set that are measured, evenly spaced.")]
Show = Annotated[int, typer.Option(min=1, max=64, help="Images of each set in the pictures.")]
Choose = Annotated[
    str, typer.Option(help="Images to show: the [bold]first[/bold], or the most-changed at the last precision.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "attention", HELP, attention)


def attention(
    model: ModelOrCheckpoint,
    images: Images,
    out: Out,
    weights: _options.Weights = None,
    ood: Ood = None,
    bits: Widths = None,
    method: _options.MethodName = "repq-vit",
    calibration: CalibrationImages = None,
    n: _options.CalibrationCount = None,
    map: Map = "rollout",
    discard: Discard = 0.9,
    fusion: Fusion = "max",
    compat: Compat = None,
    target: Target = None,
    limit: Limit = 64,
    show: Show = 8,
    choose: Choose = "first",
    seed: _options.Seed = 0,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
    *,
    settings: dict[str, Any],
) -> None:
    """See HELP."""
    from quantlens.attention.comparison import check_choice, check_names, compare
    from quantlens.attention.maps import MapSettings
    from quantlens.cli import _common
    from quantlens.data import as_image_set
    from quantlens.evaluation.environment import choose_device
    from quantlens.evaluation.open_models import open_models
    from quantlens.files import check_writable

    check_writable(out / "drift.json")
    sets = _common.pairs(ood, "--ood", "NAME=SOURCE")
    maps = MapSettings(map, target, discard, fusion, compat)
    check_choice(choose)
    check_names(sets)
    reading: dict[str, Any] = {"cache_dir": _common.cache_argument(no_cache), "skip_bad": skip_bad}
    with _common.stages(quiet) as step:
        if model.endswith(".safetensors"):
            quantized, reference = _checkpoint(model, weights, choose_device(device), {bits, calibration})
        else:
            widths, source = _widths(bits, method, settings), _calibration(calibration, n, seed)
            reference, _ = open_models(model, weights, choose_device(device))
            told = partial(step, "decoding calibration images")
            learnt = as_image_set(source, reference.preprocess, progress=told, **reading)
            quantized = _quantized(reference, learnt, widths, method, seed, settings, step)
        found = compare(reference, quantized, images, ood=sets, map=maps, limit=limit, progress=step, **reading)
        written = [*found.save(out, show=show, choose=choose), *_chart(found, out)]
    for name in found.sets:
        _common.stdout().print(_table(name, found))
    if found.unavailable:
        _common.say(f"no norms and no drift of attention: {found.unavailable}")
    _common.say(f"written: {', '.join(str(path) for path in written)}")


def _checkpoint(name: str, weights: str | None, device: str, given: set[str | None]) -> tuple[Any, Any]:
    """(quantized model, FP32 model it was made from). given: options that are for models by name only."""
    from quantlens.errors import QuantlensError
    from quantlens.evaluation.open_models import open_models

    if given != {None}:
        raise QuantlensError(f"{name} is quantized already; leave --bits and --calibration out")
    if weights is None:
        raise QuantlensError(f"drift is measured from FP32: name the checkpoint that {name} was made from, --weights W")
    quantized, reference = open_models(name, weights, device)
    return quantized.to(device), reference


def _widths(bits: str | None, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Label -> precision. Raises QuantlensError for bits, a method or options that do not exist."""
    from quantlens.api import read_bits, spelled
    from quantlens.cli import _common
    from quantlens.methods import registry

    read = [read_bits(text) for text in _common.names([bits or BITS]) or ()]
    registry.get(method).options(options)
    return {spelled(w): w for w in read}


def _calibration(source: str | None, n: int | None, seed: int) -> Any:
    """The calibration images, not decoded yet."""
    from quantlens.data.sources import open_calibration
    from quantlens.errors import QuantlensError

    if source is None:
        raise QuantlensError("quantizing takes calibration images: give --calibration SOURCE (`quantlens sources`)")
    return open_calibration(source, n, seed)


def _quantized(
    reference: Any, images: Any, widths: dict[str, Any], method: str, seed: int, options: dict[str, Any], step: Any
) -> dict[str, Any]:
    """Label -> quantized model."""
    from quantlens.api import quantize

    return {
        label: quantize(
            reference,
            images,
            method=method,
            bits=bits,
            seed=seed,
            progress=partial(step, f"calibrating {label} by {method}"),
            **options,
        )
        for label, bits in widths.items()
    }


def _chart(found: Any, folder: Path) -> list[Path]:
    """The drift curves, where there are any."""
    from quantlens.plots.precisions import write_drift

    if found.unavailable:
        return []
    title = f"{found.model}, {found.method}: drift of attention from FP32"
    return [write_drift(title, found.drift(), folder / "drift.svg")]


def _table(name: str, found: Any) -> Any:
    """The drift of one set as a rich table; names are shown as they are written."""
    from rich.table import Table
    from rich.text import Text

    from quantlens.attention.metrics import columns_of
    from quantlens.metrics import METRICS

    drifts = {label: by_set[name] for label, by_set in found.drift().items()}
    first = next(iter(drifts.values()))
    table = Table(title=Text(f"Drift from FP32 on {name}, {first['n']} images"), title_justify="left")
    table.add_column("bits")
    shown = columns_of(first)
    for metric in shown:
        table.add_column(METRICS[metric].heading, justify="right", overflow="fold")
    for bits, summary in drifts.items():
        table.add_row(Text(bits), *(METRICS[metric].text(summary[metric]) for metric in shown))
    if "outliers_fp32" in first:
        table.caption = Text(
            f"FP32: {first['outliers_fp32']:.2f} outlier tokens per image, all blocks together; "
            f"{first['large_tokens_fp32']:.2f} are large (1.5 times the lower quartile)"
        )
        table.caption_justify = "left"
    return table
