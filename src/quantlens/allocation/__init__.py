"""Mixed precision: how sensitive every module is, what its bits cost, and the choice of widths under a budget."""

from quantlens import _moved
from quantlens.allocation.allocation import (
    SENSITIVITIES,
    Allocation,
    FrontPoint,
    GroupChoice,
    allocate,
    default_candidates,
    is_target,
    parse_target,
    sensitivity_options,
)
from quantlens.allocation.groups import Group, find_groups

__all__ = [
    "SENSITIVITIES",
    "Allocation",
    "FrontPoint",
    "Group",
    "GroupChoice",
    "allocate",
    "default_candidates",
    "find_groups",
    "is_target",
    "parse_target",
    "sensitivity_options",
]


def __getattr__(name: str) -> object:
    """Names that have moved are found where they are now, with a warning."""
    return _moved.find(__name__, name)
