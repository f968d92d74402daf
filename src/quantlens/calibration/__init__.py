"""Calibration: the images, and the walk that shows a method every tensor of the graph."""

from quantlens.calibration.images import CHUNK, Calibration
from quantlens.calibration.walk import MEMORY, Look, Seen, Transform, Walk

__all__ = ["CHUNK", "MEMORY", "Calibration", "Look", "Seen", "Transform", "Walk"]
