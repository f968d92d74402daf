"""How well a detector does."""

from quantlens.boxes import Boxes, Detections

__all__ = ["Boxes", "Detections"]
