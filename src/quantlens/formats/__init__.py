"""Number formats: x → integer codes → x̂, as value objects with their parameters."""

from quantlens.formats.adalog import AdaLog
from quantlens.formats.base import Operator, Quantizer, restore, round_ste
from quantlens.formats.group_scaled import GroupScaled
from quantlens.formats.integer_ops import IntegerLayerNorm, LogIntSoftmax, MaskedSoftmax
from quantlens.formats.log import Log
from quantlens.formats.power_of_two import PowerOfTwo
from quantlens.formats.shifted_log import ShiftedLog
from quantlens.formats.sqrt_softmax import SqrtSoftmax
from quantlens.formats.twin import Twin
from quantlens.formats.uniform import Affine, Uniform, affine_parameters, symmetric_parameters

__all__ = [
    "AdaLog",
    "Affine",
    "GroupScaled",
    "IntegerLayerNorm",
    "Log",
    "LogIntSoftmax",
    "MaskedSoftmax",
    "Operator",
    "PowerOfTwo",
    "Quantizer",
    "ShiftedLog",
    "SqrtSoftmax",
    "Twin",
    "Uniform",
    "affine_parameters",
    "restore",
    "round_ste",
    "symmetric_parameters",
]
