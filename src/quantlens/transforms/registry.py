"""Transforms by name: exact rewrites of a graph that say in words what they did."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from quantlens.graph import Graph
from quantlens.plugins import Registry

Transform = Callable[[Graph], list[str]]
"""Changes a graph in place and leaves its function as it is; returns a sentence for each thing it did (none: []), as
they stand in `Plan.rewrites`."""


def register(name: str) -> Callable[[Transform], Transform]:
    """Decorator that adds a transform. Raises QuantlensError for a name that is taken."""

    def add(transform: Transform) -> Transform:
        _TRANSFORMS.add(transform, name)
        return transform

    return add


def available() -> dict[str, Transform]:
    """All transforms by name, in alphabetical order."""
    return dict(sorted(_TRANSFORMS.all().items()))


def get(name: str) -> Transform:
    """A transform by name. Raises UnknownNameError."""
    return _TRANSFORMS.get(name)


def _adopt(name: str, found: Any) -> None:
    """Register a function that an entry point names."""
    if name and not isinstance(found, ModuleType):
        register(name)(found)


_TRANSFORMS: Registry[Transform] = Registry("transform", "quantlens.transforms", adopt=_adopt)
