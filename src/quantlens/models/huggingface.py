"""Models of Hugging Face: ``hf:ID`` of the hub (``hf:ID@REVISION``), or ``hf:DIR``, a folder that ``save_pretrained``
wrote. Code that comes with a model is never run."""

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from quantlens.data import Preprocess
from quantlens.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, UnsupportedError, first_line
from quantlens.files import mistaken
from quantlens.models import detection
from quantlens.models.modules import check_images
from quantlens.models.processors import preprocess_of
from quantlens.models.tasks import task_of
from quantlens.models.weights import adapt, fit

PREFIX = "hf:"
FILES = ("model.safetensors", "pytorch_model.bin")
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
BICUBIC = {**IMAGENET, "interpolation": "bicubic"}
DINO = {**BICUBIC, "resize": (256,)}  # of 224 pixels
PUBLISHED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), DINO),
    **dict.fromkeys(("convnext", "convnextv2", "cvt", "deit", "regnet", "resnet", "vit_mae", "vit_msn"), IMAGENET),
    **dict.fromkeys(("swin", "swinv2"), BICUBIC),
}
"""How the published models of a type have their images, where the processor's class has other defaults."""
FAULTS = (
    UnpicklingError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    EOFError,
    SafetensorError,
)
"""What transformers raises for a folder or a name that it cannot use."""

LIKE = {"rt_detr_v2": "rt_detr", "d_fine": "rt_detr", "dab_detr": "conditional_detr"}
"""Whose image processor an architecture without one of its own is published with."""


@dataclass
class Found:
    """A model of Hugging Face, and what its folder says of it. path: of its weights, where they are one file."""

    module: nn.Module
    task: str
    preprocess: Preprocess | None
    class_names: list[str] | None
    path: Path | None


def transformers() -> Any:
    """The package. Raises QuantlensError with the way to install it."""
    try:
        import transformers as package
    except ImportError as error:
        raise QuantlensError(f"hf: models need transformers ({error}): pip install 'quantlens[hf]'") from error
    return package


def timm_name(name: str) -> str | None:
    """How timm names an ``hf:`` model that is one of its own; None for any other."""
    source = name.removeprefix(PREFIX)
    if not source or Path(source).is_file():
        raise BadWeightsError(
            f"{name} is no model; write hf:DIR, a folder of save_pretrained, or hf:user/repo of a hub"
        )
    if not Path(source).is_dir():
        return f"hf-hub:{source}" if source.startswith("timm/") else None
    config = _check_folder(Path(source), weights=False)
    return f"local-dir:{source}" if "architecture" in config and "model_type" not in config else None


def open_model(name: str, *, weights: bool, num_classes: int | None, task: str | None, seed: int) -> Found:
    """An ``hf:`` model.

    weights: its own, else random ones drawn with ``seed``. num_classes: of the classifier, for random weights. task:
    "features" or "zero-shot" leaves a classifier out. Raises BadWeightsError, QuantlensError (no transformers; no
    model of images), UnsupportedError.
    """
    package = transformers()
    source, _, revision = name.removeprefix(PREFIX).partition("@")
    if Path(name.removeprefix(PREFIX)).is_dir() or not revision:
        source, revision = name.removeprefix(PREFIX), ""
    asked: dict[str, Any] = {"revision": revision} if revision else {}
    if Path(source).is_dir():
        _check_folder(Path(source), weights)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BadWeightsError(f"no folder at {source}; hf: takes a folder of save_pretrained, or the ID of a hub")
    with _quiet(package):
        try:
            config = _configuration(package, source, asked)
        except FAULTS as error:
            raise _refusal(name, error) from error
        if weights and (how := getattr(config, "quantization_config", None)):
            tool = dict(how if isinstance(how, Mapping) else vars(how)).get("quant_method", "another package")
            raise UnsupportedError(
                f"{name} holds weights that {getattr(tool, 'value', tool)} quantized, and a float model is wanted; "
                "open it with transformers, and give its module to `evaluate` or `compare`, which take it as it is"
            )
        if num_classes and int(getattr(config, "num_labels", num_classes)) != num_classes:
            if weights:
                text = f"{name} has {config.num_labels} classes, not {num_classes}: a head of another size is untrained"
                raise BadWeightsError(f"{text}; leave num_classes out, or say weights='random'")
            config.num_labels = num_classes
        body = task in ("features", "zero-shot") or num_classes == 0
        try:
            module = _build(package, source if weights else None, config, body, seed, asked)
        except FAULTS as error:
            raise _refusal(name, error) from error
        check_images(module, f"{name}, a {config.model_type} model,")
        processor = _processor(package, source, asked)
    preprocess = preprocess_of(processor, square=detects(module)) if processor is not None else None
    names = class_names(module)
    path = _weights_file(source, revision) if weights else None
    paired = hasattr(config, "text_config") and names is None and "ForImage" not in type(module).__name__
    return Found(module, task or ("zero-shot" if paired else task_of(module)), preprocess, names, path)


