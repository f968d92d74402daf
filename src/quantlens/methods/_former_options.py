"""Options of methods that have another name now, and those that are gone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlens._moved import DROPPED
from quantlens.errors import QuantlensError

RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "quantlens-best": {"vectors": "train_norms_and_biases", "views": "views_per_image"},
}
"""Method -> old option -> new option."""

_DISTILLATION = "research/2026-11-29-distillation.md"
_WEIGHTS = "research/2026-11-29-rounding-or-weights.md"
_BLOCKS = "research/2026-11-29-quantlens-best-training.md"
_FAST = "research/2026-11-29-quantlens-best-start.md"

REMOVED_OPTIONS: dict[str, dict[str, str]] = {
    "quantlens-best": {
        **dict.fromkeys(("distillation", "distilled", "features", "plain", "strange"), _DISTILLATION),
        **dict.fromkeys(("train", "lr_weights"), _WEIGHTS),
        **dict.fromkeys(("loss", "lr_rounding", "lr_scales", "input_drop", "drop"), _BLOCKS),
        **dict.fromkeys(("fitted", "rotate", "centre", "norms", "hidden"), _FAST),
        **dict.fromkeys(("fit", "rounding", "damping", "block"), _FAST),
    },
}
"""Method -> option -> the page that tells what it gave."""

REMOVED_IN = "0.3"

_PACKAGE = str(Path(__file__).parents[1])


def current_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` options of a method under the names of today; an old name gets a DeprecationWarning. Raises
    QuantlensError for an option that is gone, and for one that is given under both names."""
    renamed, removed, found = RENAMED_OPTIONS.get(method, {}), REMOVED_OPTIONS.get(method, {}), dict(given)
    for old in given:
        if old in removed:
            raise QuantlensError(
                f"option {old} of {method} was removed in quantlens {REMOVED_IN}; {removed[old]} tells what it gave"
            )
        if old in renamed:
            new = renamed[old]
            if new in given:
                raise QuantlensError(f"{method}: {old} is the old name of {new}; give one of them")
            _warn(f"quantlens: option {old} of {method} is {new} now; quantlens {DROPPED} drops the old name")
            found[new] = found.pop(old)
    return found


def _warn(message: str) -> None:
    """Warn the first caller outside of the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=level)
