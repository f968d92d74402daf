"""`quantlens export`: a quantized checkpoint as a file that runtimes run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from quantlens.cli import _options
from quantlens.cli._common import command

HELP = """Write a model for a runtime: ONNX (.onnx), OpenVINO IR (.xml with its .bin) or PyTorch (.pt2).

MODEL is a quantized checkpoint (.safetensors) that `quantize` wrote, or the name of a model, which is exported in
float. What is written are the codes, scales and zero points that were measured, as QuantizeLinear and DequantizeLinear
of ONNX operator set 21. Runtimes have integer kernels for uniform formats of 8 bits (weights of 4 bits too): quantize
with --target to stay inside them.

The file also gives an out-of-distribution score, and with --guard-images the threshold below which an image looks
unknown.

[bold]Examples[/bold]

    quantlens quantize digits-vit --bits W8A8 --target openvino-cpu \\
      --calibration embedded:digits-calibration --out d.safetensors

    quantlens export d.safetensors --out digits.onnx \\
      --guard-images embedded:digits-calibration

    quantlens export d.safetensors --out digits.xml
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "export", HELP, export)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A quantized checkpoint, or a model's name (float).")],
    out: Annotated[Path, typer.Option(help="The file to write: .onnx, .xml or .pt2.")],
    weights: Annotated[
        str | None, typer.Option(metavar="W", help="Weights of a named model: a file, pretrained or random.")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Keep formats without integer kernels as float operations.")
    ] = False,
    guard: Annotated[str, typer.Option(help="OOD score in the file: energy, msp or maxlogit.")] = "energy",
    guard_images: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="In-distribution images that set the threshold.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of in-distribution images that the threshold keeps.")] = 0.95,
    check: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Hold the file against the simulation on these images.")
    ] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.cli import _common
    from quantlens.cli.evaluate import models
    from quantlens.data import as_image_set, open_source
    from quantlens.export.export import export as write
    from quantlens.export.exported import Artefact
    from quantlens.export.parity import parity

    sources = {name: open_source(spec) for name, spec in (("guard", guard_images), ("check", check)) if spec}
    measured, _ = models(model, weights, "cpu")
    with _common.stages(quiet) as step:
        images = {}
        for name, source in sources.items():
            report = functools.partial(step, f"decoding {name} images")
            images[name] = as_image_set(source, measured.preprocess, progress=report)
        path = write(measured, out, simulate=simulate, guard=guard, guard_images=images.get("guard"), keep=keep)
        if path.suffix == ".pt2":
            _common.say(f"{path}: {measured.name} for torch.export.load")
            return
        artefact = Artefact(path)
        found = None
        if "check" in images:
            found = parity(
                measured, artefact, images["check"], progress=lambda done, total: step("checking", done, total)
            )
    threshold = artefact.guard["threshold"]
    said = "no threshold (give --guard-images)" if threshold is None else f"unknown below {threshold['value']:.3f}"
    _common.say(f"{path}: {artefact.name} {artefact.bits}, {artefact.size_mb:.2f} MB; {guard} score, {said}")
    if found is not None:
        _common.say(found.sentence(artefact.runtime))
    for line in artefact.advice():
        _common.say(line)