def _configuration(package: Any, source: str, asked: dict[str, Any]) -> Any:
    """The configuration of a model. Of a folder that names a backbone of timm (DETR as it was first published),
    transformers would ask the hub for it."""
    told = _read_json(Path(source) / "config.json") if Path(source).is_dir() else {}
    if not told.get("backbone") or not told.get("use_timm_backbone") or told.get("backbone_config"):
        return package.AutoConfig.from_pretrained(source, **asked, trust_remote_code=False)
    named = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs", "backbone_config")
    backbone = {"backbone": told["backbone"], **(told.get("backbone_kwargs") or {}), "use_pretrained_backbone": False}
    kept = {key: value for key, value in told.items() if key not in named}
    return package.AutoConfig.for_model(**kept, backbone_config={"model_type": "timm_backbone", **backbone})


def _build(package: Any, source: str | None, config: Any, body: bool, seed: int, asked: dict[str, Any]) -> nn.Module:
    """The module of a configuration, with the weights of ``source`` or random ones."""
    (kind, config, more), whole = _kind(package, config, body), config

    def make(**options: Any) -> tuple[nn.Module, list[str]]:
        if source is None:
            torch.default_generator.manual_seed(seed)
            if hasattr(kind, "from_config"):
                return kind.from_config(config, **options, trust_remote_code=False), []
            return kind._from_config(config, **options), []
        made, info = kind.from_pretrained(
            source, config=config, output_loading_info=True, trust_remote_code=False, **options, **asked
        )
        return made, list(info["missing_keys"])

    module, missing = make(**more)
    if missing and all("pooler." in key for key in missing):  # a body that was saved without one
        module, missing = make(**more, add_pooling_layer=False)
    if len(missing) > len(module.state_dict()) // 2 and hasattr(whole, "vision_config"):
        # a tower that has other names in the whole model
        parent = package.AutoModel.from_pretrained(source, trust_remote_code=False, **asked)
        state, _ = adapt(parent.state_dict(), module)
        fit(module, {k: v for k, v in state.items() if k in module.state_dict()}, f"{source}", type(module).__name__)
        missing = []
    if missing:
        hint = "; it is a body without a classifier: say task='features'" if _is_head(missing) else ""
        raise BadWeightsError(f"{len(missing)} tensors are missing ({', '.join(sorted(missing)[:3])}){hint}")
    return module


def _kind(package: Any, config: Any, body: bool) -> tuple[Any, Any, dict[str, Any]]:
    """(class that is asked for the model, its configuration, what else it is told)."""
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    classifiers = package.AutoModelForImageClassification
    if not body and named.endswith("ForObjectDetection"):
        return getattr(package, named, package.AutoModelForObjectDetection), config, {}
    if not body and ("ForImageClassification" in named or (not named and type(config) in classifiers._model_mapping)):
        return classifiers, config, {}
    if config.model_type == "vit_mae":  # its own body hides patches at random
        plain = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
        return package.ViTModel, package.ViTConfig(**plain), {"add_pooling_layer": False}
    if hasattr(config, "vision_config"):
        return (*_tower(package, config), {})
    if named.endswith(("VisionModelWithProjection", "Backbone")) or (
        named.endswith("VisionModel") and type(config) not in package.AutoModel._model_mapping
    ):
        return getattr(package, named, package.AutoModel), config, {}
    return package.AutoModel, config, {}


