"""Number formats that runtimes have no integers for, as float operations of ONNX that give their values."""

from typing import TYPE_CHECKING

import numpy as np

from quantlens.errors import UnsupportedError
from quantlens.formats import LEAST, MOST, PARTS, AdaLog, GroupAffine, Grouped, Log, Quantizer, SqrtSoftmax, Uniform

if TYPE_CHECKING:
    from quantlens.export.onnx_graph import Emitter

TINY = float(np.finfo(np.float32).tiny)


def simulated(e: "Emitter", quantizer: Quantizer, source: str, dims: int) -> str:
    """A quantizer as float operations that give its values."""
    if isinstance(quantizer, Uniform):
        low, high = quantizer.bounds(dims)
        levels = e.op("Round", e.op("Mul", source, quantizer.spread(quantizer.inverse, dims)))
        levels = e.op("Min", e.op("Max", levels, low), high)
        return e.op("Mul", levels, quantizer.spread(quantizer.scale, dims))
    if isinstance(quantizer, SqrtSoftmax):
        return _rows(e, quantizer, source)
    if isinstance(quantizer, Grouped):
        return _grouped(e, quantizer, source, dims)
    if isinstance(quantizer, AdaLog) and bool(quantizer.shift != 0):
        shift = e.constant(quantizer.shift)
        return e.op("Sub", _logarithmic(e, quantizer, e.op("Add", source, shift)), shift)
    if isinstance(quantizer, Log):
        return _logarithmic(e, quantizer, source)
    raise UnsupportedError(f"the format {quantizer.kind!r} cannot be written as ONNX operations yet")


def _rows(e: "Emitter", quantizer: SqrtSoftmax, source: str) -> str:
    roots = e.op("Sqrt", e.op("Max", source, 0.0))
    peak = e.op("Max", e.op("ReduceMax", roots, [-1]), TINY)
    k = e.op("Round", e.op("Mul", roots, e.op("Div", float(quantizer.qmax), peak)))
    squares = e.op("Mul", k, k)
    return e.op("Div", squares, e.op("Max", e.op("ReduceSum", squares, [-1]), 1.0))


def _grouped(e: "Emitter", quantizer: Grouped, source: str, dims: int) -> str:
    """Groups of channels with scales of their own, as the format finds them."""
    channels = dims + (quantizer.axis or 0)
    last = [*(d for d in range(dims) if d != channels), channels]
    turned = source if quantizer.axis == -1 else e.op("Transpose", source, perm=last)
    x = e.op("Reshape", turned, [0] * (dims - 1) + [-1, quantizer.group_size])
    value = _affine_groups(e, quantizer, x) if isinstance(quantizer, GroupAffine) else _scaled(e, quantizer, x)
    value = e.op("Reshape", value, [0] * (dims - 1) + [-1])
    back = [last.index(d) for d in range(dims)]
    return value if quantizer.axis == -1 else e.op("Transpose", value, perm=back)


def _exponents(e: "Emitter", quantizer: Grouped, size: str) -> str:
    octaves = e.op("Log", e.op("Mul", size, quantizer.scale))
    parts = e.op("Round", e.op("Mul", octaves, PARTS / np.log(2.0)))
    return e.op("Clip", parts, float(LEAST), float(MOST))


def _scales(e: "Emitter", quantizer: Grouped, exponents: str) -> str:
    return e.op("Gather", quantizer.powers, e.op("Cast", e.op("Sub", exponents, float(LEAST)), to=7))


def _scaled(e: "Emitter", quantizer: Grouped, x: str) -> str:
    size = e.op("Sqrt", e.op("ReduceMean", e.op("Mul", x, x), [-1]))
    scale = _scales(e, quantizer, _exponents(e, quantizer, size))
    units = e.op("Mul", x, e.op("Reciprocal", scale))  # as the format does: a quotient has other last bits
    ends = float(quantizer.qmin), float(quantizer.qmax)
    levels = e.op("Clip", e.op("Round", e.op("Sub", units, 0.5)), *ends)
    return e.op("Mul", e.op("Add", levels, 0.5), scale)


def _affine_groups(e: "Emitter", quantizer: GroupAffine, x: str) -> str:
    low, high = (e.op(name, e.op(f"Reduce{name}", x, [-1]), 0.0) for name in ("Min", "Max"))
    largest = _exponents(e, quantizer, e.op("Sub", high, low))
    middle = e.op("Mul", e.op("Add", low, high), -0.5)
    ends, value, least = (0.0, float(quantizer.qmax)), "", ""
    for smaller in range(quantizer.tries):
        exponents = e.op("Max", e.op("Sub", largest, float(smaller)), float(LEAST)) if smaller else largest
        scale = _scales(e, quantizer, exponents)
        inverse = e.op("Reciprocal", scale)
        units, centre = e.op("Mul", x, inverse), e.op("Mul", middle, inverse)
        zero = e.op("Clip", e.op("Round", e.op("Add", centre, 0.5 * quantizer.qmax)), *ends)
        codes = e.op("Clip", e.op("Add", e.op("Round", units), zero), *ends)
        other = e.op("Mul", e.op("Sub", codes, zero), scale)
        if quantizer.tries == 1:
            return other
        off = e.op("Sub", other, x)
        error = e.op("ReduceSum", e.op("Mul", off, off), [-1])
        better = e.op("Less", error, least) if value else ""
        value, least = (e.op("Where", better, other, value), e.op("Min", error, least)) if value else (other, error)
    return value


def _logarithmic(e: "Emitter", quantizer: Log, source: str) -> str:
    """Values of a log format, before an AdaLog's shift."""
    octaves = e.op("Mul", e.op("Log", e.op("Max", source, 1e-38)), -quantizer.steps / np.log(2.0))
    k = e.op("Add", octaves, float(quantizer.offset))
    last = float(quantizer.qmax - 1)
    nearest = e.op("Clip", e.op("Round", k), 0.0, last)
    code = e.op("Where", e.op("Greater", k, last + quantizer.steps), last + 1, nearest)
    return e.op("Gather", quantizer.levels, e.op("Cast", code, to=7))
