"""A measured quantity and the bound that its median over seeds must keep."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SEEDS = (0, 1, 2, 3, 4)

Quantity = Callable[[int], float]
"""A number for a seed, which draws the calibration images or the small model, and seeds the method."""


class NotHere(Exception):
    """What a case needs (a runtime, a GPU, real weights) is missing on this machine."""


@dataclass(frozen=True)
class Case:
    """``quantity(seed)`` for five seeds; their median must be below ``below``, or above ``above``."""

    name: str
    what: str
    quantity: Quantity
    below: float | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        if (self.below is None) == (self.above is None):
            raise ValueError(f"{self.name}: give one bound, below or above")

    def measure(self, seeds: Iterable[int] = SEEDS) -> list[float]:
        """The quantity of every seed. Raises NotHere."""
        return [float(self.quantity(seed)) for seed in seeds]

    def kept(self, measured: Iterable[float]) -> bool:
        """Whether the median keeps the bound; NaN keeps none."""
        median = statistics.median(measured)
        return median < self.below if self.below is not None else median > self.above  # type: ignore[operator]

    @property
    def wanted(self) -> str:
        return f"< {self.below:g}" if self.below is not None else f"> {self.above:g}"
