"""Which types ONNX has for the codes of a format, from which operator set on, and how their bits lie in a file.

Integers of 8, 4 and 2 bits; FP8 with a scale per tensor or channel; MX and NVFP4 weights, whose blocks have scales in
types of their own (E8M0, E4M3).
"""

from collections.abc import Container

import numpy as np

from quantlens.formats import Blocks, FloatingPoint, MicroScaled, Quantizer, Uniform

OPSET = 21
"""ONNX operator set written unless another is asked for: the first with 4-bit weights in DequantizeLinear."""

OPSETS = tuple(range(OPSET, 27))
"""Those that can be asked for: as far as ONNX Runtime 1.31 opens them."""

CODE_TYPES = {
    (16, True): "INT16",
    (16, False): "UINT16",
    (8, True): "INT8",
    (8, False): "UINT8",
    (4, True): "INT4",
    (4, False): "UINT4",
    (2, True): "INT2",
    (2, False): "UINT2",
}
"""Width of codes and whether they are signed -> the type that Quantize- and DequantizeLinear have for them."""

WEIGHT_TYPES = CODE_TYPES | {(bits, True): "INT8" for bits in (5, 6, 7)}
"""The same for weights: codes of 5 to 7 bits are codes of 8. An activation's would have to be clipped apart."""

ELEMENT_TYPES = {"E4M3": "FLOAT8E4M3FN", "E5M2": "FLOAT8E5M2", "E2M1": "FLOAT4E2M1"}
"""The same of floating-point elements. Those of 6 bits come with operator set 28, which no runtime opens yet."""

FIRST = {"INT2": 25, "UINT2": 25, "FLOAT4E2M1": 23, "FLOAT8E8M0": 24}
"""Type -> the first operator set whose Dequantize- or QuantizeLinear takes it; the others have been there before."""

WIDTHS = {"INT16": 16, "UINT16": 16, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}
"""Bits of the types that have not 8."""


def code_types(quantizer: Quantizer, *, weight: bool) -> tuple[str, ...]:
    """ONNX's types for the codes of a format, and for those of its blocks' scales; none where it lacks one."""
    if isinstance(quantizer, FloatingPoint):
        return (ELEMENT_TYPES[quantizer.element],)
    if isinstance(quantizer, Blocks):
        if quantizer.dynamic or quantizer.element not in ELEMENT_TYPES:
            return ()
        scales = "FLOAT8E8M0" if isinstance(quantizer, MicroScaled) else "FLOAT8E4M3FN"
        return ELEMENT_TYPES[quantizer.element], scales
    known = WEIGHT_TYPES if weight else CODE_TYPES
    return (known[quantizer.bits, quantizer.signed],) if is_integer(quantizer, known) else ()


def first_opset(types: tuple[str, ...]) -> int:
    """The first operator set that has them all."""
    return max((FIRST.get(name, OPSET) for name in types), default=OPSET)


def held_types(quantizer: Quantizer, opset: int | None, *, weight: bool) -> tuple[str, ...]:
    """:func:`code_types` where a file of an operator set holds them; none where it computes the format in float.
    opset: None: of an OpenVINO file, which has integers of 8 and 4 bits alone."""
    types = code_types(quantizer, weight=weight)
    if opset is None and (quantizer.bits > 8 or not isinstance(quantizer, Uniform)):
        return ()
    return types if first_opset(types) <= (opset or OPSET) else ()


def is_integer(quantizer: Quantizer, known: Container[tuple[int, bool]]) -> bool:
    """Whether runtimes have integers for a format: uniform, of a known width and sign, zero points that are codes."""
    if type(quantizer) is not Uniform or (quantizer.bits, quantizer.signed) not in known:
        return False
    zero = quantizer.zero_point
    return bool(((zero >= quantizer.qmin) & (zero <= quantizer.qmax)).all())


def packed(codes: np.ndarray, kind: str) -> bytes:
    """Codes (integers, or the bit patterns of floating-point elements) as a file has them: of 4 or 2 bits several to a
    byte, the first in the lowest bits."""
    width = WIDTHS.get(kind, 8)
    flat = np.ascontiguousarray(codes).reshape(-1).astype("<u2" if width == 16 else np.uint8)
    if width >= 8:
        return flat.tobytes()
    each = 8 // width
    rows = np.pad(flat & ((1 << width) - 1), (0, -flat.size % each)).reshape(-1, each)
    return np.bitwise_or.reduce(rows << np.arange(0, 8, width, dtype=np.uint8), axis=1, dtype=np.uint8).tobytes()


def unpacked(raw: bytes, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse, of codes of 8 bits or fewer: bit patterns, uint8."""
    width, count = WIDTHS.get(kind, 8), int(np.prod(shape))
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    rows = np.frombuffer(raw, np.uint8)[:, None] >> shifts & np.uint8((1 << width) - 1)
    return rows.reshape(-1)[:count].reshape(shape)
