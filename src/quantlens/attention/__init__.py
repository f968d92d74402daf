"""What a model looks at: rollout, class activation maps, outlier tokens, drift between precisions, and pictures.

Nothing heavy is imported here: names are resolved when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlens.attention.comparison import AttentionResult as AttentionResult, compare as compare
    from quantlens.attention.maps import MapSettings as MapSettings
    from quantlens.attention.recording import Lens as Lens

_HOMES = {"AttentionResult": "comparison", "Lens": "recording", "MapSettings": "maps", "compare": "comparison"}

__all__ = ["AttentionResult", "Lens", "MapSettings", "compare"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
