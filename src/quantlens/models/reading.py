"""Checkpoint files: the state dict in whatever training code put around it, read without running anything of the file.

A pickle names the functions and classes that it is made of. Tensors and numpy's values are rebuilt; every other class
has a stand-in that only holds what it is given; a file that names anything else of Python's own library is refused.
"""

import json
import pickletools
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # type: ignore[import-not-found]
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from quantlens.errors import BadWeightsError, QuantlensWarning

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".npz", ".json")
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

AVERAGED = ("state_dict_ema", "params_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model_state", "model", "module", "teacher", "net", "network")
"""Where training code keeps the weights, the likeliest first: averaged weights before the others, as timm has it."""

FAULTS = (
    *(OSError, RuntimeError, UnpicklingError, SafetensorError, zipfile.BadZipFile, EOFError, StructError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, NotImplementedError),
)
"""What the readers of damaged files raise."""


class _Held:
    """In place of a class of a pickle: makes a dictionary of what an object was given, which does nothing; the object's
    attributes become its attributes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict(args[0] if len(args) == 1 and isinstance(args[0], Mapping) else ())


def _held_list(*args: Any) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], list | tuple) else []


_ARRAYS = import_module("numpy._core.multiarray" if int(np.__version__.split(".")[0]) > 1 else "numpy.core.multiarray")
_NUMPY = {
    f"numpy.{core}.multiarray.{name}": getattr(_ARRAYS, name)
    for core in ("core", "_core")
    for name in ("_reconstruct", "scalar")
} | {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
_LISTS = ("collections.deque", "collections.UserList", "builtins.list", "builtins.frozenset")
_HARMLESS = re.compile(
    r"(argparse|pathlib|datetime|collections|types\.SimpleNamespace|decimal|fractions|uuid|enum|functools\.partial|"
    r"copyreg|logging|random|builtins\.(dict|object|tuple|int|float|str|bool|bytes|range|slice|type))\b"
)
"""Of Python's own library, what checkpoints hold beside weights."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file (tensors only: nothing in the file is executed): .safetensors, whatever
    ``torch.save`` wrote, the index .json of one that was split, or a folder of Hugging Face with one of these. A
    warning says what was taken where there is more than a state dict.

    Raises BadWeightsError: missing file, unknown ending, damaged content, or a pickle that would run code.
    """
    check_path(path)
    if path.is_dir():
        path = next(path / name for name in FOLDER_FILES if (path / name).is_file())
    if foreign := _foreign(path):
        raise BadWeightsError(f"{path} cannot be read as weights: it is {foreign}")
    try:
        if path.suffix == ".json":
            content: Any = _read_split(path)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        elif path.suffix == ".npz":
            content = dict(np.load(path, allow_pickle=False))
        else:
            content = _read_pickle(path)
    except FAULTS as error:
        raise BadWeightsError(
            f"{path} cannot be read as weights: {_reason(error)} "
            "(it must hold tensors only: save a state_dict, best as .safetensors)"
        ) from error
    state, told = _found(content)
    if not state:
        raise BadWeightsError(f"{path} holds no state_dict of tensors")
    state = {key: value.to_dense() if value.layout != torch.strided else value for key, value in state.items()}
    quantized = next((key for key, value in state.items() if value.is_quantized), None)
    if quantized is not None:
        raise BadWeightsError(f"{path}: {quantized!r} is a quantized tensor; give the float model's weights")
    if told:
        warnings.warn(f"{path}: {told}", QuantlensWarning, stacklevel=2)
    return state


def check_path(path: Path) -> None:
    """Raise BadWeightsError where there is no file of weights."""
    if path.is_dir():
        if not any((path / name).is_file() for name in FOLDER_FILES):
            raise BadWeightsError(f"the folder {path} holds none of {', '.join(FOLDER_FILES)}")
    elif not path.is_file():
        raise BadWeightsError(
            f"no weights file at {path}; give a file ending in {', '.join(SUFFIXES)}, or 'pretrained'"
        )
    elif path.suffix not in SUFFIXES:
        raise BadWeightsError(f"{path}: unknown ending {path.suffix!r}; known are {', '.join(SUFFIXES)}")


_BEGINNINGS = {
    b"<": "a web page: what was downloaded is not the file itself",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
}


def _foreign(path: Path) -> str:
    """What a file is that holds no weights, by its first bytes; nothing where that is not known."""
    with path.open("rb") as stream:
        first = stream.read(64).lstrip()
    if not first:
        return "empty"
    if first.startswith(b"PK") and zipfile.is_zipfile(path) and path.suffix != ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                packed = any(name.endswith("data.pkl") for name in archive.namelist())
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            return f"a damaged archive ({first_line(error)})"
        return "" if packed else "an archive of other files: unpack it first"
    return next((what for beginning, what in _BEGINNINGS.items() if first.startswith(beginning)), "")


def first_line(error: Exception) -> str:
    """What another package's error says, shortened, without the colours of a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _reason(error: Exception) -> str:
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1].split(" Please use ")[0].strip() if found else first_line(error)


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_split(path: Path) -> dict[str, Tensor]:
    index = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise BadWeightsError(f"{path} is no index of a checkpoint in several files")
    state: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise BadWeightsError(f"{path} names the file {name}, which does not lie beside it")
        state |= read_state(path.parent / name)
    return state


