"""Grids of experiments: `evaluate` measures one model, `run_study` many, and the store keeps every finished cell.

Nothing heavy is imported here: names are resolved when they are first used. The functions `evaluate` and `aggregate`
live in the modules of the same names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlens.studies.cells import plan_study
    from quantlens.studies.config import StudyConfig, load_config
    from quantlens.studies.evaluate import Result
    from quantlens.studies.runner import Summary, run_study
    from quantlens.studies.store import Cell, Store

_HOMES = {
    "Cell": "store",
    "Result": "evaluate",
    "Store": "store",
    "StudyConfig": "config",
    "Summary": "runner",
    "load_config": "config",
    "plan_study": "cells",
    "run_study": "runner",
}

__all__ = [
    "Cell",
    "Result",
    "Store",
    "StudyConfig",
    "Summary",
    "load_config",
    "plan_study",
    "run_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
