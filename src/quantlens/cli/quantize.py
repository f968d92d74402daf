"""`quantlens quantize`: one model, one method, one packed checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

if TYPE_CHECKING:
    from quantlens.qmodel import QuantizedModel

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

Widths = Annotated[
    str, typer.Option(help="W4A8 is 4-bit weights and 8-bit activations; MP6 or a file of `quantlens allocate`.")
]
Runtime = Annotated[
    str | None,
    typer.Option("--target", help="Stay inside a runtime's integers: openvino-cpu, onnxruntime-cpu or tensorrt."),
]
Out = Annotated[Path | None, typer.Option(help="The file to write (default: MODEL-BITS.safetensors).")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "quantize", HELP, quantize)


def quantize(
    model: _options.ModelName,
    calibration: _options.CalibrationSource,
    weights: _options.Weights = None,
    n: _options.CalibrationCount = None,
    method: _options.MethodName = "quantlens-fast",
    bits: Widths = "W8A8",
    runtime: Runtime = None,
    seed: _options.Seed = 0,
    out: Out = None,
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
    from quantlens.qmodel import Bits

    settings = _common.settings(option)
    if runtime is not None:
        settings["target"] = runtime
    wanted = api.read_bits(bits)
    target = out or Path(f"{model.split('/')[-1]}-{api.spelled(wanted).lower()}.safetensors")
    check_writable(target)
    registry.get(method).options(settings)
    source = open_calibration(calibration, n, seed)
    with _common.stages(quiet) as step:
        loaded, images = _common.open_run(model, weights, source, device, step, skip_bad=skip_bad, no_cache=no_cache)
        if not isinstance(wanted, Bits):
            wanted = api.allocation_of(loaded, images, wanted, seed, progress=partial(step, "choosing widths"))
        told = partial(step, f"calibrating by {method}")
        quantized = api.quantize(loaded, images, method=method, bits=wanted, seed=seed, progress=told, **settings)
        quantized.save(target)
    _common.say(f"{target}: {_summary(quantized, len(images), target.stat().st_size)}")


def _summary(quantized: QuantizedModel, images: int, written: int) -> str:
    """Model, method, bits, size (bytes written), and the time that calibration took."""
    seconds = quantized.provenance.seconds
    took = "" if seconds is None else f", calibrated in {seconds:.1f} s on {images} images"
    size = f"{written / 1e6:.2f} MB (weights and scales {quantized.size_mb:.2f} MB, {quantized.size_ratio:.3f} of FP32)"
    return f"{quantized.name} {quantized.method} {quantized.bits}, {size}{took}"
