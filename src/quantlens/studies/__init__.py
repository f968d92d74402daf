"""Grids of experiments: `run_study` measures many models, and the store keeps every finished cell.

Nothing heavy is imported here: names are resolved when they are first used.
"""

from typing import TYPE_CHECKING, Any

from quantlens import _moved

if TYPE_CHECKING:
    from quantlens.studies.cells import plan_study
    from quantlens.studies.config import StudyConfig, load_config
    from quantlens.studies.runner import Summary, run_study
    from quantlens.studies.store import Cell, Store

_HOMES = {
    "Cell": "store",
    "Store": "store",
    "StudyConfig": "config",
    "Summary": "runner",
    "load_config": "config",
    "plan_study": "cells",
    "run_study": "runner",
}

__all__ = [
    "Cell",
    "Store",
    "StudyConfig",
    "Summary",
    "load_config",
    "plan_study",
    "run_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        return _moved.find(__name__, name)
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
