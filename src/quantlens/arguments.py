"""Arguments of public calls: one of a wrong kind is refused in a sentence, before anything is done."""

import errno
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

from quantlens.errors import QuantlensError

Given = ParamSpec("Given")
Found = TypeVar("Found")
Kind = tuple[str, Callable[[Any], bool]]
"""What it is called, and whether a value is one."""


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


KINDS: dict[Any, Kind] = {
    NoneType: ("None", lambda value: value is None),
    str: ("a text", lambda value: isinstance(value, str)),
    int: ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: ("a number", _is_number),
    Callable: ("a function", callable),
    Mapping: ("a dictionary", lambda value: isinstance(value, Mapping)),
    **dict.fromkeys((Sequence, list, tuple), ("a list", _is_list)),
    **dict.fromkeys((Path, PathLike), ("a path", lambda value: isinstance(value, PathLike))),
}
"""The plain kinds of annotations; an argument that may be of another is checked where it is read."""


def checked(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Decorator: arguments whose annotation is a plain kind (:data:`KINDS`), or some of them, are of it when the
    function is called. Raises QuantlensError."""
    parameters = signature(function).parameters.values()
    parts = {one.name: _parts(one.annotation) for one in parameters if one.kind is not Parameter.VAR_KEYWORD}
    kinds = {name: _kinds(several) for name, several in parts.items()}
    paths = {
        name
        for name, several in parts.items()
        if any((get_origin(part) or part) in (Path, PathLike) for part in several)
    }

    @wraps(function)
    def inside(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        for name, value in [*zip(kinds, args), *kwargs.items()]:  # noqa: B905 (too many are refused by the call)
            wanted = kinds.get(name)
            if wanted and not any(fits(value) for _, fits in wanted):
                raise QuantlensError(f"{name} is {_said(value)}; give {' or '.join(text for text, _ in wanted)}")
            if name in paths and isinstance(value, str | PathLike):
                _check_path(name, value)
        return function(*args, **kwargs)

    return inside


def _check_path(name: str, value: str | PathLike[str]) -> None:
    """Raises QuantlensError for what cannot be the path of a file on this system."""
    try:
        os.lstat(value)
    except ValueError as error:
        raise QuantlensError(f"{name} {shortened(value)} is no path: {error}; leave that character out") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise QuantlensError(f"{name} {str(value)[:40]}… is too long for the name of a file") from error


def _parts(annotation: Any) -> Sequence[Any]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]


def _kinds(parts: Sequence[Any]) -> list[Kind]:
    """What an annotation allows; empty: anything."""
    found = []
    for part in parts:
        kind, (within, *_) = KINDS.get(get_origin(part) or part), [*get_args(part), None]
        if kind is None:
            return []
        found.append(_of(kind, KINDS[within]) if kind[0] in ("a list", "a dictionary") and within in KINDS else kind)
    return found


def _of(kind: Kind, within: Kind) -> Kind:
    """A list of a kind, a dictionary with such keys; what can be read only once is not looked into."""
    (text, fits), (inner, fit) = kind, within
    inner = inner.removeprefix("a ") + "s"
    text = f"{text} of {inner}" if text == "a list" else f"{text} whose keys are {inner}"
    return text, lambda value: fits(value) and (not isinstance(value, Collection) or all(map(fit, value)))


def _said(value: Any) -> str:
    """A value in a sentence: as Python writes it where that is short, else its type."""
    plain = value is None or isinstance(value, str | bytes | Real | list | tuple | dict)
    return shortened(value) if plain else f"a {type(value).__name__}"
