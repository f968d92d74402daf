"""`quantlens quantize`: one model, one method, one packed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli import _options
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
    model: _options.ModelName,
    calibration: _options.CalibrationSource,
    weights: _options.Weights = None,
    n: _options.CalibrationCount = None,
    method: _options.MethodName = "quantlens-fast",
    bits: Annotated[
        str, typer.Option(help="W4A8 is 4-bit weights and 8-bit activations; MP6 or a file of `quantlens allocate`.")
    ] = "W8A8",
    runtime: Annotated[
        str | None,
        typer.Option("--target", help="Stay inside a runtime's integers: openvino-cpu, onnxruntime-cpu or tensorrt."),
    ] = None,
    seed: _options.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="The file to write (default: MODEL-BITS.safetensors).")] = None,
    option: _options.MethodOptions = None,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.evaluation.environment import choose_device

    settings = _common.settings(option)
    if runtime is not None:
        settings["target"] = runtime
    from quantlens.allocation import Allocation
    from quantlens.allocation import quantizing as api
    from quantlens.data import as_image_set, open_source
    from quantlens.methods import registry
    from quantlens.models import load_model
    from quantlens.qmodel import Bits

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
    seconds = quantized.provenance.seconds
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
