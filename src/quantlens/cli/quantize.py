"""`quantlens quantize`: one model, one method, one packed checkpoint."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.files import check_writable

HELP = """Quantize a model after training and save it packed: integer codes at their bit width, scales, and a header.

MODEL is a timm name (`quantlens models` lists them), hf:ID or hf:DIR of Hugging Face, or a model that ships with
quantlens.

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

    quantlens quantize digits-vit --bits W4A4 --calibration none
"""


def quantize(
    model: _options.ModelName,
    calibration: _options.CalibrationSource,
    weights: _options.Weights = None,
    input_size: _options.InputSize = None,
    letterbox: _options.Letterbox = False,
    task: _options.ModelTask = None,
    n: _options.CalibrationCount = None,
    method: _options.MethodName = "quantlens-fast",
    bits: Annotated[
        str,
        typer.Option(
            help="W4A8 is 4-bit weights and 8-bit activations; MXFP4, NVFP4, FP8 or WMXFP4AMXFP8; MP6 or a file of "
            "`quantlens allocate`."
        ),
    ] = "W8A8",
    seed: _options.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="The file to write (default: MODEL-BITS.safetensors).")] = None,
    card: _options.Card = False,
    device: _options.Device = "auto",
    skip_bad: _options.SkipBad = False,
    no_cache: _options.NoCache = False,
    quiet: _options.Quiet = False,
    *,
    settings: dict[str, Any],
) -> None:
    """See HELP."""
    from quantlens import api
    from quantlens.qmodel.checkpoint import check_name
    from quantlens.qmodel.in_float import said_in_float
    from quantlens.report.card import card as write_card, check_place

    wanted = api.read_bits(bits)
    file = out or Path(f"{Path(model.removeprefix('hf:')).name}-{api.spelled(wanted).lower()}.safetensors")
    check_writable(file)
    check_name(file)
    if card:
        check_place(file.parent, file.name)
    with _common.stages(quiet) as step:
        reading = {"task": task, "letterbox": letterbox, **_common.reading(skip_bad, no_cache)}
        loaded, images = _common.open_run(step, model, weights, device, calibration, n, seed, input_size, **reading)
        told = partial(step, f"calibrating by {method}")
        quantized = api.quantize(loaded, images, method=method, bits=wanted, seed=seed, progress=told, **settings)
        quantized.save(file)
        if card:
            write_card(file)
    print(f"{file}: {_summary(quantized, len(images), file.stat().st_size)}")
    if quantized.options.get("target"):
        print(said_in_float(quantized))
    if card:
        print(f"written: {file.parent / 'README.md'}")


def _summary(quantized: Any, images: int, written: int) -> str:
    """Model, method, bits, size (bytes written), and the time that calibration took."""
    seconds = quantized.provenance.seconds
    took = "" if seconds is None else f", calibrated in {seconds:.1f} s on {images} images"
    size = f"{written / 1e6:.2f} MB (weights and scales {quantized.size_mb:.2f} MB, {quantized.size_ratio:.3f} of FP32)"
    return f"{quantized.name} {quantized.method} {quantized.bits}, {size}{took}"
