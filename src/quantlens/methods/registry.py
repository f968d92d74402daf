"""Methods by name. Every module of this folder that defines a :class:`Method` with an ``info`` is found by itself; a
method that lives elsewhere is added with :func:`register`."""

from __future__ import annotations

import importlib
import pkgutil

from quantlens.errors import UnknownNameError
from quantlens.methods.base import Method, MethodInfo

DEFAULT = "quantlens-fast"
"""What quantizes a model where no method is named."""

_METHODS: dict[str, type[Method]] = {}
_HELPERS = {"base", "calibration", "registry"}
_scanned = False


def register(method: type[Method]) -> type[Method]:
    """Add a method class under its name and aliases (usable as a decorator). A name in use is replaced only by the
    same class."""
    for name in (method.info.name, *method.info.aliases):
        known = _METHODS.get(name)
        if known is not None and known.__qualname__ != method.__qualname__:
            raise ValueError(f"method name {name!r} is taken by {known.__qualname__}")
        _METHODS[name] = method
    return method


def _scan() -> None:
    global _scanned
    if _scanned:
        return
    _scanned = True
    package = importlib.import_module("quantlens.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name in _HELPERS or module.name.startswith("_"):
            continue
        found = importlib.import_module(f"quantlens.methods.{module.name}")
        for value in vars(found).values():
            if (
                isinstance(value, type)
                and issubclass(value, Method)
                and value.__module__ == found.__name__
                and "info" in vars(value)
            ):
                register(value)


def available() -> dict[str, MethodInfo]:
    """All methods by name (aliases left out), in alphabetical order."""
    _scan()
    return {name: _METHODS[name].info for name in sorted(_METHODS) if _METHODS[name].info.name == name}


def get(name: str) -> Method:
    """A method by name or alias (case and underscores do not matter). Raises UnknownNameError."""
    _scan()
    key = name.strip().lower().replace("_", "-")
    if key not in _METHODS:
        raise UnknownNameError("method", name, _METHODS, "`quantlens methods` lists them")
    return _METHODS[key]()
