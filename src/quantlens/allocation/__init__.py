"""Mixed precision: how sensitive every module is, what its bits cost, and the choice of widths under a budget."""

from quantlens import _moved
from quantlens.allocation.allocation import (
    Allocation,
    FrontPoint,
    GroupChoice,
    default_candidates,
    is_target,
    parse_target,
)
from quantlens.allocation.choosing import SENSITIVITIES, allocate, sensitivity_options
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


__getattr__ = _moved.finder(__name__)
