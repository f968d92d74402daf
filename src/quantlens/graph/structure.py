"""What a model takes and returns besides one tensor: arguments by name, constants, tuples, dictionaries, outputs of
Hugging Face models; as plain data, so that a checkpoint says it too.

A description is ``{"tensor": 3}`` (one of the graph's inputs or outputs, counted from 0), ``{"value": None}``,
``{"tuple": […]}``, ``{"list": […]}``, ``{"dict": [[key, …], …]}`` or ``{"object": class, "fields": [[name, …], …]}``,
with ``"named": True`` for a named tuple.
"""

import dataclasses
import importlib
import inspect
import re
from collections import OrderedDict, namedtuple
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import SymInt, Tensor
from torch.utils import _pytree as pytree

from quantlens.errors import BadWeightsError, CaptureError, QuantlensError

PLAIN = (bool, int, float, str, type(None))
KINDS = {kind.name: kind for kind in inspect._ParameterKind}
_OUTPUTS = re.compile(r"(transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+))\.(\w+)")
"""Classes that a checkpoint may name."""

FIRST = ("logits", "pred_logits", "image_embeds", "pooler_output")
"""Names of the output that is measured, where a model returns several."""


class Fields(OrderedDict):
    """What a model returns, by name, attribute or position: in place of a class that is not there."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the model returns {', '.join(self)}, and no {name}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for value in self.values() if value is not None)


class Placed:
    """The place of a tensor among the graph's inputs or outputs, within a structure."""

    def __init__(self, number: int):
        self.number = number


