"""`quantlens export`: a quantized checkpoint as a file that runtimes run."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlens.cli import _common, _options
from quantlens.files import check_writable

HELP = """Write a model for a runtime: ONNX (.onnx), OpenVINO IR (.xml with its .bin) or PyTorch (.pt2).

MODEL is a quantized checkpoint (.safetensors) that `quantize` wrote, or the name of a model, which is exported in
float. What is written are the codes, scales and zero points that were measured, as QuantizeLinear and DequantizeLinear
of ONNX operator set 21, or a later one that --opset names: weights of 2 bits need 25, MXFP4 and MXFP8 24, NVFP4 23.
Runtimes have integer kernels for uniform formats of 8 bits (weights of 4 bits too): quantize with --target to stay
inside them.

The file of a classifier also gives an out-of-distribution score, and with --guard-images the threshold below which an
image looks unknown; which score is then chosen by how it tells these images from OOD-like ones made of them.

[bold]Examples[/bold]

    quantlens quantize digits-vit --bits W8A8 --target openvino-cpu \\
      --calibration embedded:digits-calibration --out d.safetensors

    quantlens export d.safetensors --out digits.onnx \\
      --guard-images embedded:digits-calibration

    quantlens export d.safetensors --out digits.xml
"""


Opset = Annotated[
    int | None, typer.Option(metavar="N", help="ONNX operator set of an .onnx file: 21 (the default) to 26.")
]
GuardImages = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="In-distribution images that set the threshold.")
]
Half = Annotated[
    bool, typer.Option("--half", help="Compute what is float in float16, but LayerNorm (.onnx; for TensorRT).")
]


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A quantized checkpoint, or a model's name (float).")],
    out: Annotated[Path, typer.Option(help="The file to write: .onnx, .xml or .pt2.")],
    weights: Annotated[
        str | None, typer.Option(metavar="W", help="Weights of a named model: a file, pretrained or random.")
    ] = None,
    input_size: _options.InputSize = None,
    letterbox: _options.Letterbox = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Keep formats without integer kernels as float operations.")
    ] = False,
    guard: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="OOD score in the file: msp, energy, maxlogit, gen, mahalanobis or none; by default the one that best "
            "separates --guard-images from OOD-like images made of them.",
        ),
    ] = None,
    guard_images: GuardImages = None,
    keep: Annotated[float, typer.Option(help="Share of in-distribution images that the threshold keeps.")] = 0.95,
    opset: Opset = None,
    half: Half = False,
    check: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Compare the file with the simulation on these images.")
    ] = None,
    quiet: _options.Quiet = False,
) -> None:
    """See HELP."""
    from quantlens.data import as_image_set, open_source
    from quantlens.errors import BadWeightsError
    from quantlens.evaluation.open_models import open_models
    from quantlens.export.export import export as write
    from quantlens.export.exported import Artefact
    from quantlens.export.parity import parity
    from quantlens.export.told import unrun, untried, weights_sentence
    from quantlens.qmodel import float_model
    from quantlens.qmodel.in_float import said_in_float

    check_writable(out)
    sources = {name: open_source(spec) for name, spec in (("guard", guard_images), ("check", check)) if spec}
    measured = float_model(open_models(model, weights, input_size=input_size, letterbox=letterbox)[0])
    with _common.stages(quiet) as step:
        images = {
            name: as_image_set(source, measured.preprocess, progress=partial(step, f"decoding {name} images"))
            for name, source in sources.items()
        }
        writing = partial(write, guard=guard, guard_images=images.get("guard"), keep=keep, simulate=simulate)
        path = writing(measured, out, opset=opset, half=half)
        said = [weights_sentence(measured, path, opset, half=half), *untried(measured).values()]
        try:
            exported = Artefact(path)
        except BadWeightsError as error:
            print("\n".join([*unrun(path, measured, error), *said]))
            return
        said += [said_in_float(measured)] if exported.options.get("target") else []
        if "check" in images:
            found = parity(measured, exported, images["check"], progress=partial(step, "checking"))
            said.append(found.sentence(exported.runtime))
    print("\n".join([f"{path}: {_summary(exported)}", *said, *exported.advice()]))


def _summary(exported: Any) -> str:
    """Name, bits, size, and of a classifier the OOD score with its threshold."""
    from quantlens.export.guards import guard_sentences

    file = f"{exported.name} {exported.bits}, {exported.size_mb:.2f} MB"
    if exported.task != "classify":
        return f"{file}; its task is {exported.task}"
    return f"{file}; " + "\n".join(guard_sentences(exported.guard))
