"""Number formats: x → integer codes → x̂, as value objects with their parameters."""

from quantlens.formats.base import Operator, Quantizer, bounded_, restore, round_ste
from quantlens.formats.group_affine import GroupAffine
from quantlens.formats.group_scaled import LEAST, MOST, PARTS, Grouped, GroupScaled, SqrtSoftmax
from quantlens.formats.integer_ops import IntegerLayerNorm, LogIntSoftmax, MaskedSoftmax
from quantlens.formats.log import RESOLUTION, AdaLog, Log, ShiftedLog
from quantlens.formats.uniform import (
    MAX_ZERO_POINT,
    Affine,
    PowerOfTwo,
    Twin,
    Uniform,
    affine_parameters,
    is_constant,
    pixel_codes,
    symmetric_parameters,
)

__all__ = [
    "LEAST",
    "MAX_ZERO_POINT",
    "MOST",
    "PARTS",
    "RESOLUTION",
    "AdaLog",
    "Affine",
    "GroupAffine",
    "GroupScaled",
    "Grouped",
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
    "bounded_",
    "is_constant",
    "pixel_codes",
    "restore",
    "round_ste",
    "symmetric_parameters",
]