def _tower(package: Any, config: Any) -> tuple[Any, Any]:
    """(class, configuration) of the vision tower of a model of images and text."""
    stem, vision = type(config).__name__.removesuffix("Config"), config.vision_config
    if hasattr(vision, "projection_dim") and hasattr(config, "projection_dim"):
        vision.projection_dim = config.projection_dim
    for name in (f"{stem}VisionModelWithProjection", f"{stem}VisionModel"):
        if hasattr(package, name):
            return getattr(package, name), vision
    raise UnsupportedError(
        f"{stem} has no vision tower that transformers can load alone; load it and give its part that takes images"
    )


def _is_head(missing: list[str]) -> bool:
    return all(
        key.split(".")[0] in ("classifier", "head", "cls_classifier", "distillation_classifier") for key in missing
    )


def _refusal(name: str, error: Exception) -> QuantlensError:
    if isinstance(error, QuantlensError):
        return type(error)(f"{name}: {error}")
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        reason = "it comes with code of its own, which quantlens never runs; load it in Python, and give the module"
    local = Path(name.removeprefix(PREFIX)).is_dir()
    hint = "" if local else " (no network? give the folder of save_pretrained: hf:DIR)"
    return BadWeightsError(f"{name} cannot be loaded: {reason}{hint}")


OTHERS = {".gguf": "GGUF", ".onnx": "ONNX", ".xml": "OpenVINO", ".h5": "TensorFlow", ".msgpack": "Flax"}
"""Endings of files of weights that other programs read."""


def _check_folder(folder: Path, weights: bool) -> dict[str, Any]:
    """The configuration in a folder. Raises BadWeightsError for one that holds no model that transformers could load,
    with what it does hold."""
    adapter = folder / "adapter_config.json"
    own = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if adapter.is_file() and not own:
        base = _read_json(adapter).get("base_model_name_or_path", "another model")
        raise BadWeightsError(
            f"{folder} holds an adapter (LoRA) of {base}, not a whole model; merge the two (peft: merge_and_unload), "
            "and give the folder that save_pretrained writes then"
        )
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if not (folder / "config.json").is_file() and inner:
        raise BadWeightsError(f"{folder} holds no config.json, but folders that do: hf:{folder / inner[-1]}?")
    config = _read_json(folder / "config.json")
    if not weights:
        return config
    for path in own:
        if what := mistaken(path):
            raise BadWeightsError(f"{PREFIX}{folder} cannot be loaded: {path.name} is {what}")
    if not own and not any(folder.glob("*.safetensors")):
        found = {kind for end, kind in OTHERS.items() if any(folder.glob(f"*{end}")) or any(folder.glob(f"*/*{end}"))}
        beside = f" (its files for {' and '.join(sorted(found))} are no float weights of torch)" if found else ""
        raise BadWeightsError(f"{PREFIX}{folder} cannot be loaded: it holds none of {', '.join(FILES)}{beside}")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadWeightsError(f"{path.parent} holds no {path.name}; hf: takes a folder that save_pretrained wrote")
    if what := mistaken(path):
        raise BadWeightsError(f"{path} cannot be read: it is {what}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadWeightsError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise BadWeightsError(f"{path} is no configuration of a model")
    return content


def _processor(package: Any, source: str, asked: dict[str, Any]) -> Any:
    """The image processor that lies beside a model, or None (a warning says why one that lies there cannot be used)."""
    try:
        return package.AutoImageProcessor.from_pretrained(source, **asked, trust_remote_code=False)
    except FAULTS as error:
        path = Path(source) / "preprocessor_config.json"
        if path.is_file():
            text = f"{path} cannot be used, so the image processor is not known: {first_line(error)}"
            warnings.warn(text, QuantlensWarning, stacklevel=2)
        return None


def class_names(module: nn.Module) -> list[str] | None:
    """The ``id2label`` of a classifier or detector in order; None where its names are only numbers."""
    labels = getattr(getattr(module, "config", None), "id2label", None) or {}
    if detects(module):
        names = detection.names_of(module) or []
    elif "ForImageClassification" in type(module).__name__:
        names = [str(labels[key]) for key in sorted(labels)]
    else:
        return None
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def detects(module: nn.Module) -> bool:
    """Whether a module of Hugging Face is a detector."""
    return type(module).__name__.endswith("ForObjectDetection")


def image_size(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) that a model's configuration says, or ImageNet's."""
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def preprocess_beside(module: nn.Module) -> Preprocess | None:
    """By the image processor that lies where a module was loaded from, on this machine; None where there is none."""
    source = getattr(getattr(module, "config", None), "name_or_path", None)
    if not source:
        return None
    package = transformers()
    with _quiet(package):
        processor = _processor(package, source, {"local_files_only": True})
    return None if processor is None else preprocess_of(processor, square=detects(module))


def default_preprocess(module: nn.Module) -> Preprocess | None:
    """What the image processor of a module's architecture does by default, or of the models that were published (see
    :data:`PUBLISHED`), at the size of its configuration; None where its architecture has none."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "model_type"):
        return None
    found = _default_preprocess(transformers(), config, detects(module))
    if detects(module) and not getattr(config, "image_size", None):
        return found
    return found and found.for_size(image_size(config))


