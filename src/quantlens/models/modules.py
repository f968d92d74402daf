"""A person's own ``nn.Module`` as quantlens computes with it: out of its wrappers, a copy, in float32, with the size of
the images that it takes."""

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from quantlens.errors import QuantlensError, QuantlensWarning, UnsupportedError

SIZES = (32, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 336, 384, 448, 512, 518)
"""Sides of square images that are tried where a module refuses the size that it seems to have."""

FAULTS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError, KeyError, AttributeError)
"""What a module raises for images that it does not take."""


FLOAT = "give the float model (`evaluate` and `compare` take this one as it is)"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of DataParallel, DistributedDataParallel, torch.compile and averages of weights, and of a
    program of torch.export."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, torch.export.ExportedProgram):
            return module.module()
        if isinstance(
            module, nn.DataParallel | nn.parallel.DistributedDataParallel | torch.optim.swa_utils.AveragedModel
        ) or type(module).__module__.startswith("timm.utils.model_ema"):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def check(module: nn.Module) -> None:
    """Raise UnsupportedError for a module that has no floating-point weights to quantize, or no code to capture."""
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise QuantlensError(
            f"a {name} was given where a model is wanted; give an nn.Module or what ql.load_model gives"
        )
    for key, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"{name}: {key}" if key else name
            raise UnsupportedError(
                f"{what} is TorchScript, which torch.export cannot capture; give the nn.Module that it was made from"
            )
    if hasattr(module, "plan") and hasattr(module, "graph"):
        raise UnsupportedError(
            f"a model that quantlens quantized ({getattr(module, 'bits', name)}) was given where a float model is "
            "wanted; give the model that it was made from"
        )
    packed = next((k for k, part in module.named_modules() if ".quantized" in type(part).__module__), None)
    if packed is not None:
        raise UnsupportedError(f"{name}: torch quantized {packed!r}; {FLOAT}")
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value):
            raise UnsupportedError(f"{name}: {key} has no shape yet; run the module once on a batch of images")
        if value.is_meta:
            raise UnsupportedError(f"{name}: {key} lies on the meta device, without values; load its weights first")
        own, kind = type(value) in (Tensor, nn.Parameter), type(value.detach())
        codes = isinstance(value, nn.Parameter) and value.dtype in (torch.int8, torch.uint8)
        if not own or kind is not Tensor or value.is_quantized or codes:
            what = (kind if own else type(value)).__name__ if not codes else str(value.dtype)
            raise UnsupportedError(
                f"{name}: {key} is a {what}, not a plain tensor: another package quantized or sharded it; {FLOAT}"
            )


def check_images(module: nn.Module, name: str) -> None:
    """Raise QuantlensError for a module of transformers that says that it takes something else than images."""
    main, config = getattr(module, "main_input_name", None), getattr(module, "config", None)
    if main is None:
        return
    takes = list(inspect.signature(module.forward).parameters)
    if main != "pixel_values" and (main in takes or "pixel_values" not in takes):  # parts inherit the name of the whole
        raise QuantlensError(
            f"{name} takes {main if main in takes else takes[0]}, not images; give the part of it that takes images"
        )
    config = getattr(config, "vision_config", config)
    if hasattr(config, "num_patches") and not hasattr(config, "image_size"):
        raise UnsupportedError(
            f"{name} takes pictures that its processor cut into patches, a varying number of them (NaFlex), not images "
            "[B, 3, H, W]; take one of its models of a fixed size"
        )


def copied(module: nn.Module) -> nn.Module:
    """A copy that shares nothing with the module: its mode, gradients and weights stay as they are. Raises
    UnsupportedError for one that cannot be copied."""
    memo = {id(value): value.detach().clone() for value in _computed(module)}
    try:
        twin = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be copied ({error}); take what is no tensor and no module out of it"
        ) from error
    for part in twin.modules():
        for name, child in part.named_children():
            if (inner := unwrapped(child)) is not child:
                setattr(part, name, inner)
        part.__dict__.pop("_compiled_call_impl", None)  # of module.compile()
    return twin


