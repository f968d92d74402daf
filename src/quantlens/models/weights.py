"""Checkpoint files: read safely, named by their SHA-256, checked for NaN, fitted to a model with a clear word when
they do not fit."""

import hashlib
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlens.errors import BadWeightsError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a state dict in name order: for models that come from no file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth, .pt or .bin file (tensors only: nothing in the file is executed).

    Raises BadWeightsError: missing file, unknown ending, damaged content, or a pickle that holds more than tensors.
    """
    check_path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadWeightsError(
            f"{path} cannot be read as weights: {first_line(error)} "
            "(it must hold tensors only: save a state_dict, best as .safetensors)"
        ) from error
    state = _unwrap(content)
    if not state:
        raise BadWeightsError(f"{path} holds no state_dict of tensors")
    return state


def first_line(error: Exception) -> str:
    """What another package's error says, shortened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def check_path(path: Path) -> None:
    if not path.is_file():
        raise BadWeightsError(
            f"no weights file at {path}; give a file ending in {', '.join(SUFFIXES)}, or 'pretrained'"
        )
    if path.suffix not in SUFFIXES:
        raise BadWeightsError(f"{path}: unknown ending {path.suffix!r}; known are {', '.join(SUFFIXES)}")


def _unwrap(content: Any) -> dict[str, Tensor]:
    """Find the state dict in the containers that training code puts around it."""
    for _ in range(3):
        if not isinstance(content, Mapping):
            return {}
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in _PREFIXES:
        if state and all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Raise BadWeightsError naming the first tensor that holds NaN or infinity."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise BadWeightsError(
                f"{origin}: {bad} of {value.numel()} values of {name!r} are NaN or infinite; the file is damaged"
            )


def adapt(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Names as the model has them: the architecture's own translation (timm's ``checkpoint_filter_fn``) where names
    differ."""
    translate = getattr(sys.modules.get(type(module).__module__), "checkpoint_filter_fn", None)
    if translate is not None and set(state) != set(module.state_dict()):
        with suppress(Exception):
            return translate(dict(state), module)
    return state


def fit(module: nn.Module, state: dict[str, Tensor], origin: str, name: str) -> None:
    """Load ``state`` strictly. Raises BadWeightsError that says what is missing, unknown or of another shape."""
    own = module.state_dict()
    both = [k for k in own if k in state and own[k].shape != state[k].shape]
    wrong = {
        "of another shape": [f"{k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}" for k in both],
        "missing": [k for k in own if k not in state],
        "unknown": [k for k in state if k not in own],
    }
    parts = [f"{len(k)} {what} ({', '.join(k[:3])}{' …' if len(k) > 3 else ''})" for what, k in wrong.items() if k]
    if parts:
        raise BadWeightsError(
            f"{origin} does not fit {name}: of {len(own)} tensors {'; '.join(parts)}. "
            "Is it another architecture or size?"
        )
    module.load_state_dict(state, strict=True)
