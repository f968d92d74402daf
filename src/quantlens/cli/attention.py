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
class and probability), [bold]norms.png[/bold] (norms of the patch tokens behind the last block),
[bold]drift.json[/bold] (every figure, on ID and every OOD set, per block and head) and [bold]drift.svg[/bold].

MODEL is a name as for `quantize`, or a quantized checkpoint (.safetensors) whose FP32 checkpoint --weights names.

[bold]Examples[/bold]

    quantlens attention digits-vit --images embedded:digits-test \\
      --calibration embedded:digits-calibration --out looks

    quantlens attention deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
      --images imagenet:val --ood dtd=images:dtd/images \\
      --calibration imagenet:train --bits W8A8,W6A6,W4A4 --out looks

    quantlens attention digits-vit-w4a4.safetensors --weights pretrained \\
      --images embedded:digits-test --map grad-cam --target 3 --out looks
"""

BITS = "W8A8,W6A6,W4A4"
MEASURED = (
    *("rollout_spearman", "rollout_overlap", "row_cosine", "row_kl", "centre_movement", "outliers", "outlier_overlap"),
    *("prediction_changed", "output_kl"),
)
OF_MAPS = ("map_spearman", "map_overlap", "map_movement")
"""Of maps other than rollout, in place of these:"""
OF_ROLLOUT = ("rollout_spearman", "rollout_overlap", "centre_movement")


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "attention", HELP, attention)


def attention(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model, or a quantized checkpoint.")],
    images: Annotated[str, typer.Option(metavar="SOURCE", help="In-distribution images (`quantlens sources`).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of what is written.")],
    weights: _options.Weights = None,
    ood: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SOURCE", help="An out-of-distribution set; may be repeated.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="BITS", help=f"Precisions, separated by commas (default: {BITS}).")
    ] = None,
    method: _options.MethodName = "repq-vit",
    calibration: Annotated[str | None, typer.Option(metavar="SOURCE", help="Calibration images.")] = None,
    n: _options.CalibrationCount = None,
    map: Annotated[
        str, typer.Option(help="[bold]rollout[/bold], grad-cam, hires-cam or gradient-rollout.")
    ] = "rollout",
    discard: Annotated[float, typer.Option(help="Share of the entries that rollout discards.")] = 0.9,
    fusion: Annotated[str, typer.Option(help="How rollout fuses heads: [bold]max[/bold], mean or min.")] = "max",
    compat: Annotated[
        str | None, typer.Option(help="[bold]vit-explain[/bold]: rollout as that code does it, slips included.")
    ] = None,
    target: Annotated[
        int | None, typer.Option(min=0, metavar="CLASS", help="Class of gradient maps (default: FP32's prediction).")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images of each set that are measured, evenly spaced.")] = 64,
    show: Annotated[int, typer.Option(min=1, max=64, help="Images of each set in the pictures.")] = 8,
    choose: Annotated[
        str, typer.Option(help="Which: the [bold]first[/bold], or the most-changed at the last precision.")
    ] = "first",
    option: _options.MethodOptions = None,
    seed: _options.Seed = 0,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.errors import QuantlensError, UnknownNameError
    from quantlens.evaluation.environment import choose_device

    if choose not in ("first", "most-changed"):
        raise UnknownNameError("choice of images", choose, ("first", "most-changed"))
    sets = _common.pairs(ood, "--ood", "NAME=SOURCE")
    if "ID" in sets:
        raise QuantlensError("--ood 'ID': that is the name of the in-distribution images; call the set something else")
    settings, place = _common.settings(option), choose_device(device)
    from quantlens.attention import lookup
    from quantlens.cli.look import Look
    from quantlens.data import as_image_set

    if map not in lookup.MAPS:
        raise UnknownNameError("map", map, lookup.MAPS)
    rollout = {"discard": discard, "fusion": fusion, "compat": compat}
    with _common.stages(quiet) as step:
        reference, models = _models(
            model, weights, bits, method, calibration, n, seed, settings, place, skip_bad, no_cache, step
        )
        look = Look(reference, models, map, rollout, target)
        opened = {
            name: as_image_set(
                source,
                reference.preprocess,
                cache_dir=_common.cache_argument(no_cache),
                skip_bad=skip_bad,
                progress=partial(step, f"decoding {name}"),
            )
            for name, source in {"ID": images, **sets}.items()
        }
        for name, image_set in opened.items():
            look.measure(name, image_set, limit, partial(step, f"looking at {name}"))
        written = look.write(out, show, choose == "most-changed")
    console = _common.stdout()
    for name in opened:
        console.print(_table(name, look))
    if look.refused:
        _common.say(f"no norms and no drift of attention: {look.refused}")
    _common.say(f"written: {', '.join(str(path) for path in written)}")


def _models(
    name: str,
    weights: str | None,
    bits: str | None,
    method: str,
    calibration: str | None,
    n: int | None,
    seed: int,
    settings: dict[str, Any],
    device: str,
    skip_bad: bool,
    no_cache: bool,
    step: Any,
) -> tuple[Any, dict[str, Any]]:
    """(FP32 model, label -> quantized model)."""
    from quantlens.allocation import Allocation
    from quantlens.allocation import quantizing as api
    from quantlens.cli import _common, evaluate, quantize
    from quantlens.data import as_image_set, open_source
    from quantlens.errors import QuantlensError
    from quantlens.methods import registry

    if name.endswith(".safetensors"):
        if bits is not None or calibration is not None:
            raise QuantlensError(f"{name} is quantized already; leave --bits and --calibration out")
        if weights is None:
            raise QuantlensError(
                f"drift is measured from FP32: name the checkpoint that {name} was made from, --weights W"
            )
        quantized, reference = evaluate.models(name, weights, device)
        return reference, {str(quantized.bits): quantized.to(device)}
    if calibration is None:
        raise QuantlensError("quantizing takes calibration images: give --calibration SOURCE (`quantlens sources`)")
    wanted = {}
    for text in _common.names([bits or BITS]) or ():
        read = api.read_bits(text)
        wanted[str(read.bits() if isinstance(read, Allocation) else read)] = read
    registry.get(method).options(settings)
    source = open_source(quantize.drawn(calibration, n, seed))
    reference, _ = evaluate.models(name, weights, device)
    learnt = as_image_set(
        source,
        reference.preprocess,
        cache_dir=_common.cache_argument(no_cache),
        skip_bad=skip_bad,
        progress=partial(step, "decoding calibration images"),
    )
    models = {}
    for label, precision in wanted.items():
        models[label] = api.quantize(
            reference,
            learnt,
            method=method,
            bits=precision,
            seed=seed,
            progress=partial(step, f"calibrating {label} by {method}"),
            **settings,
        )
    return reference, models


def _table(name: str, look: Any) -> Any:
    """The drift of one set as a rich table."""
    from rich.table import Table

    from quantlens.metrics import METRICS

    drifts = look.summaries[name]
    first = next(iter(drifts.values()))
    table = Table(title=f"Drift from FP32 on {name}, {first['n']} images", title_justify="left")
    table.add_column("bits")
    other = [name for name in OF_MAPS if name in first]
    shown = [name for name in MEASURED if name in first and not (other and name in OF_ROLLOUT)] + other
    for name in shown:
        table.add_column(METRICS[name].heading, justify="right")
    for bits, summary in drifts.items():
        table.add_row(bits, *(METRICS[name].text(summary[name]) for name in shown))
    if "outliers_fp32" in first:
        table.caption = f"FP32: {first['outliers_fp32']:.2f} outlier tokens per image, all blocks together"
        table.caption_justify = "left"
    return table
