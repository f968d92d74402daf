"""One model on image sets → a result: metrics, per-image outputs, the comparison of two results.

Nothing heavy is imported here: names are resolved when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlens.evaluation.result import Result
    from quantlens.evaluation.run import evaluate

_HOMES = {"Result": "result", "evaluate": "run"}

__all__ = ["Result", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
