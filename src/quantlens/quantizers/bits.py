"""Bit widths as people write them: ``W4A8`` is 4-bit weights and 8-bit activations, ``FP32`` leaves everything in
float."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantlens.errors import QuantlensError

FLOAT = 32


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations; 32 means float.

    >>> Bits.parse("w4a8")
    Bits(weights=4, activations=8)
    >>> str(Bits(4, 8))
    'W4A8'
    """

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for what, value in (("weights", self.weights), ("activations", self.activations)):
            if value != FLOAT and not 2 <= value <= 10:
                raise QuantlensError(
                    f"{value} bits for {what}: choose 2 to 10, or {FLOAT} for float "
                    f"(for example W4A8, W8A{FLOAT} or FP32)"
                )

    @classmethod
    def parse(cls, text: str | Bits) -> Bits:
        """Read ``W<n>A<m>`` (any case) or ``FP32``. Raises QuantlensError for anything else."""
        if isinstance(text, Bits):
            return text
        clean = str(text).strip().upper()
        if clean in ("FP32", "FLOAT32", "FLOAT", "W32A32"):
            return cls(FLOAT, FLOAT)
        match = re.fullmatch(r"W(\d+)A(\d+)", clean)
        if match is None:
            raise QuantlensError(f"bits {text!r} not understood: write W4A8 (weights 4, activations 8) or FP32")
        return cls(int(match[1]), int(match[2]))

    @property
    def is_float(self) -> bool:
        return self.weights == FLOAT and self.activations == FLOAT

    def __str__(self) -> str:
        return "FP32" if self.is_float else f"W{self.weights}A{self.activations}"
