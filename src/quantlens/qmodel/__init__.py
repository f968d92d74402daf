"""A quantized model: the plan, the simulation that follows it, bit widths, runtime targets, the packed checkpoint."""

from quantlens.qmodel.model import Outputs, QuantizedModel, float_copy, float_model
from quantlens.qmodel.plan import FLOAT, TARGETS, Bits, Plan, Provenance, Target, target_named
from quantlens.qmodel.simulation import simulate

__all__ = [
    "FLOAT",
    "TARGETS",
    "Bits",
    "Outputs",
    "Plan",
    "Provenance",
    "QuantizedModel",
    "Target",
    "float_copy",
    "float_model",
    "simulate",
    "target_named",
]