class _Opened:
    """A dataclass as torch sees it: what its fields hold; put together it is the dataclass again."""

    def __init__(self, value: Any):
        self.kind = type(value)
        self.fields = {f.name: opened(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _closed(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    made: Any = object.__new__(context[0])
    for name, value in zip(context[1], values, strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(
    _Opened,
    lambda value: (list(value.fields.values()), (value.kind, tuple(value.fields))),
    _closed,
)


def opened(value: Any) -> Any:
    """A structure whose dataclasses torch can take apart too."""
    return pytree.tree_map(
        lambda leaf: _Opened(leaf) if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) else leaf, value
    )


def describe(value: Any) -> Any:
    """The description of a structure that holds plain values and, in place of its tensors, :class:`Placed`. Raises
    CaptureError for anything else."""
    if isinstance(value, Placed):
        return {"tensor": value.number}
    if isinstance(value, PLAIN):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [describe(v) for v in value]}
    if type(value) is dict and all(isinstance(key, PLAIN) for key in value):
        return {"dict": [[key, describe(v)] for key, v in value.items()]}
    fields = _fields(value)
    if fields is None:
        kind = f"a {type(value).__name__}" if not isinstance(value, SymInt) else "a number made of the batch size"
        raise CaptureError(f"{kind} among what the model takes or returns is not understood: give and return tensors")
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    named = {"named": True} if hasattr(value, "_fields") else {}
    return {"object": path, "fields": [[name, describe(v)] for name, v in fields.items()], **named}


def _fields(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        return {str(name): v for name, v in value.items()}
    if hasattr(value, "_fields"):  # a named tuple
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(enumerate(value)) if isinstance(value, list | tuple) else None  # type: ignore[arg-type]


def build(description: Any, tensors: Sequence[Any]) -> Any:
    """The structure that a description describes, with tensors in their places."""
    (kind, content), *_ = description.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](build(v, tensors) for v in content)
    if kind == "dict":
        return {key: build(v, tensors) for key, v in content}
    if kind == "object":
        fields = {name: build(v, tensors) for name, v in description["fields"]}
        if description.get("named"):
            return _named(content.split(".")[-1], tuple(fields))(**fields)
        return _class_named(content)(**fields)
    raise BadWeightsError(f"the checkpoint describes a value that is not understood: {kind!r}")


@cache
def _named(name: str, fields: tuple[str, ...]) -> Any:
    """A kind of named tuple in place of one that is not there; its values are also found by ``[name]``."""
    kind: Any = namedtuple(name, fields)  # type: ignore[misc]
    kind.__getitem__ = lambda self, key: getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)  # type: ignore[method-assign]
    return kind


def _class_named(path: str) -> Any:
    """A class of outputs of transformers, where that is installed; :class:`Fields` for any other."""
    match = _OUTPUTS.fullmatch(path)
    if match is not None:
        try:
            from transformers.utils import ModelOutput

            found = getattr(importlib.import_module(match[1]), match[2], None)
        except ImportError:
            found = None
        if isinstance(found, type) and issubclass(found, ModelOutput):
            return found
    return Fields


def paths_of(description: Any, name: str = "") -> dict[int, str]:
    """Tensor -> where it is: ``logits``, ``hidden_states.3``; a tensor in several places by the first of them."""
    (kind, content), *_ = description.items()
    if kind == "tensor":
        return {content: name}
    if kind == "value":
        return {}
    parts = enumerate(content) if kind in ("tuple", "list") else content if kind == "dict" else description["fields"]
    found: dict[int, str] = {}
    for key, part in parts:
        found = paths_of(part, f"{name}.{key}" if name else str(key)) | found
    return found


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a captured model takes and returns.

    parameters: (name, kind) of the arguments of ``forward``, in order. takes: name -> description of an argument that
    was given; gives: of what is returned; their tensors are the graph's inputs and outputs by number. image, primary:
    the number of the images among the inputs, and of what is measured among the outputs. In the process that captured
    the model also example: the inputs that it was captured with; spec: how torch puts the outputs together.
    """

    parameters: tuple[tuple[str, str], ...] = (("images", "POSITIONAL_OR_KEYWORD"),)
    takes: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"images": {"tensor": 0}})
    gives: Any = dataclasses.field(default_factory=lambda: {"tensor": 0})
    image: int = 0
    primary: int = 0
    example: tuple[Tensor, ...] = dataclasses.field(default=(), compare=False)
    spec: tuple[Any, list[Any]] | None = dataclasses.field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        kept = ("parameters", "takes", "gives", "image", "primary")
        return {name: getattr(self, name) for name in kept}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> "Structure":
        """The inverse; of None (older files) images -> one tensor."""
        if data is None:
            return cls()
        parameters = tuple((str(name), str(kind)) for name, kind in data["parameters"])
        return cls(parameters, data["takes"], data["gives"], int(data["image"]), int(data["primary"]))

    @property
    def input_names(self) -> dict[int, str]:
        return paths_of({"dict": list(self.takes.items())})

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among arguments, in the order of the graph's inputs. What was a constant when the model was
        captured may be left out; a single tensor is that of the images. Raises QuantlensError for arguments that the
        captured model does not take."""
        names = self.input_names
        if len(args) == len(names) == 1 and not kwargs and isinstance(args[0], Tensor):
            return [args[0]]
        found: dict[int, Tensor] = {}
        try:
            given = bound(self.parameters, args, kwargs)
        except TypeError as error:
            raise QuantlensError(f"the model cannot be called like this: {error}") from error
        for name, value in given.items():
            if name in self.takes:
                _read(self.takes[name], value, name, found)
            elif not (value is None or value is False or value == {} or value == ()) and name != "return_dict":
                raise QuantlensError(_NOT_CAPTURED.format(name=name, value=_short(value), captured="nothing"))
        missing = [names[number] for number in names if number not in found]
        if missing:
            raise QuantlensError(f"the model also takes {', '.join(missing)}: give tensors, as when it was captured")
        return [found[number] for number in sorted(found)]

    def result(self, outputs: Sequence[Tensor]) -> Any:
        """What the module returns, made of the values of the graph's outputs."""
        if self.spec is None:
            return build(self.gives, outputs)
        spec, leaves = self.spec
        return pytree.tree_unflatten([outputs[v.number] if isinstance(v, Placed) else v for v in leaves], spec)


_NOT_CAPTURED = (
    "{name}={value} was not given when the model was captured ({captured} was): quantize it with calibration inputs "
    "that say so, such as [{{'pixel_values': images, '{name}': …}}]"
)


def _short(value: Any) -> str:
    large = isinstance(value, Tensor | Mapping | Sequence) or hasattr(value, "shape")
    return f"a {type(value).__name__}" if large else repr(value)


def _read(description: Any, value: Any, name: str, found: dict[int, Tensor]) -> None:
    """Put the tensors of ``value`` into ``found`` by their numbers. Raises QuantlensError where they are not so."""
    (kind, content), *_ = description.items()
    if kind == "tensor" and isinstance(value, Tensor):
        found[content] = value
    elif kind == "value":
        if not (value == content or (not content and (value is None or value is False))):
            raise QuantlensError(_NOT_CAPTURED.format(name=name, value=_short(value), captured=repr(content)))
    elif kind in ("tuple", "list") and isinstance(value, list | tuple) and len(value) == len(content):
        for number, (part, v) in enumerate(zip(content, value, strict=True)):
            _read(part, v, f"{name}.{number}", found)
    elif kind in ("dict", "object"):
        parts, fields = dict(content if kind == "dict" else description["fields"]), _fields(value)
        if fields is None or set(fields) != set(parts):
            raise QuantlensError(f"{name} must hold {', '.join(map(str, parts))}, as when the model was captured")
        for key, part in parts.items():
            _read(part, fields[key], f"{name}.{key}", found)
    else:
        raise QuantlensError(f"{name} is {_short(value)}; the model was captured with a {kind} there")


def parameters_of(forward: Any) -> tuple[tuple[str, str], ...]:
    """(name, kind) of the arguments of a module's ``forward``; whatever else it is called with is collected too."""
    found = [(p.name, p.kind.name) for p in inspect.signature(forward).parameters.values()]
    if all(kind != "VAR_KEYWORD" for _, kind in found):
        found.append(("others", "VAR_KEYWORD"))
    return tuple(found)


def bound(parameters: Sequence[tuple[str, str]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """name -> value of the arguments of a call, those that are collected by ``**`` under their own names. Raises
    TypeError as the call would."""
    signature = inspect.Signature(
        [inspect.Parameter(name, KINDS[kind], default=_default(kind)) for name, kind in parameters]
    )
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, kind in parameters:
        if kind == "VAR_KEYWORD":
            given |= given.pop(name, {})
    return given


def _default(kind: str) -> Any:
    return inspect.Parameter.empty if kind.startswith("VAR") else None


def boxes_of(gives: Any, shapes: Sequence[Sequence[Any]], primary: int) -> int | None:
    """Which of the outputs are a detector's boxes [B, Q, 4], beside class logits [B, Q, C]: the one named
    ``pred_boxes``, or the second of a tuple; None where there are none. shapes: of the outputs."""
    for number, name in paths_of(gives).items():
        fits = len(shapes[primary]) == 3 and tuple(shapes[number]) == (*shapes[primary][:2], 4)
        if fits and number != primary and name in ("pred_boxes", "1"):
            return number
    return None


def primary_of(gives: Any, shapes: Mapping[int, Sequence[Any]]) -> int:
    """Which of the outputs is measured: the one named in :data:`FIRST`, else the first [B, D], else the first."""
    names = {name: number for number, name in paths_of(gives).items()}
    wanted = [names[name] for name in FIRST if name in names]
    return next(iter([*wanted, *(n for n in sorted(shapes) if len(shapes[n]) == 2), *sorted(shapes)]))
