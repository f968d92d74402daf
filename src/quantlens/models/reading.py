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
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantlens.errors import BadWeightsError, QuantlensWarning, UnsupportedError, first_line
from quantlens.files import mistaken

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".pyth", ".pkl", ".npz", ".json")
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

AVERAGED = re.compile(r"(^|_)ema([._]|$)|^shadow(_params)?$")
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "teacher", "net", "network")
"""Where training code keeps the weights, the likeliest first, after averaged weights, as timm has it."""

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
    kind, foreign = _kind(path)
    if foreign:
        raise BadWeightsError(f"{path} cannot be read as weights: it is {foreign}")
    try:
        content = _READERS[kind](path)
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
    elif path.suffix.lower() not in SUFFIXES:
        raise BadWeightsError(f"{path}: unknown ending {path.suffix!r}; known are {', '.join(SUFFIXES)}")


def refuse_as_name(path: Path) -> None:
    """Raise UnsupportedError for a file or folder where the name of a float model is wanted, with what it is."""
    if not path.exists() and path.suffix.lower() not in (*SUFFIXES, ".onnx", ".xml", ".pt2"):
        return
    what = _kind(path)[1] if path.is_file() else ""
    if path.is_file() and _is_ours(path):
        what = "a checkpoint that quantlens quantized (quantlens.load opens it)"
    hint = "give its weights beside the name (--weights FILE), or a folder of save_pretrained as hf:DIR"
    if "opens it" in what:
        hint = "in Python, `evaluate` and `compare` take the module that it opens as"
    raise UnsupportedError(
        f"{path} is {what or 'a file or folder'}, and the name of a float model is wanted here; {hint}"
    )


PROGRAMS = (
    ("constants.pkl", "a program of TorchScript (torch.jit.load opens it)"),
    ("serialized_exported_program.json", "a program of torch.export (torch.export.load(…).module() opens it)"),
    ("archive_format", "a program of torch.export (torch.export.load(…).module() opens it)"),
)
"""Files inside an archive that torch wrote -> what such an archive is."""


def _kind(path: Path) -> tuple[str, str]:
    """("safetensors", "npz", "json" or "pickle", what else the file is: "" where it may hold weights), by its content;
    by its name where that does not tell."""
    named = {".safetensors": "safetensors", ".npz": "npz", ".json": "json"}.get(path.suffix.lower(), "pickle")
    with path.open("rb") as stream:
        first = stream.read(9)
    if first.startswith(b"PK"):
        return _of_archive(path, named)
    if what := mistaken(path):
        return named, what
    if first[8:] == b"{" and int.from_bytes(first[:8], "little") < path.stat().st_size:
        return "safetensors", ""
    return ("pickle" if first.startswith(b"\x80") else named), ""


def _of_archive(path: Path, named: str) -> tuple[str, str]:
    if not zipfile.is_zipfile(path):
        return named, "an archive without its end: copy or download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        return named, f"a damaged archive ({first_line(error)})"
    for ending, what in PROGRAMS:
        if any(name.rpartition("/")[2] == ending for name in names):
            return named, what
    if any(name.endswith("data.pkl") for name in names):
        return "pickle", ""
    arrays = bool(names) and all(name.endswith(".npy") for name in names)
    return ("npz", "") if arrays or named == "npz" else (named, "an archive of other files: unpack it first")


def _reason(error: Exception) -> str:
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1].split(" Please use ")[0].strip() if found else first_line(error)


# ---- files -----------------------------------------------------------------------------------------------------------


def _is_ours(path: Path) -> bool:
    """Whether a file is a quantized checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == "quantlens"
    except SafetensorError:
        return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if _is_ours(path):
        raise BadWeightsError(
            f"{path} is a checkpoint that quantlens quantized (quantlens.load opens it); give the float model's weights"
        )
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


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
    with torch.serialization.safe_globals(allowed), path.open("rb") as stream:  # of a path, torch goes by the ending
        return torch.load(stream, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": _read_safetensors,
    "npz": lambda path: dict(np.load(path, allow_pickle=False)),
    "json": _read_split,
    "pickle": _read_pickle,
}


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
            told.append("a list of tensors, taken in the model's order")
            return {str(i): value for i, value in enumerate(content)}, "; ".join(told)
        if not isinstance(content, Mapping):
            return {}, ""
        key = _inner(content)
        if key is None:
            break
        left = [str(k) for k in content if k != key]
        more = " (averaged weights)" if AVERAGED.search(str(key)) else ""
        if left or more:
            told.append(f"took {str(key)!r}{more}{f', not {few(left)}' if left else ''}")
        content = content[key]
    tensors = ((str(k), torch.from_numpy(v) if _is_array(v) else v) for k, v in content.items())
    return {k: v for k, v in tensors if isinstance(v, Tensor)}, "; ".join(told)


def _inner(content: Mapping[Any, Any]) -> Any:
    """The key of a mapping under which its weights lie; None where it is the state dict itself."""

    def count(value: Any, depth: int = 3) -> int:
        if _is_module(value):
            return 1 << 20
        if isinstance(value, list | tuple) and depth == 3:  # averages of weights are kept so
            return len(value) if all(isinstance(v, Tensor) for v in value) else 0
        if not isinstance(value, Mapping) or not depth or not all(isinstance(key, str) for key in value):
            return 0  # names of parameters are texts; numbers are an optimizer's
        return sum(
            isinstance(v, Tensor) or _is_array(v) or count(v, depth - 1) for k, v in value.items() if "optim" not in k
        )

    averaged = (key for key in content if AVERAGED.search(str(key)))
    likely = next((key for key in (*averaged, *WRAPPERS) if key in content and count(content[key])), None)
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


def few(names: Sequence[str]) -> str:
    """Some names, and how many there are more."""
    shown = ", ".join(map(repr, names[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
