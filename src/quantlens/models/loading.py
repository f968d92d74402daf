"""Where a model comes from: a timm name (hub tags too), the models that ship with quantlens, or a user's own
``nn.Module``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlens.ambient import isolated
from quantlens.data import Preprocess
from quantlens.errors import BadWeightsError, QuantlensError, UnknownNameError
from quantlens.models import weights as files


class Model(nn.Module):
    """A float model with all that an experiment must record about it. ``model(images)`` gives logits [B, K].

    module: the network, in evaluation mode. name: as given. preprocess: how its images are prepared.
    checkpoint: "pretrained", a file name, "random" (untrained) or "memory" (a user's module).
    checkpoint_sha256: of the file, or of the tensors when there is no file. class_names: list or None.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        preprocess: Preprocess,
        checkpoint: str,
        checkpoint_sha256: str,
        class_names: list[str] | None = None,
        weights_path: str | None = None,
    ):
        super().__init__()
        self.module = module.eval()
        self.name, self.preprocess = name, preprocess
        self.checkpoint, self.checkpoint_sha256 = checkpoint, checkpoint_sha256
        self.class_names, self.weights_path = class_names, weights_path
        self.derived: dict[str, Any] = {}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)

    def train(self, mode: bool = True) -> Model:
        """Stays in evaluation mode: statistics and dropout of training have no place in post-training quantization."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def to(self, *args: Any, **kwargs: Any) -> Model:
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
    device: str | torch.device = "cpu",
    seed: int = 0,
    name: str | None = None,
) -> Model:
    """Load a float model.

    model: a timm name such as ``deit_tiny_patch16_224`` or ``vit_small_patch16_224.augreg_in21k_ft_in1k``, a model
    that ships with quantlens (``digits-vit``), or an ``nn.Module`` that maps images [B, 3, H, W] to logits [B, K].
    weights: ``"pretrained"`` (from the hub; the shipped file for a shipped model), a .safetensors, .pth, .pt, .bin or
    AugReg .npz file, or None (random weights drawn with ``seed``; a shipped model and a module keep theirs).
    num_classes: taken from the file if its classifier has another size than the architecture's default.
    preprocess, input_size: for a user's module, which is copied; the model's own otherwise.

    Raises UnknownNameError, BadWeightsError (with what does not fit).
    """
    if isinstance(model, nn.Module):
        loaded = _from_module(model, weights, preprocess, input_size, name)
    else:
        from quantlens import zoo

        if model in zoo.available():
            loaded = _from_zoo(model, weights)
        else:
            loaded = _from_timm(model, weights, num_classes, preprocess, input_size, seed)
    if class_names is not None:
        loaded.class_names = class_names
    files.check_finite(loaded.module.state_dict(), loaded.weights_path or loaded.name)
    loaded.requires_grad_(False)
    return loaded.to(device)


def _from_module(
    module: nn.Module,
    weights: str | Path | None,
    preprocess: Preprocess | None,
    input_size: tuple[int, int, int] | None,
    name: str | None,
) -> Model:
    path, module = None, copy.deepcopy(module)  # the caller's stays as it is: its mode, its gradients, its weights
    if weights is not None:
        if weights == "pretrained":
            raise BadWeightsError("weights='pretrained' needs a timm name; give a module its weights as a file")
        path = Path(weights)
        files.fit(module, files.read_state(path), str(path), type(module).__name__)
    sha = files.file_sha256(path) if path else files.state_sha256(module.state_dict())
    if preprocess is None:
        preprocess = _own_preprocess(module, input_size)
    return Model(
        module,
        name=name or type(module).__name__,
        preprocess=preprocess,
        checkpoint=path.name if path else "memory",
        checkpoint_sha256=sha,
        weights_path=str(path) if path else None,
    )


def _own_preprocess(module: nn.Module, input_size: tuple[int, int, int] | None) -> Preprocess:
    """timm models carry their preprocessing; any other module gets ImageNet's mean and deviation at ``input_size``."""
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("mean"):
        from timm.data import resolve_model_data_config

        return Preprocess.from_timm(resolve_model_data_config(module))
    return Preprocess.from_timm(
        {
            "input_size": input_size or (3, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.9,
        }
    )


def _from_zoo(name: str, weights: str | Path | None) -> Model:
    from quantlens import zoo

    entry = zoo.available()[name]
    path = Path(entry.weights) if weights in (None, "pretrained") else Path(weights)  # type: ignore[arg-type]
    module = entry.build()
    files.fit(module, files.read_state(path), str(path), name)
    return Model(
        module,
        name=name,
        preprocess=entry.preprocess,
        checkpoint=path.name,
        checkpoint_sha256=files.file_sha256(path),
        class_names=entry.class_names,
        weights_path=str(path),
    )


def _from_timm(
    name: str,
    weights: str | Path | None,
    num_classes: int | None,
    preprocess: Preprocess | None,
    input_size: tuple[int, int, int] | None,
    seed: int,
) -> Model:
    from timm.data import resolve_model_data_config

    pretrained = weights == "pretrained"
    path = None if weights is None or pretrained else Path(weights)
    if path is not None:
        files.check_path(path)
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if input_size is not None:
        kwargs["img_size"] = input_size[-2:]
    if path is not None and path.suffix == ".npz":
        module = _create(name, pretrained, kwargs, seed)
        _load_npz(module, path, name)
    elif path is not None:
        raw = files.read_state(path)
        module = _create(name, False, kwargs, seed)
        state = files.adapt(raw, module)
        classes = _classes_in(state, module)
        if num_classes is None and classes is not None and classes != module.num_classes:
            module = _create(name, False, {**kwargs, "num_classes": classes}, seed)
            state = files.adapt(raw, module)
        files.fit(module, state, str(path), name)
    else:
        module = _create(name, pretrained, kwargs, seed)
    override = {} if input_size is None else {"input_size": tuple(input_size)}
    own = preprocess or Preprocess.from_timm({**resolve_model_data_config(module), **override})
    return Model(
        module,
        name=name,
        preprocess=own,
        checkpoint=path.name if path else ("pretrained" if pretrained else "random"),
        checkpoint_sha256=files.file_sha256(path) if path else files.state_sha256(module.state_dict()),
        class_names=_imagenet_names(module),
        weights_path=str(path) if path else None,
    )


def _create(name: str, pretrained: bool, kwargs: dict[str, Any], seed: int) -> Any:
    import timm

    plain = name.split("/")[-1]
    base, _, tag = plain.partition(".")
    is_hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not is_hub:
        if not timm.is_model(base):
            from quantlens import zoo

            known = [*timm.list_models(), *zoo.available()]
            raise UnknownNameError("model", name, known, "`quantlens models --filter 'vit*'` lists the names")
        tags = {
            n.partition(".")[2] for n in timm.list_models(f"{base}*", pretrained=True) if n.partition(".")[0] == base
        }
        if tag and tag not in tags:
            raise UnknownNameError(f"pretrained tag of {base}", tag, tags)
    try:
        torch.default_generator.manual_seed(seed)
        return timm.create_model(name if is_hub else plain, pretrained=pretrained, **kwargs)
    except Exception as error:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if pretrained or is_hub:
            raise BadWeightsError(
                f"pretrained weights of {name} could not be fetched: {detail[:200]} (no network? download "
                "the file elsewhere and give it with --weights FILE.safetensors)"
            ) from error
        raise QuantlensError(f"timm cannot make {name}: {detail[:300]}") from error


def _load_npz(module: Any, path: Path, name: str) -> None:
    """AugReg / JAX weights through the architecture's own translation (``np.load`` without pickle)."""
    if not hasattr(module, "load_pretrained"):
        raise BadWeightsError(f"{path}: {name} cannot read .npz weights; only ViT and its variants can")
    try:
        with torch.no_grad():
            module.load_pretrained(str(path))
    except Exception as error:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadWeightsError(f"{path} does not fit {name}: {detail[:200]}") from error


def _classes_in(state: dict[str, Tensor], module: Any) -> int | None:
    """Size of the classifier in a state dict, by the name that the architecture gives its classifier."""
    names = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or "head"
    first = names if isinstance(names, str) else names[0]
    weight = state.get(f"{first}.weight")
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _imagenet_names(module: Any) -> list[str] | None:
    if getattr(module, "num_classes", None) != 1000:
        return None
    try:
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(i) for i in range(1000)]
    except Exception:
        return None