def _read_pickle(path: Path) -> Any:
    allowed: list[Any] = [(value, name) for name, value in _NUMPY.items()]
    allowed += [(kind, f"numpy.dtypes.{name}") for name, kind in vars(np.dtypes).items() if name.endswith("DType")]
    for name in _globals(path):
        module = name.split(".")[0]
        if name in _LISTS:
            allowed.append((_held_list, name))
        elif re.match(r"torch\.(_(?!C\._nn)|storage|serialization|distributed\.tensor)", name):
            pass  # of these, torch itself says which are safe
        elif (module != "numpy" and module not in sys.stdlib_module_names) or _HARMLESS.match(name):
            allowed.append((_Held, name))
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)


def _globals(path: Path) -> set[str]:
    """Names of what the pickles in a file of ``torch.save`` are made of."""
    found: set[str] = set()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            for name in names[:1]:
                with archive.open(name) as stream:
                    found.update(_named(stream))
        return found
    with path.open("rb") as stream:
        for _ in range(4):  # a magic number, a version, the machine, and what was saved
            found.update(_named(stream))
    return found


def _named(stream: Any) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"


# ---- what a file holds -----------------------------------------------------------------------------------------------


def _found(content: Any) -> tuple[dict[str, Tensor], str]:
    """(state dict, what to tell of how it was found)."""
    told: list[str] = []
    for _ in range(4):
        if _is_module(content):
            told.append("a whole module, of which the tensors were taken")
            content = dict(_of_module(content, ""))
        if isinstance(content, Sequence) and content and all(isinstance(v, Tensor) for v in content):
            return {str(i): value for i, value in enumerate(content)}, "a list of tensors, taken in the model's order"
        if not isinstance(content, Mapping):
            return {}, ""
        key = _inner(content)
        if key is None:
            break
        left = [str(k) for k in content if k != key]
        more = " (averaged weights)" if key in AVERAGED else ""
        if left or more:
            told.append(f"took {str(key)!r}{more}{f', not {_few(left)}' if left else ''}")
        content = content[key]
    tensors = ((str(k), torch.from_numpy(v) if _is_array(v) else v) for k, v in content.items())
    return {k: v for k, v in tensors if isinstance(v, Tensor)}, "; ".join(told)


def _inner(content: Mapping[Any, Any]) -> Any:
    """The key of a mapping under which its weights lie; None where it is the state dict itself."""

    def count(value: Any, depth: int = 3) -> int:
        if _is_module(value):
            return 1 << 20
        if not isinstance(value, Mapping) or not depth or not all(isinstance(key, str) for key in value):
            return 0  # names of parameters are texts; numbers are an optimizer's
        return sum(
            isinstance(v, Tensor) or _is_array(v) or count(v, depth - 1) for k, v in value.items() if "optim" not in k
        )

    likely = next((key for key in WRAPPERS if key in content and count(content[key])), None)
    if likely is not None:
        return likely
    own = sum(isinstance(v, Tensor) or _is_array(v) for v in content.values())
    counts = {key: count(value) for key, value in content.items() if "optim" not in str(key)}
    best = max(counts, key=lambda key: counts[key], default=None)
    return best if best is not None and counts[best] > own else None


def _is_module(value: Any) -> bool:
    """Whether this is what is held of a module that was pickled whole."""
    return type(value) is OrderedDict and isinstance(vars(value).get("_modules"), Mapping)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def _of_module(held: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module that was pickled whole, under the names of its state dict."""
    own = vars(held)
    left_out = own.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (own.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in left_out:
                yield f"{prefix}{name}", value.detach()
    for name, child in (own.get("_modules") or {}).items():
        if _is_module(child):
            yield from _of_module(child, f"{prefix}{name}.")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
