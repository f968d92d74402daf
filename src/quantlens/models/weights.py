"""Checkpoint files: read safely, named by their SHA-256, checked for NaN, fitted to a model with a clear word when
they do not fit."""

import hashlib
import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlens.errors import BadWeightsError, QuantlensWarning, first_line
from quantlens.models.reading import FAULTS, check_path, few, read_state  # noqa: F401 (used as weights.…)
from quantlens.models.translate import to_timm

_WRAPPED = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
"""What torch puts into the names of parts that it compiles, shards or computes again."""

_AVERAGED = re.compile(r"(^|[._])ema([._]|$)")
_SPARE = re.compile(
    r"(decoder|mask(ed)?_(token|embed)|([a-z]+_)?head|aux|classifier|projector|predictor|prototypes|queue|logit_)"
)
"""How that is called which pretraining and distillation add to a model, and its function does not need."""

HEADS = ("head", "heads", "fc", "classifier", "head_dist", "last_linear")
"""How classifiers are called, which a model of features does without."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a state dict in name order: for models that come from no file."""
    digest = hashlib.sha256()
    for name in sorted(name for name, value in state.items() if isinstance(value, Tensor)):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Raise BadWeightsError naming the first tensor that holds NaN or infinity (one number may be an open bound)."""
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all()):
            continue
        if value.numel() > 1 or bool(value.isnan()):
            bad = int((~torch.isfinite(value)).sum())
            raise BadWeightsError(
                f"{origin}: {bad} of {value.numel()} values of {name!r} are NaN or infinite; the file is damaged"
            )


def adapt(state: dict[str, Tensor], module: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """(names and sizes as the model has them, what to tell of it): the prefix that a wrapper gave them taken off or put
    on, the architecture's own translation (timm's ``checkpoint_filter_fn``), position embeddings of another grid
    resampled."""
    own = module.state_dict()
    if _matches(state, own) == len(own) == len(state):
        return state, []
    told: list[str] = []
    state = _in_order({k if k in own else _WRAPPED.sub(r"\1", k): v for k, v in state.items()}, own)
    if "blocks.0.attn.qkv.weight" in own and "blocks.0.attn.qkv.weight" not in state and (named := to_timm(state)):
        state, told = named, ["the names of Hugging Face translated to timm's"]
    state, left = _without_prefix(state, own)
    translate = getattr(sys.modules.get(type(module).__module__), "checkpoint_filter_fn", None)
    before = {k: v.shape for k, v in state.items()}
    if translate is not None and _matches(state, own) < len(own):
        with suppress(*FAULTS):
            state = translate(dict(state), module)
    state, resampled = resample(state, module)
    changed = sorted(
        {k for k, v in state.items() if k in before and "pos" in k and v.shape != before[k]} | set(resampled)
    )
    if left:
        told.append(f"left out what is not the model's ({', '.join(left[:3])}{' …' if left[3:] else ''})")
    if changed:
        key = changed[0]
        sizes = f"from {tuple(before.get(key, state[key].shape))} to {tuple(state[key].shape)}"
        told.append(f"resampled {len(changed)} position embeddings ({key} {sizes}): the file is of another image size")
    kept = {k: v for k, v in own.items() if k not in state and not v.is_floating_point()}  # counters and indices
    return {**kept, **state}, told


def _matches(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    return sum(key in own and own[key].shape == value.shape for key, value in state.items())


def _in_order(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A list of tensors, which has numbers for names, under the model's names."""
    learned = {k: v for k, v in own.items() if v.is_floating_point()}
    for names in (own, learned):
        fits = len(state) == len(names) and all(
            str(i) in state and state[str(i)].shape == v.shape for i, v in enumerate(names.values())
        )
        if fits:
            return {name: state[str(i)] for i, name in enumerate(names)}
    return state


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the state dict under the prefix, or with the prefix put on, that makes most of its names the model's; names of
    what does not have that prefix)."""

    def heads(names: Iterable[str]) -> set[str]:
        return {name[: i + 1] for name in names for i, letter in enumerate(name) if letter == "."}

    best, prefix = sum(key in own for key in state), ""
    for head in sorted(heads(state), key=lambda head: (_AVERAGED.search(head) is None, len(head))):
        found = sum(f"{head}{key}" in state for key in own)
        if found > best:
            best, prefix = found, head
    put = ""
    for head in sorted(heads(own), key=len):
        found = sum(f"{head}{key}" in own for key in state)
        if found > best:
            best, prefix, put = found, "", head
    if put:
        return {key if key in own else f"{put}{key}": value for key, value in state.items()}, []
    left = [key for key in state if not key.startswith(prefix) and key not in own]
    made = {key.removeprefix(prefix): value for key, value in state.items() if key not in left}
    for key in (key for key in own if key not in made):  # a head that lies beside its backbone
        ends = [k for k in left if k.endswith(f".{key}") and state[k].shape == own[key].shape]
        if len(ends) == 1:
            made[key] = state[ends[0]]
            left.remove(ends[0])
    if any(key not in made and key.split(".")[0] in HEADS for key in own):  # which may have another name there
        made |= {key: state[key] for key in left if key.split(".")[0] in HEADS}
        left = [key for key in left if key not in made]
    return made, left


def resample(state: Mapping[str, Tensor], module: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """(a state dict whose position embeddings and relative position tables have the module's grid, as timm resamples
    them; names of those that were resampled)."""
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    own, made = module.state_dict(), dict(state)
    for key, value in state.items():
        wanted = own[key].shape if key in own else value.shape
        if wanted == value.shape or "pos" not in key or value.dim() != len(wanted) or not value.is_floating_point():
            continue
        old, new = value.shape, wanted
        if "relative_position_bias_table" in key and value.dim() == 2 and old[1] == new[1]:
            extra = next((n for n in (0, 3) if _side(new[0] - n) and _side(old[0] - n)), None)
            if extra is not None:
                side = (_side(new[0] - extra) + 1) // 2
                made[key] = resize_rel_pos_bias_table(value, (side, side), tuple(new))
        elif value.dim() in (2, 3) and old[-1] == new[-1] and old[:-2] == new[:-2]:
            grids = ((n, _side(old[-2] - n), _side(new[-2] - n)) for n in range(9))
            found = next(((n, a, b) for n, a, b in grids if a and b), None)
            if found is not None:
                extra, a, b = found
                rows = value.reshape(1, *old[-2:])
                made[key] = resample_abs_pos_embed(rows, [b, b], [a, a], num_prefix_tokens=extra).reshape(new)
        elif value.dim() == 4 and old[:2] == new[:2]:
            made[key] = nn.functional.interpolate(value.float(), new[2:], mode="bicubic", antialias=True)
    return made, [key for key in made if made[key].shape != state[key].shape]


def _side(count: int) -> int:
    """Side of a square of ``count`` places, 0 where there is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def jax_classes(state: Mapping[str, Tensor]) -> int | None:
    """Size of the classifier in a state dict of JAX (Google's ViT, AugReg); None of any other."""
    return next((value.shape[-1] for key, value in state.items() if f"/{key}".endswith("/head/kernel")), None)


