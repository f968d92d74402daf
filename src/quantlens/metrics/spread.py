"""Mean and standard deviation over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1; None for a single value) of n numbers."""

    mean: float
    std: float | None
    n: int

    @staticmethod
    def of(values: Iterable[Any]) -> Spread | None:
        """Of the finite numbers among `values` (what is None, NaN, text or bool is passed over); None without any."""
        found = [v for v in map(number, values) if v is not None]
        if not found:
            return None
        n = len(found)
        mean = math.fsum(found) / n
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (n - 1)) if n > 1 else None
        return Spread(mean, std, n)

    def scaled(self, factor: float) -> Spread:
        """The spread of the numbers times a factor."""
        return Spread(self.mean * factor, None if self.std is None else self.std * abs(factor), self.n)


def number(value: Any) -> float | None:
    """`value` as a float; None where it is no finite number (None, NaN, text, bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
