"""`quantlens attention`: what a model looks at, before and after quantization, in pictures and in numbers."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.errors import QuantlensError
from quantlens.files import check_writable

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
DRIFT = "drift of attention from FP32"


def attention(
    model: _options.ModelOrCheckpoint,
    images: Annotated[str, typer.Option(metavar="SOURCE", help="In-distribution images (`quantlens sources`).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of what is written.")],
    weights: _options.Weights = None,
    input_size: _options.InputSize = None,
    ood: _options.OodSets = None,
    bits: Annotated[
        str | None, typer.Option(metavar="BITS", help=f"Precisions, separated by commas (default: {BITS}).")
    ] = None,
    method: _options.MethodName = "repq-vit",
    calibration: Annotated[str | None, typer.Option(metavar="SOURCE", help="Calibration images.")] = None,
    n: _options.CalibrationCount = None,
    map: Annotated[str, typer.Option(help="[bold]rollout[/bold], grad-cam, hires-cam, gradient-rollout.")] = "rollout",
    discard: Annotated[float, typer.Option(help="Share of the entries that rollout discards.")] = 0.9,
    fusion: Annotated[str, typer.Option(help="How rollout fuses heads: [bold]max[/bold], mean or min.")] = "max",
    compat: Annotated[
        str | None, typer.Option(help="[bold]vit-explain[/bold]: rollout as that code does it; reproduces its bugs.")
    ] = None,
    target: Annotated[
        int | None, typer.Option(min=0, metavar="CLASS", help="Class of gradient maps (default: FP32's prediction).")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images of each set that are measured, evenly spaced.")] = 64,
    show: Annotated[int, typer.Option(min=1, max=64, help="Images of each set in the pictures.")] = 8,
    choose: Annotated[
        str, typer.Option(help="Images shown: [bold]first[/bold], or most-changed (last bits).")
    ] = "first",
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
    from quantlens.attention.maps import MapSettings, check_kind
    from quantlens.evaluation.open_models import checkpoint_of, open_models
    from quantlens.plots.precisions import write_drift

    check_writable(out / "drift.json")
    sets, read = _common.pairs(ood, "--ood"), _common.reading(skip_bad, no_cache)
    maps = MapSettings(map, target, discard, fusion, compat)
    check_choice(choose)
    check_names(sets)
    _check(model, checkpoint_of(model) is not None, weights, bits, calibration)
    with _common.stages(quiet) as step:
        if calibration is None:
            quantized, reference = open_models(model, weights, device)
        else:
            reference, seen = _common.open_run(step, model, weights, device, calibration, n, seed, input_size, **read)
            check_kind(map, reference)  # a mistake there is told before anything is quantized
            quantized = _quantized(reference, seen, bits or BITS, step, method=method, seed=seed, **settings)
        found = compare(reference, quantized, images, ood=sets, map=maps, limit=limit, progress=step, **read)
        written = found.save(out, show=show, choose=choose)
        if not found.unavailable:
            written.append(write_drift(f"{found.model}, {found.method}: {DRIFT}", found.drift(), out / "drift.svg"))
    _show(found)
    print(f"written: {', '.join(str(path) for path in written)}")


def _check(model: str, checkpoint: bool, weights: str | None, bits: str | None, calibration: str | None) -> None:
    """Raises QuantlensError where a checkpoint is to be quantized again or has no FP32 model, and where a model by its
    name has no calibration images."""
    if checkpoint and (bits or calibration):
        raise QuantlensError(f"{model} is quantized already; leave --bits and --calibration out")
    if checkpoint and weights is None:
        raise QuantlensError(f"drift is measured from FP32: name the checkpoint {model} was made from, --weights W")
    if not checkpoint and calibration is None:
        raise QuantlensError(
            "quantizing takes calibration images: give --calibration SOURCE (`quantlens sources`), or none: made ones"
        )


def _quantized(reference: Any, images: Any, bits: str, step: Any, **how: Any) -> dict[str, Any]:
    """Label -> quantized model, of precisions separated by commas."""
    from quantlens import api

    widths = {api.spelled(read): read for read in map(api.read_bits, _common.names([bits]))}
    return {
        label: api.quantize(reference, images, bits=read, progress=partial(step, f"calibrating {label}"), **how)
        for label, read in widths.items()
    }


def _show(found: Any) -> None:
    """The drift of every set as a table."""
    from quantlens.attention.metrics import columns_of
    from quantlens.metrics import METRICS

    for name in found.sets:
        drifts = {label: by_set[name] for label, by_set in found.drift().items()}
        first = next(iter(drifts.values()))
        metrics = [METRICS[metric] for metric in columns_of(first)]
        heads = [metric.heading for metric in metrics]
        rows = [[bits, *(metric.text(drift[metric.name]) for metric in metrics)] for bits, drift in drifts.items()]
        caption = None
        if "outliers_fp32" in first:
            caption = (
                f"FP32: {first['outliers_fp32']:.2f} outlier tokens per image, all blocks together; "
                f"{first['large_tokens_fp32']:.2f} are large (1.5 times the lower quartile)"
            )
        title = f"Drift from FP32 on {name}, {first['n']} images"
        _common.console().print(_common.table(["bits", *heads], rows, right=heads, title=title, caption=caption))
    if found.unavailable:
        print(f"no norms and no drift of attention: {found.unavailable}")
