"""Mixed precision: how sensitive every module is, what its bits cost, and the choice of widths under a budget; and
inspection: what every site does to the output when it alone is quantized."""

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
from quantlens.allocation.inspection import Inspection, inspect

__all__ = [
    "SENSITIVITIES",
    "Allocation",
    "FrontPoint",
    "Group",
    "GroupChoice",
    "Inspection",
    "allocate",
    "default_candidates",
    "find_groups",
    "inspect",
    "is_target",
    "parse_target",
    "sensitivity_options",
]
