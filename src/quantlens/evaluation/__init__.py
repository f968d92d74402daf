"""One model on image sets → a result: metrics, per-image outputs, the comparison of two results.

`evaluate` measures, a `Result` is what it gives. Both are imported when they are asked for, torch with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantlens import _moved

if TYPE_CHECKING:
    from quantlens.evaluation.result import Result
    from quantlens.evaluation.run import evaluate

__all__ = ["Result", "evaluate"]


def __getattr__(name: str) -> Any:
    home = {"Result": "result", "evaluate": "run"}.get(name)
    return getattr(import_module(f"{__name__}.{home}"), name) if home else _moved.find(__name__, name)
