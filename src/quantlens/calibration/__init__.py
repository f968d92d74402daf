"""Calibration: the images, observers of tensors, range rules, and the pass that shows a method every tensor."""

from quantlens.calibration.images import CHUNK, Calibration
from quantlens.calibration.observers import Observation, Observer, as_rows
from quantlens.calibration.walk import MEMORY, Look, Seen, Transform, Walk

__all__ = [
    "CHUNK",
    "MEMORY",
    "Calibration",
    "Look",
    "Observation",
    "Observer",
    "Seen",
    "Transform",
    "Walk",
    "as_rows",
]
