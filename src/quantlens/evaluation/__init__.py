"""One model on image sets → a result: metrics, per-image outputs, the comparison of two results.

`run.evaluate` measures; `result.Result` is what it gives.
"""

from quantlens import _moved


def __getattr__(name: str) -> object:
    """Names that have moved are found where they are now, with a warning."""
    return _moved.find(__name__, name)
