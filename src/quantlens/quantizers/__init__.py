"""Number formats: x → integer codes → x̂, as value objects with their parameters; and the plan that places them."""

from quantlens.quantizers.adalog import AdaLog
from quantlens.quantizers.base import Quantizer, formats, restore, round_ste
from quantlens.quantizers.bits import Bits
from quantlens.quantizers.block_scaled import BlockScaled
from quantlens.quantizers.integer_ops import IntegerLayerNorm, LogIntSoftmax, MaskedSoftmax
from quantlens.quantizers.log import Log
from quantlens.quantizers.model import Outputs, Plan, QuantizedModel, float_model, simulate
from quantlens.quantizers.operators import Operator, restore_operator
from quantlens.quantizers.power_of_two import PowerOfTwo
from quantlens.quantizers.rows import SquaredRows
from quantlens.quantizers.shifted_log import ShiftedLog
from quantlens.quantizers.twin import Twin
from quantlens.quantizers.uniform import Uniform, affine_parameters, symmetric_parameters

__all__ = [
    "AdaLog",
    "Bits",
    "BlockScaled",
    "IntegerLayerNorm",
    "Log",
    "LogIntSoftmax",
    "MaskedSoftmax",
    "Operator",
    "Outputs",
    "Plan",
    "PowerOfTwo",
    "QuantizedModel",
    "Quantizer",
    "ShiftedLog",
    "SquaredRows",
    "Twin",
    "Uniform",
    "affine_parameters",
    "float_model",
    "formats",
    "restore",
    "restore_operator",
    "round_ste",
    "simulate",
    "symmetric_parameters",
]