def _computed(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a module keeps and that came out of an operation: those cannot be copied with their history."""
    for part in module.modules():
        own = {k: v for k, v in vars(part).items() if k not in ("_modules", "_parameters")}
        yield from (value for value in _tensors(own.values(), 3) if not value.is_leaf)


def _tensors(values: Iterable[Any], depth: int) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, Mapping):
            yield from _tensors(value.values(), depth - 1)
        elif depth and isinstance(value, list | tuple):
            yield from _tensors(value, depth - 1)


def plain(module: nn.Module) -> nn.Module:
    """The module itself with weights that are computed from others (weight norm, spectral norm, pruning) as tensors of
    their own, and in float32 (a warning says so)."""
    module.eval()
    for part in module.modules():
        for hook in list(part._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(part, hook._tensor_name)
        if parametrize.is_parametrized(part):  # torch's own removal would change the class, which the original shares
            values = {name: getattr(part, name).detach() for name in part.parametrizations}  # type: ignore[union-attr]
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
    tensors = (*module.parameters(), *module.buffers())
    other = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point() and t.dtype != torch.float32}
    if other:
        module.float()
        text = f"{type(module).__name__} has {' and '.join(sorted(other))} tensors: quantlens computes in float32"
        warnings.warn(text, QuantlensWarning, stacklevel=2)
    return module


# ---- the images it takes ---------------------------------------------------------------------------------------------


def answer(module: nn.Module, size: tuple[int, ...]) -> Any:
    """What a module gives for a black image of a size; None where it does not take it."""
    first = next(iter(module.parameters()), torch.empty(0))
    try:
        with torch.no_grad():
            return module(torch.zeros(1, *size, device=first.device))
    except FAULTS:
        return None


def taken(module: nn.Module, likely: Iterable[tuple[int, int, int]]) -> tuple[tuple[int, int, int], Any]:
    """(size, what the module gives for an image of it): the first of the likely sizes that it takes, with the channels
    that its first convolution reads where it refuses theirs, else the first square of :data:`SIZES`. The likeliest one
    and None, where it takes none."""
    likely = list(dict.fromkeys(likely))
    tried = [*likely, *((likely[0][0], side, side) for side in SIZES)]
    read = _channels(module)
    for size in dict.fromkeys([*tried, *((read, *size[1:]) for size in tried)]):
        if (found := answer(module, size)) is not None:
            return size, found
    return likely[0], None


def stated_size(module: nn.Module, otherwise: tuple[int, int, int] = (3, 224, 224)) -> tuple[int, int, int]:
    """(channels, height, width) that a module, its configuration or its patch embedding states."""
    config = getattr(module, "config", None)
    config = getattr(config, "vision_config", config)
    channels = int(getattr(config, "num_channels", otherwise[0]))
    for holder in (module, getattr(module, "patch_embed", None), config):
        for name in ("img_size", "image_size", "input_size"):
            value = getattr(holder, name, None)
            if isinstance(value, list | tuple) and len(value) in (2, 3) and all(isinstance(v, int) for v in value):
                return channels, value[-2], value[-1]
            if type(value) is int and name != "input_size":  # which may be a width of something else
                return channels, value, value
    return channels, *otherwise[1:]


def _channels(module: nn.Module) -> int:
    """Channels of what a module's first convolution reads; 3 where there is none."""
    return next((part.in_channels for part in module.modules() if isinstance(part, nn.Conv2d)), 3)


LARGEST = 16384
"""Pixels of the longest side that is tried: more do not fit into any memory."""


def check_size(size: Any) -> tuple[int, int, int]:
    """(channels, height, width) as a person may say it: so, (height, width), or one side. Raises QuantlensError."""
    sides = tuple(size) if isinstance(size, list | tuple) else (size,)
    if len(sides) not in (1, 2, 3) or not all(isinstance(v, int) and 0 < v <= LARGEST for v in sides):
        raise QuantlensError(
            f"input_size {size!r}: write (channels, height, width), such as (3, 224, 224), of at most {LARGEST} pixels"
        )
    channels = sides[0] if len(sides) == 3 else 3
    return channels, sides[-2] if len(sides) > 1 else sides[0], sides[-1]
