"""A quantized model: the plan, the simulation that follows it, bit widths, runtime targets, the packed checkpoint."""

from quantlens.qmodel.bits import Bits
from quantlens.qmodel.model import Outputs, QuantizedModel, float_model
from quantlens.qmodel.plan import Plan, Provenance
from quantlens.qmodel.simulation import simulate

__all__ = ["Bits", "Outputs", "Plan", "Provenance", "QuantizedModel", "float_model", "simulate"]
