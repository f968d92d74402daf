"""Calibration: the images, observers of tensors, range rules, and the pass that shows a method every tensor."""

from quantlens import _moved
from quantlens.calibration.cache import MEMORY, ActivationStore, StoredTensor
from quantlens.calibration.images import CHUNK, Calibration
from quantlens.calibration.observers import Observation, Observer, as_rows
from quantlens.calibration.passes import CalibrationPass, EdgeView, ObservationCache, Replacement

__all__ = [
    "CHUNK",
    "MEMORY",
    "ActivationStore",
    "Calibration",
    "CalibrationPass",
    "EdgeView",
    "Observation",
    "ObservationCache",
    "Observer",
    "Replacement",
    "StoredTensor",
    "as_rows",
]


def __getattr__(name: str) -> object:
    """Names that have changed are found under the new ones, with a warning."""
    return _moved.find(__name__, name)
