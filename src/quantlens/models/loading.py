"""Where a model comes from: a timm name (hub tags too), Hugging Face (hub or folder), the models that ship with
quantlens, or a user's own ``nn.Module``."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlens import zoo
from quantlens.ambient import isolated
from quantlens.data import Preprocess
from quantlens.data.folders import WNID, imagenet_class_names
from quantlens.errors import BadWeightsError, QuantlensError, UnknownNameError
from quantlens.models import huggingface, weights as files
from quantlens.models.tasks import check_task, task_of


class Model(nn.Module):
    """A float model with all that an experiment must record about it. ``model(images)`` gives what the module gives.

    module: the network, in evaluation mode. name: as given. preprocess: how its images are prepared.
    checkpoint: "pretrained", a file name, "random" (untrained) or "memory" (a user's module).
    checkpoint_sha256: of the file, or of the tensors when there is no file. class_names: list or None.
    task: one of :data:`quantlens.models.tasks.TASKS`; None finds it from the module.
    """

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
        self.checkpoint_sha256 = files.file_sha256(path) if path else files.state_sha256(module.state_dict())
        self.derived: dict[str, Any] = {}
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "Model":
        """Stays in evaluation mode: statistics and dropout of training have no place in post-training quantization."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def to(self, *args: Any, **kwargs: Any) -> "Model":
        super().to(*args, **kwargs)
        self.derived.clear()
        return self


@isolated
def load_model(
    model: str | nn.Module,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    preprocess: Preprocess | None = None,
    input_size: tuple[int, int, int] | None = None,
    class_names: list[str] | None = None,
    task: str | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    name: str | None = None,
) -> Model:
    """Load a float model.

    model: a timm name such as ``deit_tiny_patch16_224`` or ``vit_small_patch16_224.augreg_in21k_ft_in1k``, ``hf:ID`` or
    ``hf:DIR`` of Hugging Face, a model that ships with quantlens (``digits-vit``), or an ``nn.Module`` of images.
    weights: ``"pretrained"`` (from the hub, the folder, or what ships), a .safetensors, .pth, .pt, .bin or AugReg .npz
    file, or ``"random"`` (drawn with ``seed``). None: random for a timm name, a model's own for all others.
    num_classes: taken from the file if its classifier has another size than the architecture's default; 0 leaves the
    classifier out. preprocess, input_size: the model's own otherwise. task: "classify", "binary", "multilabel",
    "features" or "zero-shot"; None finds it from the model.

    Raises UnknownNameError, BadWeightsError (with what does not fit).
    """
    path = None if weights in (None, "pretrained", "random") else Path(str(weights))
    check_task(task)
    own = {"preprocess": preprocess, "input_size": input_size, "task": task}
    if isinstance(model, nn.Module):
        if weights in ("pretrained", "random"):
            raise BadWeightsError(
                f"weights={weights!r} needs a timm name or hf:ID; give a module its weights as a file"
            )
        loaded = _from_module(model, path, name=name, **own)
    elif model in zoo.available():
        loaded = _from_zoo(zoo.available()[model], path, weights == "random", seed)
    elif model.startswith(huggingface.PREFIX) and (as_timm := huggingface.timm_name(model)) is None:
        loaded = _from_hub(model, weights != "random" and path is None, path, num_classes, seed=seed, **own)
    else:
        known, hub = (model, weights == "pretrained") if not model.startswith("hf:") else (as_timm, weights != "random")
        loaded = _from_timm(known, hub and path is None, path, num_classes, seed=seed, **own)
        loaded.name = model
    if class_names is not None:
        loaded.class_names = class_names
    files.check_finite(loaded.module.state_dict(), loaded.weights_path or loaded.name)
    loaded.requires_grad_(False)
    return loaded.to(device)


def _from_module(
    module: nn.Module,
    path: Path | None,
    *,
    preprocess: Preprocess | None,
    input_size: tuple[int, int, int] | None,
    task: str | None,
    name: str | None,
) -> Model:
    """timm models carry their preprocessing; any other module gets ImageNet's mean and deviation at ``input_size``."""
    module = copy.deepcopy(module)  # the caller's stays as it is: its mode, its gradients, its weights
    if path is not None:
        files.fit(module, files.read_state(path), str(path), type(module).__name__)
    config = getattr(module, "pretrained_cfg", None)
    if preprocess is None and isinstance(config, dict) and config.get("mean"):
        preprocess = _own_preprocess(module, None)
    preprocess = preprocess or Preprocess(input_size or (3, 224, 224), crop_pct=0.9)
    return Model(module, name=name or type(module).__name__, preprocess=preprocess, path=path, task=task)


def _from_zoo(entry: zoo.ZooEntry, path: Path | None, random: bool, seed: int) -> Model:
    torch.default_generator.manual_seed(seed)
    module, path = entry.build(), None if random else path or entry.weights
    if path is not None:
        files.fit(module, files.read_state(path), str(path), entry.name)
    own = {"preprocess": entry.preprocess, "class_names": entry.class_names}
    return Model(module, name=entry.name, path=path, checkpoint="random", **own)


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
    if path is not None:
        files.fit(found.module, files.read_state(path), str(path), name)
    known = preprocess or found.preprocess
    loaded = Model(
        found.module,
        name=name,
        preprocess=known.for_size(input_size) if input_size and preprocess is None else known,
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
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if input_size is not None:
        kwargs["img_size"] = input_size[-2:]
    module = _create(name, pretrained, kwargs, seed)
    if path is not None and path.suffix == ".npz":
        _load_npz(module, path, name)
    elif path is not None:
        raw = files.read_state(path)
        classes = _classes_in(files.adapt(raw, module), module)
        if num_classes is None and classes not in (None, module.num_classes):
            module = _create(name, False, {**kwargs, "num_classes": classes}, seed)
        files.fit(module, files.adapt(raw, module), str(path), name)
    return Model(
        module,
        name=name,
        preprocess=preprocess or _own_preprocess(module, input_size),
        path=path,
        checkpoint="pretrained" if pretrained else "random",
        class_names=_imagenet_names(getattr(module, "num_classes", None)),
        task=task,
    )


def _own_preprocess(module: nn.Module, input_size: tuple[int, int, int] | None) -> Preprocess:
    from timm.data import resolve_model_data_config

    return Preprocess.from_timm(resolve_model_data_config(module, {"input_size": input_size}))


def _create(name: str, pretrained: bool, kwargs: dict[str, Any], seed: int) -> Any:
    import timm

    plain = name.split("/")[-1]
    base, _, tag = plain.partition(".")
    is_hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not is_hub and not timm.is_model(base):
        known = [*timm.list_models(), *zoo.available()]
        raise UnknownNameError("model", name, known, "`quantlens models --filter 'vit*'` lists the names")
    tags = {known.partition(".")[2] for known in timm.list_models(base, pretrained=True)}
    if not is_hub and tag and tag not in tags:
        raise UnknownNameError(f"pretrained tag of {base}", tag, tags)
    try:
        torch.default_generator.manual_seed(seed)
        return timm.create_model(name if is_hub else plain, pretrained=pretrained, **kwargs)
    except Exception as error:
        detail = files.first_line(error)
        if pretrained or is_hub:
            raise BadWeightsError(
                f"pretrained weights of {name} could not be fetched: {detail} (no network? download "
                "the file elsewhere and give it with --weights FILE.safetensors)"
            ) from error
        raise QuantlensError(f"timm cannot make {name}: {detail}") from error


def _load_npz(module: Any, path: Path, name: str) -> None:
    """AugReg / JAX weights through the architecture's own translation (``np.load`` without pickle)."""
    if not hasattr(module, "load_pretrained"):
        raise BadWeightsError(f"{path}: {name} cannot read .npz weights; only ViT and its variants can")
    try:
        with torch.no_grad():
            module.load_pretrained(str(path))
    except Exception as error:
        raise BadWeightsError(f"{path} does not fit {name}: {files.first_line(error)}") from error


def _classes_in(state: dict[str, Tensor], module: Any) -> int | None:
    """Size of the classifier in a state dict, by the name that the architecture gives its classifier."""
    names = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or "head"
    weight = state.get(f"{names if isinstance(names, str) else names[0]}.weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else None


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
