"""Where a model comes from: a timm name (hub tags too), Hugging Face (hub or folder), the models that ship with
quantlens, or a user's own ``nn.Module``."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlens import zoo
from quantlens.ambient import check_device, isolated
from quantlens.data import Preprocess
from quantlens.data.folders import WNID, imagenet_class_names
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, UnknownNameError, first_line
from quantlens.models import detection, huggingface, modules, weights as files
from quantlens.models.reading import refuse_as_name
from quantlens.models.tasks import check_task, task_of


class Model(nn.Module):
    """A float model with all that an experiment must record about it. ``model(images)`` gives what the module gives.

    module: the network, in evaluation mode. name: as given. preprocess: how its images are prepared.
    checkpoint: "pretrained", a file name, "random" (untrained) or "memory" (a user's module).
    checkpoint_sha256: of the file, or of the tensors when there is no file. class_names: list or None.
    task: one of :data:`quantlens.models.tasks.TASKS`; None finds it from the module. detection_head: what the outputs
    of a detector mean; None for another task.
    """

    detection_head: detection.DetectionHead | None = None

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        preprocess: Preprocess,
        path: Path | None,
        checkpoint: str = "memory",
        class_names: list[str] | None = None,
        task: str | None = None,
    ):
        super().__init__()
        self.task = task or task_of(module)
        self.module, self.name, self.preprocess, self.class_names = module, name, preprocess, class_names
        self.checkpoint, self.weights_path = path.name if path else checkpoint, str(path) if path else None
        whole = path if path and path.is_file() and path.suffix != ".json" else None
        self.checkpoint_sha256 = files.file_sha256(whole) if whole else files.state_sha256(module.state_dict())
        self.derived: dict[str, Any] = {}
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "Model":
        """Stays in evaluation mode: statistics and dropout of training have no place in post-training quantization."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters(), torch.empty(0, device="cpu")).device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def to(self, *args: Any, **kwargs: Any) -> "Model":
        super().to(*args, **kwargs)
        self.derived.clear()
        return self


@isolated
def load_model(
    model: str | Path | nn.Module,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    preprocess: Preprocess | None = None,
    input_size: int | tuple[Any, ...] | None = None,
    class_names: list[str] | None = None,
    task: str | None = None,
    letterbox: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    name: str | None = None,
) -> Model:
    """Load a float model.

    model: a timm name such as ``deit_tiny_patch16_224`` or ``vit_small_patch16_224.augreg_in21k_ft_in1k``, ``hf:ID`` or
    ``hf:DIR`` of Hugging Face, a model that ships with quantlens (``digits-vit``), or an ``nn.Module`` of images.
    weights: ``"pretrained"`` (from the hub, the folder, or what ships), a .safetensors, .pth, .pt, .bin or AugReg .npz
    file, or ``"random"`` (drawn with ``seed``). None: random for a timm name, a model's own for all others.
    num_classes: taken from the file if its classifier has another size than the architecture's default; 0 leaves the
    classifier out. preprocess, input_size: the model's own otherwise. letterbox: a detector sees its pictures whole,
    with a border in place of a changed aspect ratio. task: "classify", "binary", "multilabel",
    "features" (a name's classifier is left out), "zero-shot" or "detect"; None finds it from the model. device: where
    a module lies already, else the CPU, by default.

    Raises UnknownNameError, BadWeightsError (with what does not fit).
    """
    if not isinstance(preprocess, Preprocess | None):
        raise QuantlensError(f"preprocess is a {type(preprocess).__name__}; give a quantlens.data.Preprocess")
    check_device("cpu" if device is None else device)
    if weights == "":
        raise BadWeightsError("weights is an empty text; give a file, 'pretrained' or 'random', or leave it out")
    path = None if weights in (None, "pretrained", "random") else Path(str(weights))
    size = None if input_size is None else modules.check_size(input_size)
    if preprocess is not None and size not in (None, preprocess.input_size):
        raise QuantlensError(f"input_size {size} and preprocess, whose is {preprocess.input_size}, differ; give one")
    own: dict[str, Any] = {"preprocess": preprocess, "input_size": size, "task": check_task(task)}
    if isinstance(model, torch.export.ExportedProgram):
        model = modules.unwrapped(model)
    if isinstance(model, nn.Module):
        _refuse(type(model).__name__, num_classes=num_classes)
        if weights in ("pretrained", "random"):
            raise BadWeightsError(
                f"weights={weights!r} needs a timm name or hf:ID; give a module its weights as a file"
            )
        loaded = from_module(model, path, name=name, **own)
    elif isinstance(model, str | Path):
        _refuse(str(model), name=name)
        loaded = _by_name(str(model), None if path else weights, path, num_classes, seed, own)
        loaded.source = str(model)
    else:
        raise QuantlensError(f"a model is a name or an nn.Module, not {type(model).__name__}")
    if class_names is not None:
        loaded.class_names = class_names
    return _ready(loaded, letterbox).to(loaded.device if device is None else device)


@isolated
def model_for_tensors(module: nn.Module, input_size: tuple[int, ...] | None) -> Model:
    """As :func:`load_model` of a module whose images come as tensors of this size: how pictures would be prepared need
    not be known, and is not warned of."""
    size = None if input_size is None else modules.check_size(input_size)
    return _ready(from_module(module, input_size=size, tell=False))


def _ready(loaded: Model, letterbox: bool = False) -> Model:
    if letterbox:
        loaded.preprocess = detection.letterbox(loaded.preprocess, loaded.name, loaded.task)
    files.check_finite(loaded.module.state_dict(), loaded.weights_path or loaded.name)
    if loaded.task == "detect":
        given = modules.answer(loaded.module, loaded.preprocess.input_size)
        loaded.detection_head = detection.head_of(loaded, given)
    return loaded.requires_grad_(False)


def _by_name(
    name: str, weights: Any, path: Path | None, num_classes: int | None, seed: int, own: dict[str, Any]
) -> Model:
    """A model by its name. weights: "pretrained", "random", or None, also where a ``path`` is given."""
    if name in zoo.available():
        _refuse(name, num_classes=num_classes, input_size=own["input_size"])
        return _from_zoo(zoo.available()[name], path, weights == "random", seed, own)
    num_classes = 0 if own["task"] == "features" and num_classes is None else num_classes
    as_timm: str | None = name
    if name.startswith(huggingface.PREFIX):
        as_timm, weights = huggingface.timm_name(name), weights or (None if path else "pretrained")
    if as_timm is None:
        return _from_hub(name, weights == "pretrained", path, num_classes, seed=seed, **own)
    loaded = _from_timm(as_timm, weights == "pretrained", path, num_classes, seed=seed, **own)
    loaded.name = name
    return loaded


def _refuse(what: str, **given: Any) -> None:
    """Raise QuantlensError for an argument that has no meaning for a model: none is left out without a word."""
    for key, value in given.items():
        if value is not None:
            raise QuantlensError(f"{key}={value!r} cannot be given for {what}, which has its own; leave it out")


def from_module(
    module: nn.Module,
    path: Path | None = None,
    *,
    preprocess: Preprocess | None = None,
    input_size: tuple[int, int, int] | None = None,
    task: str | None = None,
    name: str | None = None,
    tell: bool = True,
) -> Model:
    """A person's module. tell: warn of a preprocessing that had to be assumed (who gives tensors need not know)."""
    module = modules.unwrapped(module)
    known = module if isinstance(module, Model) else None
    module = known.module if known else module
    modules.check(module)
    module = modules.copied(module)  # the caller's stays as it is: its mode, its gradients, its weights
    kind = type(module).__name__
    if path is not None:
        files.fit_file(module, files.read_state(path), path, kind)
    module, given, assumed = modules.plain(module), None, False
    modules.check_images(module, kind)
    if preprocess is None and known is not None:
        preprocess = known.preprocess.for_size(input_size) if input_size else known.preprocess
    if preprocess is None:
        preprocess, given = _preprocess_of(module, input_size, name or kind, tell)
        assumed = True
    if task is None and known is None and given is None and not hasattr(module, "config"):
        given = modules.answer(module, preprocess.input_size)
    task = task or (known.task if known else task_of(module, given))
    if task == "detect" and assumed:
        preprocess = detection.square(preprocess)
    return Model(
        module,
        name=name or (known.name if known else kind),
        preprocess=preprocess,
        path=path,
        class_names=known.class_names if known else huggingface.class_names(module),
        task=task,
    )


def _preprocess_of(
    module: nn.Module, size: tuple[int, int, int] | None, name: str, tell: bool
) -> tuple[Preprocess, Any]:
    """(preprocessing of a module, what it gives for an image of the size that was tried, or None). timm's models carry
    theirs, those of Hugging Face have it beside them; for any other it is assumed: that of the architecture, or
    ImageNet's mean and deviation."""
    config, given = getattr(module, "pretrained_cfg", None), None
    if isinstance(config, dict) and config.get("mean"):
        known: Preprocess | None
        known = carried = _own_preprocess(module, None)
        likely = [modules.stated_size(module, carried.input_size), carried.input_size]
    else:
        known = huggingface.preprocess_beside(module)
        usual = known or (huggingface.default_preprocess(module) if huggingface.detects(module) else None)
        likely = [*([usual.input_size] if usual else []), modules.stated_size(module)]
    if size is None:
        size, given = modules.taken(module, likely)
    found = known or huggingface.default_preprocess(module) or Preprocess(crop_pct=0.9)
    found = found if found.input_size == size else found.for_size(size)
    if tell and known is None:
        _tell_assumed(name, found)
    return found, given


def _tell_assumed(name: str, found: Preprocess) -> None:
    text = (
        f"{name} does not say how its images are prepared; assumed: {found.input_size[1]}×{found.input_size[2]} "
        f"pixels, mean {found.mean}, std {found.std}, {found.interpolation}; give preprocess= where that is wrong"
    )
    warnings.warn(text, QuantlensWarning, stacklevel=2)


def _from_zoo(entry: zoo.ZooEntry, path: Path | None, random: bool, seed: int, own: dict[str, Any]) -> Model:
    torch.default_generator.manual_seed(seed)
    module, path = entry.build(), None if random else path or entry.weights
    if path is not None:
        files.fit(module, files.read_state(path), str(path), entry.name)
    preprocess, task = own["preprocess"] or entry.preprocess, own["task"]
    if entry.scoring is not None:
        _refuse(entry.name, task=None if task == "detect" else task)
        preprocess, task = own["preprocess"] or detection.square(entry.preprocess), "detect"
    names = None if task == "features" else entry.class_names
    if names is None:
        module.reset_classifier(0)
    named: dict[str, Any] = {"name": entry.name, "class_names": names, "checkpoint": "random"}
    return Model(module, preprocess=preprocess, path=path, task=task, **named)


def _from_hub(
    name: str,
    pretrained: bool,
    path: Path | None,
    num_classes: int | None,
    *,
    preprocess: Preprocess | None,
    input_size: tuple[int, int, int] | None,
    task: str | None,
    seed: int,
) -> Model:
    """A model of Hugging Face, with its own weights, those of a file, or random ones."""
    found = huggingface.open_model(name, weights=pretrained, num_classes=num_classes, task=task, seed=seed)
    module = found.module
    if path is not None:
        files.fit(module, files.read_state(path), str(path), name)
    known = preprocess or found.preprocess
    own = modules.stated_size(module)
    if known is None:
        likely = huggingface.default_preprocess(module)
        known = (likely or Preprocess(crop_pct=0.9)).for_size(
            input_size or (likely.input_size if likely and found.task == "detect" else own)
        )
        known = detection.square(known) if found.task == "detect" else known
        _tell_assumed(name, known)
    size = input_size or known.input_size
    if found.task != "detect" and size != own and modules.answer(module, size) is None:
        if input_size is None and modules.answer(module, own) is not None:
            text = f"{name} takes images of {own}; its image processor makes {size}: {own} is taken"
            warnings.warn(text, QuantlensWarning, stacklevel=2)
            size = own
        else:
            module = huggingface.resized(module, size)
    loaded = Model(
        modules.plain(module),
        name=name,
        preprocess=known if known.input_size == size else known.for_size(size),
        path=path or found.path,
        checkpoint="pretrained" if pretrained else "random",
        class_names=found.class_names,
        task=found.task,
    )
    loaded.weights_path = str(path) if path else None  # what lies in its own folder goes without saying
    return loaded


def _from_timm(
    name: str,
    pretrained: bool,
    path: Path | None,
    num_classes: int | None,
    *,
    preprocess: Preprocess | None,
    input_size: tuple[int, int, int] | None,
    task: str | None,
    seed: int,
) -> Model:
    if path is not None:
        files.check_path(path)
    size = input_size or (preprocess.input_size if preprocess else None)
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None:
        kwargs |= {"img_size": size[-2:]} | ({} if size[0] == 3 else {"in_chans": size[0]})
    module = _create(name, pretrained, kwargs, seed)
    if path is not None:
        raw = files.read_state(path)
        classes = files.jax_classes(raw) or files.classes_in(files.adapt(raw, module)[0], module)
        if num_classes is None and classes not in (None, module.num_classes):
            module = _create(name, False, {**kwargs, "num_classes": classes}, seed)
        files.fit_file(module, raw, path, name)
    return Model(
        module,
        name=name,
        preprocess=preprocess or _own_preprocess(module, size),
        path=path,
        checkpoint="pretrained" if pretrained else "random",
        class_names=_imagenet_names(getattr(module, "num_classes", None)),
        task=task,
    )


def _own_preprocess(module: nn.Module, input_size: tuple[int, int, int] | None) -> Preprocess:
    """What a module of timm carries, at ``input_size``."""
    from timm.data import resolve_model_data_config

    colours = None if input_size is None else (3, *input_size[1:])
    found = Preprocess.from_timm(resolve_model_data_config(module, {"input_size": colours}))
    return found if input_size in (None, found.input_size) else found.for_size(input_size)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any], seed: int) -> Any:
    import timm

    plain = name.split("/")[-1]
    base, _, tag = plain.partition(".")
    is_hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not is_hub and not timm.is_model(base):
        refuse_as_name(Path(name))
        known = [*timm.list_models(), *zoo.available()]
        raise UnknownNameError("model", name, known, "`quantlens models --filter 'vit*'` lists the names")
    tags = {known.partition(".")[2] for known in timm.list_models(base, pretrained=True)}
    if not is_hub and tag and tag not in tags:
        raise UnknownNameError(f"pretrained tag of {base}", tag, tags)
    try:
        torch.default_generator.manual_seed(seed)
        return timm.create_model(name if is_hub else plain, pretrained=pretrained, **kwargs)
    except Exception as error:
        if isinstance(error, TypeError) and "img_size" in str(error) and "img_size" in kwargs:  # it takes any size
            return _create(name, pretrained, {k: v for k, v in kwargs.items() if k != "img_size"}, seed)
        detail = first_line(error)
        if pretrained or is_hub:
            raise BadWeightsError(
                f"pretrained weights of {name} could not be fetched: {detail} (no network? download "
                "the file elsewhere and give it with --weights FILE.safetensors)"
            ) from error
        raise QuantlensError(f"timm cannot make {name}: {detail}") from error


# ---- names of classes ------------------------------------------------------------------------------------------------


def class_names(images: Any, model: Any) -> list[str] | None:
    """Names of a model's classes: its own, those of its images, or ImageNet's for a thousand classes; None if nobody
    knows them. WordNet numbers, which say nothing to a reader, are no names."""
    count = int(model.num_classes)
    for holder in (model, images):
        names = getattr(holder, "class_names", None)
        if names is not None and len(names) == count and not all(WNID.fullmatch(str(n)) for n in names):
            return [str(n) for n in names]
    return _imagenet_names(count)


def _imagenet_names(count: int | None) -> list[str] | None:
    return list(imagenet_class_names()) if count == 1000 else None
