"""A quantized model: the plan, the simulation that follows it, bit widths, runtime targets, the packed checkpoint."""

from quantlens.qmodel.bits import Bits
from quantlens.qmodel.model import Outputs, Plan, QuantizedModel, float_model, simulate

__all__ = ["Bits", "Outputs", "Plan", "QuantizedModel", "float_model", "simulate"]