def fit_file(module: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load what :func:`read_state` read of a file: as :func:`fit`, or arrays of JAX through the architecture's own
    translation, which must fill every parameter."""
    if not any(key.endswith("/kernel") for key in state):
        return fit(module, state, str(path), name)
    translate: Any = getattr(module, "load_pretrained", None)
    if translate is None:
        raise BadWeightsError(f"{path}: {name} cannot read weights of JAX; only ViT and its variants can")
    learned = dict(module.named_parameters())
    with torch.no_grad():
        for value in learned.values():
            value.fill_(math.nan)
        try:
            translate(str(path))
        except Exception as error:
            raise BadWeightsError(f"{path} does not fit {name}: {first_line(error)}") from error
    left = [key for key, value in learned.items() if bool(value.isnan().all())]
    if left:
        raise BadWeightsError(f"{path} does not fit {name}: it holds no values for {few(left)}")
    return None


def fit(module: nn.Module, state: dict[str, Tensor], origin: str, name: str) -> None:
    """Load ``state``, after :func:`adapt`, strictly. Raises BadWeightsError that says what is missing, unknown or of
    another shape."""
    (state, told), own = adapt(state, module), module.state_dict()
    tops = {name.split(".")[0] for name in own}
    state, renamed = _with_own_head(state, own)
    told += renamed
    heads = [k for k in state if k not in own and k.split(".")[0] in HEADS]
    if heads and tops.isdisjoint(HEADS):
        state = {k: v for k, v in state.items() if k not in heads}
        told.append(f"left the classifier out ({', '.join(heads[:2])})")
    spare = [k for k in state if k not in own and _SPARE.match(k) and k.split(".")[0] not in tops]
    if spare:
        state = {k: v for k, v in state.items() if k not in spare}
        told.append(f"left out what the model has not ({', '.join(spare[:3])}{' …' if spare[3:] else ''})")
    wrong = _wrong(state, own)
    parts = [f"{len(k)} {what} ({', '.join(k[:3])}{' …' if len(k) > 3 else ''})" for what, k in wrong.items() if k]
    if parts:
        hint = _hint(wrong)
        raise BadWeightsError(f"{origin} does not fit {name}: of {len(own)} tensors {'; '.join(parts)}. {hint}")
    if told:
        warnings.warn(f"{origin}: {'; '.join(told)}", QuantlensWarning, stacklevel=2)
    module.load_state_dict({k: v for k, v in state.items() if k in own}, strict=True)


def _with_own_head(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the state dict with the classifier under the model's names, where the file has one of the same sizes under
    others; what to tell of it)."""
    missing = [key for key in own if key not in state and key.split(".")[0] in HEADS]
    spare = [key for key in state if key not in own and key.split(".")[0] in HEADS]
    found = {
        key: [k for k in spare if k.split(".")[-1] == key.split(".")[-1] and state[k].shape == own[key].shape]
        for key in missing
    }
    if not missing or len(missing) != len(spare) or any(len(keys) != 1 for keys in found.values()):
        return state, []
    names = {keys[0]: key for key, keys in found.items()}
    made = {names.get(key, key): value for key, value in state.items()}
    return made, [f"took {', '.join(names)} as {', '.join(names.values())}"]


def _hint(wrong: Mapping[str, list[str]]) -> str:
    """What may be the reason why weights do not fit."""

    def of_heads(keys: Iterable[str]) -> bool:
        return all(key.split(".")[0] in HEADS or _SPARE.match(key) for key in keys)

    if wrong["of another shape"] and of_heads(key for keys in wrong.values() for key in keys):
        return "Its classifier has other classes: give a model with as many (num_classes)"
    if wrong["missing"] and of_heads([*wrong["missing"], *wrong["unknown"]]) and not wrong["that hold no weights"]:
        return "Is it a body without a classifier? Then load it as features: num_classes=0"
    return "Is it another architecture or size?"


def _wrong(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What is the matter -> the tensors, by name and with what is wrong of them."""
    both = [(k, state[k], own[k]) for k in own if k in state]
    return {
        "of another shape": [
            f"{k}: file {tuple(a.shape)}, model {tuple(b.shape)}" for k, a, b in both if a.shape != b.shape
        ],
        "that hold no weights": [
            f"{k}: {str(a.dtype).removeprefix('torch.')}"
            for k, a, b in both
            if b.is_floating_point() and not a.is_floating_point()
        ],
        "missing": [k for k in own if k not in state],
        "unknown": [k for k in state if k not in own and state[k].is_floating_point()],
    }


def classes_in(state: dict[str, Tensor], module: Any) -> int | None:
    """Size of the classifier in a state dict, by the name that the architecture gives its classifier."""
    names = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or "head"
    weight = state.get(f"{names if isinstance(names, str) else names[0]}.weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else None
