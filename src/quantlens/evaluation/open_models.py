"""What a person names to be measured, as a model: a name, a quantized checkpoint, or an exported file."""

from pathlib import Path
from typing import Any

from quantlens.errors import BadWeightsError
from quantlens.evaluation.environment import choose_device
from quantlens.models import Model, load_model
from quantlens.qmodel.hub import find_checkpoint


def open_float(
    name: str, weights: str | None = None, device: str = "cpu", input_size: int | tuple[int, ...] | None = None
) -> Model:
    """A float model by name. weights: "random", a file, or "pretrained", as for None. input_size: see `load_model`."""
    return load_model(name, weights or "pretrained", input_size=input_size, device=choose_device(device))


def checkpoint_of(name: str) -> Path | None:
    """The quantized checkpoint that a name means (a .safetensors file, a folder written with a slash, ``hf:user/repo``,
    which is downloaded), or None. Raises BadWeightsError for a repository that cannot be read."""
    written = name.startswith("hf:") or name.endswith(".safetensors") or "/" in name
    return find_checkpoint(name) if written else None


def open_models(
    name: str, weights: str | None = None, device: str = "cpu", input_size: int | None = None
) -> tuple[Any, Any]:
    """(model to measure, FP32 model it was made from, or None).

    name: a float model's name, a checkpoint as :func:`checkpoint_of` finds it, or an exported file (.onnx, .xml).
    weights: a file, "pretrained" or "random": the float model's own, or of the model that a file was made from; None:
    trained ones, or no FP32 model beside a file. input_size: of a float model. Raises BadWeightsError where they are
    not what the file was made from.
    """
    checkpoint = checkpoint_of(name)
    path = checkpoint or Path(name)
    made: Any
    if path.suffix in (".onnx", ".xml"):
        from quantlens.export.exported import Artefact

        made = Artefact(path)
    elif checkpoint is not None:
        from quantlens.qmodel.checkpoint import load

        if not path.is_file():
            raise BadWeightsError(
                f"{path} does not exist; give a model's name, or a file that `quantlens quantize` wrote"
            )
        made = load(path).to(choose_device(device))
    else:
        return open_float(name, weights, device, input_size), None
    if weights is None:
        return made, None
    reference = open_float(made.name, weights, device)
    size, own = (getattr(getattr(m, "preprocess", None), "input_size", None) for m in (made, reference))
    if size is not None and own not in (None, size):
        reference = open_float(made.name, weights, device, size)
    if made.checkpoint_sha256 not in (None, reference.checkpoint_sha256):
        raise BadWeightsError(
            f"--weights {weights} is not the checkpoint that {path} was made from (SHA-256 "
            f"{str(reference.checkpoint_sha256)[:12]}…, not {str(made.checkpoint_sha256)[:12]}…); give that one"
        )
    return made, reference
