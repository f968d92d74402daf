"""Which layer hurts: every site and every block quantized alone, and the statistics of what is quantized."""

from quantlens.sensitivity.inspection import Inspection, inspect

__all__ = ["Inspection", "inspect"]
