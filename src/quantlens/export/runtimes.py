"""The runtimes' packages: found where they are wanted, and what they say of a file in a sentence."""

import functools
import re
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from quantlens.arguments import checked
from quantlens.errors import BadWeightsError, QuantlensError, first_line

Given = ParamSpec("Given")
Found = TypeVar("Found")

OLDEST = {"onnx": "1.17", "onnxruntime": "1.20", "openvino": "2024.6"}
"""The first versions that have what the files need (operator set 21 with its 4-bit integers)."""

INSTALL = "pip install --upgrade 'quantlens[deploy]' (with the project's constraints)"


def need(package: str) -> Any:
    """A package of the ``deploy`` extra. Raises QuantlensError where it is missing or too old, saying how to get it."""
    try:
        found = import_module(package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise QuantlensError(f"the package {package} is not installed: {INSTALL}") from None
        raise QuantlensError(f"the package {package} cannot be imported ({first_line(error)}): {INSTALL}") from error
    version, oldest = str(getattr(found, "__version__", "")), OLDEST.get(package, "0")
    if _numbers(version) < _numbers(oldest):
        raise QuantlensError(f"{package} {version} is too old, files need {oldest} or later: {INSTALL}")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version; of what is none, more than any."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else (10**9,)


@functools.cache
def openvino_core() -> Any:
    """The one core of OpenVINO in a process. Each gives the main thread a stack for signals and takes it back when it
    ends; of two that end as they began, one leaves a freed one behind, and the next Ctrl-C is a segmentation fault."""
    return need("openvino").Core()


def openvino_settings(threads: int | None, own: bool, saturates: bool) -> dict[str, Any]:
    """What OpenVINO compiles a model with. own: nothing but the threads. saturates: whether 8-bit sums do here."""
    counted = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    if own:
        return counted
    # float32 where the model is float: some CPUs would take bfloat16 by default, which is not what was measured
    # and no 8-bit activations that nobody measured, which it makes itself before layers with integer weights
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "PERFORMANCE_HINT": "LATENCY",
    }
    # without VNNI, OpenVINO saturates in its integer kernels, slower than float: the same codes in float operations
    return settings | ({"LP_TRANSFORMS_MODE": False} if saturates else {}) | counted


def isolated(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """As :func:`quantlens.ambient.isolated`, in a process that may do without torch: where it is not imported, nothing
    of it is set."""

    @wraps(function)
    def inside(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        if "torch" not in sys.modules:
            return function(*args, **kwargs)
        from quantlens.ambient import isolation

        with isolation():
            return function(*args, **kwargs)

    return checked(inside)


PLACES = (
    re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : "),
    re.compile(r"^Load model from .{1,300}? failed:"),
    re.compile(r"^/\S+\.(?:cc|h|cpp):\d+ .{1,600}?\) (?=[A-Z])"),
    re.compile(
        r"^ONNX Runtime only \*guarantees\* support for models stamped with official released onnx opset versions\. "
    ),
)
"""What ONNX Runtime's errors begin with, and tells a person nothing."""


def reason_of(error: Exception) -> str:
    """What a runtime's error says of a file, without places in its source."""
    said = " ".join(str(error).split())
    for place in PLACES:
        said = place.sub("", said)
    return first_line(error if said == " ".join(str(error).split()) else Exception(said))


def refused(path: Path, runtime: str, error: Exception) -> BadWeightsError:
    """Why a runtime cannot run a file, from what it raised."""
    reason, own = reason_of(error), re.search(r"([\w.]+:\w+)\(-?\d+\) is not a registered function", str(error))
    if own is not None:
        reason = (
            f"it has no operator {own[1]}; open the file with the library of its maker, and give "
            "quantlens.open_foreign a function of images that runs it"
        )
    elif isinstance(error, KeyError | TypeError | AttributeError | AssertionError | ValueError | EOFError):
        reason = f"it is damaged, or of another version ({reason})"
    elif "warnings above" in reason:  # torch's, which are not shown
        reason = "it is damaged, or of another version"
    elif re.search(r"IR version|[Oo]pset \d+ is under development", reason):
        reason = f"it needs a later version ({reason.partition(' and support')[0]})"
    return BadWeightsError(f"{path} cannot be run by {runtime}: {reason}")
