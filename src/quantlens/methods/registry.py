"""Methods by name. Every module of this folder that defines a :class:`Method` with an ``info`` is found by itself; so
is one in a plugin (:mod:`quantlens.plugins`); any other is added with :func:`register`."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.methods.base import Method, MethodInfo
from quantlens.plugins import Registry

DEFAULT = "quantlens-fast"
"""What quantizes a model where no method is named."""


def register(method: type[Method]) -> type[Method]:
    """Add a method class under its name and aliases (usable as a decorator). Raises QuantlensError for a class that is
    no method, and for a name that is taken by another class."""
    if not (
        isinstance(method, type)
        and issubclass(method, Method)
        and isinstance(getattr(method, "info", None), MethodInfo)
        and not method.__abstractmethods__
    ):
        name = getattr(method, "__name__", repr(method))
        raise QuantlensError(f"{name} is no method: derive it from Method, and give it `info` and `build`")
    _METHODS.add(method, *map(_key, (method.info.name, *method.info.aliases)))
    return method


def available() -> dict[str, MethodInfo]:
    """All methods by name (aliases left out), in alphabetical order."""
    found = {key: method.info for key, method in _METHODS.all().items() if _key(method.info.name) == key}
    return {found[key].name: found[key] for key in sorted(found)}


def get(name: str) -> Method:
    """A method by name or alias (case and underscores do not matter). Raises UnknownNameError."""
    return _METHODS.get(_key(name), asked=name)()


def place(name: str) -> str:
    """The plugin that the method of a known name comes from; "" for quantlens."""
    return _METHODS.place(_key(name))


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _scan() -> None:
    package = importlib.import_module("quantlens.methods")
    for module in pkgutil.iter_modules(package.__path__):
        _adopt("", importlib.import_module(f"quantlens.methods.{module.name}"))


def _adopt(name: str, found: Any) -> None:
    """Register a method, or those that a module defines."""
    if isinstance(found, ModuleType):
        for value in vars(found).values():
            is_method = isinstance(value, type) and issubclass(value, Method) and "info" in vars(value)
            if is_method and value.__module__ == found.__name__:
                register(value)
    else:
        register(found)


_METHODS: Registry[type[Method]] = Registry(
    "method", "quantlens.methods", hint="`quantlens methods` lists them", own=_scan, adopt=_adopt
)
