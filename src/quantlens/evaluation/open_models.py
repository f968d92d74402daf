"""What a person names to be measured, as a model: a name, a checkpoint, an exported or foreign file, a module."""

import warnings
from pathlib import Path
from typing import Any

from quantlens.errors import BadWeightsError, CaptureError, QuantlensWarning, UnknownNameError
from quantlens.evaluation.environment import choose_device
from quantlens.evaluation.tasks import own_task
from quantlens.models import Model, load_model
from quantlens.qmodel import float_model
from quantlens.qmodel.hub import find_checkpoint


def open_float(
    name: str,
    weights: str | None = None,
    device: str = "cpu",
    input_size: int | tuple[int, ...] | None = None,
    task: str | None = None,
    letterbox: bool = False,
) -> Model:
    """A float model by name. weights: "random", a file, or "pretrained", as for None. input_size, task, letterbox: see
    `load_model`."""
    weights, device = "pretrained" if weights is None else weights, choose_device(device)
    return load_model(name, weights, input_size=input_size, task=task, letterbox=letterbox, device=device)


def checkpoint_of(name: str) -> Path | None:
    """The quantized checkpoint that a name means (a .safetensors file, a folder written with a slash, ``hf:user/repo``,
    which is downloaded), or None. Raises BadWeightsError for a repository that cannot be read."""
    written = name.startswith("hf:") or name.endswith(".safetensors") or "/" in name
    return find_checkpoint(name) if written else None


def open_models(
    name: str | Path,
    weights: str | None = None,
    device: str = "cpu",
    input_size: int | None = None,
    *,
    reference: Any = None,
    letterbox: bool = False,
) -> tuple[Any, Any]:
    """(model to measure, FP32 model it was made from, or None).

    name: a float model's name, a checkpoint as :func:`checkpoint_of` finds it, an exported file (.onnx, .xml, .pt2), or
    a foreign one: another tool's .onnx or .xml, or logits (.npz, .csv). weights: a file, "pretrained" or "random": the
    float model's own, or of the model that a file was made from; None: trained ones, or no FP32 model beside a file
    of ours. input_size, letterbox: of a float model. reference: the float model that a foreign file came from, or its
    name. Raises BadWeightsError where the weights are not what the file was made from.
    """
    checkpoint = checkpoint_of(str(name))
    path = checkpoint or Path(name)
    made: Any
    if path.suffix in (".onnx", ".xml", ".pt2", ".npz", ".csv"):
        made, foreign = _of_file(path, lambda: _named(reference, weights, device, input_size))
        if foreign:
            if weights is not None and reference is None:
                raise BadWeightsError(
                    f"{path} does not say which model it was made from; name it (--reference NAME) beside --weights"
                )
            return made, made.reference
    elif checkpoint is not None:
        from quantlens.qmodel.checkpoint import load

        if not path.is_file():
            raise BadWeightsError(
                f"{path} does not exist; give a model's name, or a file that `quantlens quantize` wrote"
            )
        made = load(path).to(choose_device(device))
    else:
        return open_float(str(name), weights, device, input_size, letterbox=letterbox), None
    if letterbox:
        raise BadWeightsError(f"{path} says itself how its pictures are resized; leave the letterbox out")
    if not isinstance(reference, str | None):
        return made, reference
    if weights is None and reference is None:
        return made, None
    return made, _made_from(made, path, reference, weights, device)


def _made_from(made: Any, path: Path, name: str | None, weights: str | None, device: str) -> Model:
    """The float model that a file was made from, by the name that a person or the file gives."""
    called, head = name or made.name, getattr(made, "detection_head", None)
    letterbox = head is not None and head.resize == "letterbox"
    task = "features" if own_task(made) == "features" else None  # without a classifier, as the file is
    try:
        with warnings.catch_warnings(record=True) as said:
            reference = open_float(called, weights, device, task=task, letterbox=letterbox)
    except UnknownNameError as error:
        if name is not None:
            raise
        raise BadWeightsError(
            f"{path} was made from a module that has no name to load it by ({called}); leave --weights out, or use "
            "Python, where the module itself can be given"
        ) from error
    size, own = (getattr(getattr(m, "preprocess", None), "input_size", None) for m in (made, reference))
    if size is not None and own not in (None, size):
        reference = open_float(called, weights, device, size, task, letterbox)
        said = []  # what was said was of the first
    for one in said:
        warnings.warn(one.message, one.category, stacklevel=2)
    if made.checkpoint_sha256 not in (None, reference.checkpoint_sha256):
        raise BadWeightsError(
            f"--weights {weights} is not the checkpoint that {path} was made from (SHA-256 "
            f"{str(reference.checkpoint_sha256)[:12]}…, not {str(made.checkpoint_sha256)[:12]}…); give that one"
        )
    return reference


def _of_file(path: Path, reference: Any) -> tuple[Any, bool]:
    """(model of an exported file or one of logits, whether it is foreign)."""
    from quantlens.evaluation.foreign import open_foreign

    if path.suffix in (".npz", ".csv"):
        return open_foreign(path, reference=reference()), True
    from quantlens.evaluation.foreign_files import ForeignFile
    from quantlens.export.exported import Artefact, open_file

    opened = open_file(path)
    if opened.ours:
        return Artefact(path, opened=opened), False
    return ForeignFile(path, opened=opened, reference=reference()), True


def _named(reference: Any, weights: str | None, device: str, input_size: int | None) -> Any:
    """The float model that a person names: as it is, or by name, which may be that of a file of its logits."""
    if not isinstance(reference, str | Path):
        return reference
    if Path(reference).suffix in (".onnx", ".xml", ".pt2", ".npz", ".csv"):
        return open_models(reference)[0]
    return open_float(str(reference), weights, device, input_size)


def measurable(model: Any, device: str | None = None, *, reference: Any = None, images: Any = None) -> Any:
    """A model that shows logits and features, on a device (None: where it is): as it is, or the FP32 model as a graph
    without quantizers, or, where that cannot be captured, as the module it is.

    model: also a file or a name, as `open_models` takes them, an ``nn.Module`` or a callable; these are foreign.
    reference: the FP32 model or its Result, whose preprocessing a foreign model takes. images: what it will see, for
    their size, where nobody has said it.
    """
    if isinstance(model, str | Path):
        model = open_models(model, device=device or "cpu", reference=reference)[0]
    if isinstance(model, Model):
        model = _runnable(model)
    if not callable(getattr(model, "outputs", None)) and not hasattr(model, "recorded"):
        from quantlens.evaluation.foreign import open_foreign

        model = open_foreign(model, reference=reference)
    if hasattr(model, "learn"):
        from quantlens.evaluation.foreign import refuse_unprepared

        refuse_unprepared(model, images)
        model.learn(None if images is None else _size(images))
    return model if device is None else model.to(choose_device(device))


def _size(images: Any) -> tuple[int, ...] | None:
    """The size [3, H, W] of images that are prepared already; None of others, and of what can be read only once."""
    if hasattr(images, "tensor"):
        return tuple(images.tensor(0, 1).shape[1:])
    if len(getattr(images, "shape", ())) == 4:
        return tuple(images.shape[1:])
    again = isinstance(images, tuple | list) or hasattr(images, "dataset")
    return _size(next(iter(images), None)) if again and not isinstance(images, str) else None


def _runnable(model: Model) -> Any:
    try:
        return float_model(model)
    except CaptureError as error:
        from quantlens.evaluation.foreign_modules import ForeignModule

        warnings.warn(
            f"{model.name} is measured as it is, as it cannot be captured ({error})", QuantlensWarning, stacklevel=3
        )
        return ForeignModule.float(model)
