"""Number formats: x → codes → x̂, as value objects with their parameters; `cast` gives x̂ by a format's name."""

from quantlens.formats.base import Operator, Quantizer, bounded_, restore, round_ste
from quantlens.formats.floating import (
    FLOATING,
    NVFP4,
    Blocks,
    FloatingPoint,
    MicroScaled,
    cast,
    floating_bits,
    floating_format,
    floating_name,
    floating_name_of,
)
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
    "FLOATING",
    "LEAST",
    "MAX_ZERO_POINT",
    "MOST",
    "NVFP4",
    "PARTS",
    "RESOLUTION",
    "AdaLog",
    "Affine",
    "Blocks",
    "FloatingPoint",
    "GroupAffine",
    "GroupScaled",
    "Grouped",
    "IntegerLayerNorm",
    "Log",
    "LogIntSoftmax",
    "MaskedSoftmax",
    "MicroScaled",
    "Operator",
    "PowerOfTwo",
    "Quantizer",
    "ShiftedLog",
    "SqrtSoftmax",
    "Twin",
    "Uniform",
    "affine_parameters",
    "bounded_",
    "cast",
    "floating_bits",
    "floating_format",
    "floating_name",
    "floating_name_of",
    "is_constant",
    "pixel_codes",
    "restore",
    "round_ste",
    "symmetric_parameters",
]