def resized(module: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """The same model for images of another size. Raises UnsupportedError where its architecture has no such thing."""
    config = copy.deepcopy(module.config)
    holder: Any = getattr(config, "vision_config", config)
    if not hasattr(holder, "image_size") or size[0] != getattr(holder, "num_channels", 3):
        raise UnsupportedError(f"{type(module).__name__} cannot be made for images of {size}; leave input_size out")
    holder.image_size = size[1] if size[1] == size[2] else list(size[1:])
    more = {"add_pooling_layer": False} if getattr(module, "pooler", module) is None else {}
    other = type(module)(config, **more).eval()
    fit(other, module.state_dict(), "the model's own weights", f"{type(module).__name__} at {size}")
    return other


def _default_preprocess(package: Any, config: Any, square: bool) -> Preprocess | None:
    known = package.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    families = [config.model_type, type(config).__module__.split(".")[-2]]  # that of a vision tower has no entry
    families += [LIKE[family] for family in families if family in LIKE]  # the type of DAB-DETR is "dab-detr"
    names = next((known[family] for family in families if family in known), ())
    names = list(names.values()) if isinstance(names, dict) else [*names][::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantlensWarning)  # nobody gave this one
        try:
            found = next((preprocess_of(getattr(package, name)(), square=square) for name in names if name), None)
        except FAULTS:
            return None
    return found and replace(found, **PUBLISHED.get(config.model_type, {}))


def _weights_file(source: str, revision: str) -> Path | None:
    if Path(source).is_dir():
        return next((path for name in FILES if (path := Path(source) / name).is_file()), None)
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(source, name, revision=revision or None) for name in FILES)
    return next((Path(path) for path in found if isinstance(path, str)), None)


class _quiet:
    """Inside, transformers prints no progress and no report of what it loads: we tell what matters."""

    def __init__(self, package: Any):
        self.logging = package.utils.logging

    def __enter__(self) -> None:
        self.level, self.bars = self.logging.get_verbosity(), self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *error: Any) -> None:
        self.logging.set_verbosity(self.level)
        if self.bars:
            self.logging.enable_progress_bar()
