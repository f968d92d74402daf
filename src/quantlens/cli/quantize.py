"""`quantlens quantize`: one model, one method, one packed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli._common import command

HELP = """Quantize a model after training and save it packed: integer codes at their bit width, scales, and a header.

MODEL is a timm name (`quantlens models` lists them) or a model that ships with quantlens.

[bold]Examples[/bold]

    quantlens quantize digits-vit --bits W4A4 \\
      --calibration embedded:digits-calibration

    quantlens quantize deit_tiny_patch16_224 \\
      --weights deit_tiny.safetensors --calibration imagenet:train --n 32 \\
      --method repq-vit --bits W4A4 --out deit_tiny-w4a4.safetensors

    quantlens quantize digits-vit --method percentile \\
      --option p=0.999 --calibration embedded:digits-calibration

    quantlens quantize digits-vit --method easyquant --bits MP6 \\
      --calibration embedded:digits-calibration
"""

DEFAULT_IMAGES = 32


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "quantize", HELP, quantize)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")],
    calibration: Annotated[str, typer.Option(metavar="SOURCE", help="Calibration images (`quantlens sources`).")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W", help="A checkpoint file, [bold]pretrained[/bold] (the default) or random."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="How many calibration images the seed draws (default: 32).")
    ] = None,
    method: Annotated[str, typer.Option(help="The method (`quantlens methods`).")] = "repq-vit",
    bits: Annotated[
        str, typer.Option(help="W4A8 is 4-bit weights and 8-bit activations; MP6 or a file of `quantlens allocate`.")
    ] = "W8A8",
    runtime: Annotated[
        str | None,
        typer.Option("--target", help="Stay inside a runtime's integers: openvino-cpu, onnxruntime-cpu or tensorrt."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the calibration images, and all else that is random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The file to write (default: MODEL-BITS.safetensors).")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the method.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do not keep decoded images on disk.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.studies.environment import choose_device

    settings = _common.settings(option)
    if runtime is not None:
        settings["target"] = runtime
    from quantlens import api
    from quantlens.allocation import Allocation
    from quantlens.data import as_image_set, open_source
    from quantlens.methods import registry
    from quantlens.models import load_model
    from quantlens.quantizers import Bits

    wanted = api.read_bits(bits)
    spelled = str(wanted.bits() if isinstance(wanted, Allocation) else wanted)
    registry.get(method).options(settings)
    source = open_source(drawn(calibration, n, seed))
    target = out or Path(f"{model.split('/')[-1]}-{spelled.lower()}.safetensors")
    with _common.stages(quiet) as step:
        loaded = load_model(model, _common.weights_argument(weights), device=choose_device(device))
        images = as_image_set(
            source,
            loaded.preprocess,
            cache_dir=_common.cache_argument(no_cache),
            skip_bad=skip_bad,
            progress=lambda done, total: step("decoding calibration images", done, total),
        )
        if not isinstance(wanted, Bits):
            wanted = api.allocation_of(
                loaded,
                images,
                wanted,
                seed,
                progress=lambda done, total: step("choosing widths", done, total),
            )
        quantized = api.quantize(
            loaded,
            images,
            method=method,
            bits=wanted,
            seed=seed,
            progress=lambda done, total: step(f"calibrating by {method}", done, total),
            **settings,
        )
        quantized.save(target)
    seconds = quantized.plan.info.get("seconds")
    took = "" if seconds is None else f", calibrated in {seconds:.1f} s on {len(images)} images"
    ratio = f"{quantized.size_mb:.2f} MB, {quantized.size_ratio:.3f} of FP32"
    _common.say(f"{target}: {quantized.name} {quantized.method} {quantized.bits}, {ratio}{took}")


def drawn(source: str, n: int | None, seed: int) -> str:
    """The SOURCE of the calibration images: `n` drawn by the seed, unless the source itself says how many."""
    from quantlens.data.sources import parse_spec, with_sample
    from quantlens.errors import QuantlensError

    spec = parse_spec(source)
    if spec.sample is None:
        return with_sample(source, n or DEFAULT_IMAGES, seed)
    if n is not None and n != spec.sample:
        raise QuantlensError(f"--n {n} and {source!r} ask for different numbers of images; leave one of them out")
    return source
