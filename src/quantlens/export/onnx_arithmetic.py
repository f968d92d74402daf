"""ATen operations that compute with every element, or over dimensions, as ONNX operators."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import fx

from quantlens.errors import UnsupportedError
from quantlens.export.onnx_graph import KINDS, Emitter
from quantlens.export.onnx_values import described
from quantlens.graph.graph import argument, op_name

Writer = Callable[[Emitter, fx.Node], Any]


class Operators:
    """The operators of ONNX as methods: ``o.Mul(x, o.Sigmoid(x))``."""

    def __init__(self, e: Emitter):
        self._e = e

    def __getattr__(self, kind: str) -> Any:
        return partial(self._e.op, kind)


class Arguments:
    """The arguments of a node as attributes."""

    def __init__(self, node: fx.Node):
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return argument(self._node, name)


# ---- one value -------------------------------------------------------------------------------------------------------


def _function(write: Callable[[Operators, str, Arguments], str]) -> Writer:
    """A function of one value, given the operators, the value and the node's other arguments."""
    return lambda e, node: write(Operators(e), e.operand(node, 0, e.values[node].kind), Arguments(node))


def _operator(kind: str, **attributes: str) -> Writer:
    """An operator of one input. attributes: its own, and the arguments of the ATen operation that they are."""
    return _function(lambda o, x, a: getattr(o, kind)(x, **{own: getattr(a, name) for own, name in attributes.items()}))


OPERATORS = {
    **{name: name.capitalize() for name in ("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos")},
    **{name: name.capitalize() for name in ("cosh", "erf", "exp", "floor", "log", "neg", "reciprocal", "relu")},
    **{name: name.capitalize() for name in ("round", "selu", "sigmoid", "sign", "sin", "sinh", "sqrt", "tan", "tanh")},
    "logical_not": "Not",
}
"""ATen operations of one value, and the operator that is the same."""


def _softplus(o: Operators, x: str, beta: float = 1.0, threshold: float = 20.0) -> str:
    """log(1 + exp(beta · x)) / beta, and x itself beyond the threshold, where that shows."""
    scaled = x if beta == 1 else o.Mul(x, float(beta))
    soft = o.Log(o.Add(o.Exp(o.Neg(o.Abs(scaled))), 1.0))
    soft = o.Add(o.Max(x, 0.0), soft if beta == 1 else o.Div(soft, float(beta)))
    return soft if threshold >= 18 else o.Where(o.Greater(scaled, float(threshold)), x, soft)


def _exponential(o: Operators, x: str, alpha: float, scale: float = 1.0, inner: float = 1.0) -> str:
    """``scale * x`` above 0, ``scale * alpha * (exp(inner * x) - 1)`` below."""
    below = o.Sub(o.Exp(o.Mul(o.Min(x, 0.0), float(inner))), 1.0)
    return o.Add(o.Mul(o.Max(x, 0.0), float(scale)), o.Mul(below, float(alpha * scale)))


def _limited(o: Operators, x: str, low: Any, high: Any) -> str:
    return o.Clip(x, None if low is None else float(low), None if high is None else float(high))


FUNCTIONS: dict[str, Callable[[Any, str, Any], str]] = {
    "silu": lambda o, x, a: o.Mul(x, o.Sigmoid(x)),
    "mish": lambda o, x, a: o.Mul(x, o.Tanh(_softplus(o, x))),
    "softplus": lambda o, x, a: _softplus(o, x, a.beta, a.threshold),
    "log_sigmoid": lambda o, x, a: o.Neg(_softplus(o, o.Neg(x))),
    "hardswish": lambda o, x, a: o.Div(o.Mul(x, o.Clip(o.Add(x, 3.0), 0.0, 6.0)), 6.0),
    "hardsigmoid": lambda o, x, a: o.Div(o.Clip(o.Add(x, 3.0), 0.0, 6.0), 6.0),
    "hardtanh": lambda o, x, a: _limited(o, x, a.min_val, a.max_val),
    "relu6": lambda o, x, a: o.Clip(x, 0.0, 6.0),
    "leaky_relu": lambda o, x, a: o.LeakyRelu(x, alpha=float(a.negative_slope)),
    "elu": lambda o, x, a: _exponential(o, x, a.alpha, a.scale, a.input_scale),
    "celu": lambda o, x, a: _exponential(o, x, a.alpha, 1.0, 1.0 / a.alpha),
    "threshold": lambda o, x, a: o.Where(o.Greater(x, float(a.threshold)), x, float(a.value)),
    "rsqrt": lambda o, x, a: o.Reciprocal(o.Sqrt(x)),
    "exp2": lambda o, x, a: o.Pow(2.0, x),
    "expm1": lambda o, x, a: o.Sub(o.Exp(x), 1.0),
    "log1p": lambda o, x, a: o.Log(o.Add(x, 1.0)),
    "log2": lambda o, x, a: o.Div(o.Log(x), math.log(2.0)),
    "log10": lambda o, x, a: o.Div(o.Log(x), math.log(10.0)),
    "square": lambda o, x, a: o.Mul(x, x),
    "trunc": lambda o, x, a: o.Mul(o.Sign(x), o.Floor(o.Abs(x))),
    "frac": lambda o, x, a: o.Sub(x, o.Mul(o.Sign(x), o.Floor(o.Abs(x)))),
}
"""ATen operations of one value, in terms of ONNX's operators."""


def _cast(e: Emitter, node: fx.Node) -> str:
    """A value in another type; what makes no float of it is cut off towards zero."""
    return e.operand(node, 0, e.values[node].kind)


def _softmax(kind: str) -> Writer:
    return lambda e, node: e.op(kind, e.operand(node, 0, "float"), axis=argument(node, "dim"))


def _cumsum(e: Emitter, node: fx.Node) -> str:
    return e.op("CumSum", e.operand(node, 0, e.values[node].kind), np.int64(e.axis(node, argument(node, "dim"))))


def _glu(e: Emitter, node: fx.Node) -> str:
    axis = e.axis(node, argument(node, "dim"))
    value, gate = e.ops("Split", e.value(node), outs=2, axis=axis, num_outputs=2)
    return e.op("Mul", value, e.op("Sigmoid", gate))


def _clamp(e: Emitter, node: fx.Node) -> str:
    """clamp, clamp_min and clamp_max, by numbers or tensors."""
    kind = e.values[node].kind
    value = e.operand(node, 0, kind)
    for name, operator in (("min", "Max"), ("max", "Min")):
        limit = argument(node, name)
        if limit is not None:
            value = e.op(operator, value, e.read(limit, kind))
    return value


# ---- several values --------------------------------------------------------------------------------------------------


def _kind(e: Emitter, argument: Any) -> str:
    """The kind of an argument: of a tensor, of a number."""
    if isinstance(argument, fx.Node) and not argument.meta.get("symbolic"):
        return str(e.values[argument].kind)
    return "bool" if isinstance(argument, bool) else "float" if isinstance(argument, float) else "int"


def _binary(kind: str) -> Writer:
    """add, sub, mul, div, pow and their like, in the kind of the result; ``alpha`` times the second."""

    def write(e: Emitter, node: fx.Node) -> str:
        alpha, rounded = argument(node, "alpha", 1), argument(node, "rounding_mode")
        given = e.values[node].kind
        kinds = "int" if given == "bool" else given
        read = e.factor if kind in ("Mul", "Div") else e.operand
        left, right = read(node, 0, kinds), read(node, 1, kinds)
        if op_name(node).startswith("aten.rsub"):
            left, right = right, left
        right = right if alpha == 1 else e.op("Mul", right, KINDS[kinds][0](alpha))
        if rounded or "floor_divide" in op_name(node):
            return _divided(e, left, right, kinds, down=rounded != "trunc")
        return e.cast(e.op(kind, left, right), kinds, given)

    return write


def _divided(e: Emitter, left: str, right: str, kind: str, *, down: bool) -> str:
    """A quotient without its fraction: the next below (down), or the next towards zero."""
    quotient = e.op("Div", e.cast(left, kind, "float"), e.cast(right, kind, "float"))
    if down:
        quotient = e.op("Floor", quotient)
    else:
        quotient = e.op("Mul", e.op("Sign", quotient), e.op("Floor", e.op("Abs", quotient)))
    return e.cast(quotient, "float", kind)


def _power(e: Emitter, node: fx.Node) -> str:
    exponent = node.args[1]
    if exponent == 2:
        value = e.operand(node, 0, e.values[node].kind)
        return e.op("Mul", value, value)
    return _binary("Pow")(e, node)


def _remainder(e: Emitter, node: fx.Node) -> str:
    kind = e.values[node].kind
    left, right = e.operand(node, 0, kind), e.operand(node, 1, kind)
    whole = _divided(e, left, right, kind, down="remainder" in op_name(node))
    return e.op("Sub", left, e.op("Mul", whole, right))


def _compared(kind: str, *, turned: bool = False) -> Writer:
    """Comparisons, in the wider kind of the two. turned: the opposite of the operator."""

    def write(e: Emitter, node: fx.Node) -> str:
        wider = max((_kind(e, a) for a in node.args[:2]), key=["bool", "int", "float"].index)
        wider = "int" if wider == "bool" else wider
        found = e.op(kind, e.operand(node, 0, wider), e.operand(node, 1, wider))
        return e.op("Not", found) if turned else found

    return write


def _logical(kind: str) -> Writer:
    def write(e: Emitter, node: fx.Node) -> str:
        if "logical" not in op_name(node) and e.values[node].kind != "bool":
            raise UnsupportedError(f"export cannot write {described(node)} of integers")
        return e.op(kind, *(e.operand(node, position, "bool") for position in range(len(node.args))))

    return write


def _where(e: Emitter, node: fx.Node) -> str:
    kind = e.values[node].kind
    return e.op("Where", e.operand(node, 0, "bool"), e.operand(node, 1, kind), e.operand(node, 2, kind))


def _masked_fill(e: Emitter, node: fx.Node) -> str:
    kind = e.values[node].kind
    return e.op("Where", e.operand(node, 1, "bool"), e.operand(node, 2, kind), e.operand(node, 0, kind))


def _combined(kind: str) -> Writer:
    """addcmul and addcdiv: self + value · (tensor1 · tensor2)."""

    def write(e: Emitter, node: fx.Node) -> str:
        start, first, second = (e.operand(node, position, "float") for position in range(3))
        value, factor = e.op(kind, first, second), argument(node, "value")
        return e.op("Add", start, value if factor == 1 else e.op("Mul", value, float(factor)))

    return write


def _added_product(e: Emitter, node: fx.Node) -> str:
    """addmm and baddbmm: beta · self + alpha · (a @ b)."""
    product, start = e.op("MatMul", e.value(node, 1), e.value(node, 2)), e.value(node)
    alpha, beta = argument(node, "alpha"), argument(node, "beta")
    product = product if alpha == 1 else e.op("Mul", product, float(alpha))
    return e.op("Add", start if beta == 1 else e.op("Mul", start, float(beta)), product)


def _lerp(e: Emitter, node: fx.Node) -> str:
    start, end, weight = (e.operand(node, position, "float") for position in range(3))
    return e.op("Add", start, e.op("Mul", weight, e.op("Sub", end, start)))


def _einsum(e: Emitter, node: fx.Node) -> str:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    return e.op("Einsum", *map(e.read, operands), equation=equation)  # type: ignore[arg-type]


def _prelu(e: Emitter, node: fx.Node) -> str:
    slope, rank = e.read(node.args[1]), len(e.sizes(node))
    if e.sizes(node.args[1]) != (1,):
        slope = e.op("Reshape", slope, [-1, *[1] * (rank - 2)])
    return e.op("PRelu", e.value(node), slope)


# ---- over dimensions -------------------------------------------------------------------------------------------------


def _dims(e: Emitter, node: fx.Node) -> tuple[list[int], int]:
    """The dimensions that a node reduces, all where it names none, and whether it keeps them."""
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(len(e.sizes(node.args[0]))))
    return dims, int(bool(argument(node, "keepdim")))


def _reduced(kind: str) -> Writer:
    def write(e: Emitter, node: fx.Node) -> str:
        (dims, keep), given = _dims(e, node), e.values[node].kind
        kinds = "int" if given == "bool" else given
        value = e.operand(node, 0, given)
        value = e.cast(value, given, kinds)
        if not dims:
            return value
        # OpenVINO moves scales of channels past a reduction, wrongly past one that drops its dimensions
        value = e.op(kind, value, dims, keepdims=1)
        return e.cast(value if keep else e.reshape(value, e.sizes(node)), kinds, given)

    return write


def _spread(*given: str) -> Writer:
    """var and std, alone or with the mean: given, what of "var", "std" and "mean"."""

    def write(e: Emitter, node: fx.Node) -> Any:
        (dims, keep), x = _dims(e, node), e.operand(node, 0, "float")
        mean = e.op("ReduceMean", x, dims, keepdims=1)
        off, count = e.op("Sub", x, mean), math.prod(e.whole(node, *(e.sizes(node.args[0])[d] for d in dims)))
        correction = argument(node, "correction", int(argument(node, "unbiased", True)))
        correction = 1 if correction is None else correction
        total = e.op("ReduceSum", e.op("Mul", off, off), dims, keepdims=keep)
        variance = e.op("Div", total, float(max(count - correction, 0)))
        found = {"var": variance, "mean": mean}
        if "std" in given:
            found["std"] = e.op("Sqrt", variance)
        if "mean" in given and not keep:
            found["mean"] = e.op("Squeeze", mean, dims)
        return found[given[0]] if len(given) == 1 else [found[name] for name in given]

    return write


def _norm(e: Emitter, node: fx.Node) -> str:
    (dims, keep), x = _dims(e, node), e.operand(node, 0, "float")
    order = argument(node, "ord", argument(node, "p", 2))
    order = 2.0 if order is None else float(order)
    if order in (1.0, 2.0):
        return e.op(f"ReduceL{int(order)}", x, dims, keepdims=keep)
    if math.isinf(order):
        return e.op("ReduceMax" if order > 0 else "ReduceMin", e.op("Abs", x), dims, keepdims=keep)
    powers = e.op("ReduceSum", e.op("Pow", e.op("Abs", x), order), dims, keepdims=keep)
    return e.op("Pow", powers, 1 / order)


def _placed(kind: str) -> Writer:
    """argmax and argmin; the first of equal ones."""

    def write(e: Emitter, node: fx.Node) -> str:
        dim, keep, x = argument(node, "dim"), int(argument(node, "keepdim")), e.operand(node, 0, "float")
        if dim is None:
            raise UnsupportedError(f"export cannot write {described(node)} over all dimensions")
        return e.op(kind, x, axis=dim, keepdims=keep)

    return write


def _extreme(reduced: str, placed: str) -> Writer:
    """max.dim and min.dim: values and where they are."""

    def write(e: Emitter, node: fx.Node) -> list[str]:
        (dims, keep), x = _dims(e, node), e.operand(node, 0, e.values[node][0].kind)
        return [e.op(reduced, x, dims, keepdims=keep), e.op(placed, x, axis=dims[0], keepdims=keep)]

    return write


def _named(kinds: str, writers: dict[str, Writer]) -> dict[str, Writer]:
    """Writers under the names of ATen's operations: of each, its overloads in ``kinds``."""
    return {f"aten.{name}.{kind}": writer for name, writer in writers.items() for kind in kinds.split()}


COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}

ARITHMETIC: dict[str, Writer] = {
    **_named("default", {name: _operator(kind) for name, kind in OPERATORS.items()}),
    **_named("default", {name: _function(write) for name, write in FUNCTIONS.items()}),
    "aten.gelu.default": _operator("Gelu", approximate="approximate"),
    "aten.bitwise_not.default": _logical("Not"),
    **_named("dtype dtype_layout other", {"to": _cast}),
    **_named("default", {"_to_copy": _cast, "type_as": _cast}),
    **_named("int", {"softmax": _softmax("Softmax"), "log_softmax": _softmax("LogSoftmax")}),
    **_named("default", {"_log_softmax": _softmax("LogSoftmax"), "_safe_softmax": _softmax("Softmax")}),
    "aten.cumsum.default": _cumsum,
    "aten.glu.default": _glu,
    **_named("default Tensor", {"clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp}),
    "aten.matmul.default": _binary("MatMul"),
    "aten.bmm.default": _binary("MatMul"),
    "aten.mm.default": _binary("MatMul"),
    **_named("Tensor Scalar", {"add": _binary("Add"), "sub": _binary("Sub"), "rsub": _binary("Sub")}),
    **_named("Tensor Scalar", {"mul": _binary("Mul")}),
    **_named("Tensor Scalar Tensor_mode Scalar_mode", {"div": _binary("Div")}),
    **_named("default Scalar", {"floor_divide": _binary("Div")}),
    **_named("default", {"maximum": _binary("Max"), "minimum": _binary("Min")}),
    **_named("other", {"max": _binary("Max"), "min": _binary("Min")}),
    **_named("Tensor_Scalar Tensor_Tensor Scalar", {"pow": _power}),
    **_named("Tensor Scalar", {"remainder": _remainder, "fmod": _remainder}),
    **_named("Tensor Scalar", {name: _compared(kind) for name, kind in COMPARISONS.items()}),
    **_named("Tensor Scalar", {"ne": _compared("Equal", turned=True)}),
    **_named("default", {f"logical_{name}": _logical(kind) for name, kind in LOGICAL.items()}),
    **_named("Tensor Scalar", {f"bitwise_{name}": _logical(kind) for name, kind in LOGICAL.items()}),
    **_named("Tensor Scalar", {f"__{name}__": _logical(kind) for name, kind in LOGICAL.items()}),
    **_named("self ScalarSelf ScalarOther Scalar", {"where": _where}),
    **_named("Scalar Tensor", {"masked_fill": _masked_fill, "lerp": _lerp}),
    **_named("default", {"addcmul": _combined("Mul"), "addcdiv": _combined("Div")}),
    **_named("default", {"addmm": _added_product, "baddbmm": _added_product}),
    "aten.einsum.default": _einsum,
    "aten.prelu.default": _prelu,
    "aten._prelu_kernel.default": lambda e, node: e.op("PRelu", e.value(node), e.read(node.args[1])),
    **_named("default dim_IntList", {"sum": _reduced("ReduceSum")}),
    **_named(
        "default dim", {"mean": _reduced("ReduceMean"), "any": _reduced("ReduceMax"), "all": _reduced("ReduceMin")}
    ),
    **_named("dims", {"any": _reduced("ReduceMax"), "all": _reduced("ReduceMin")}),
    **_named("default", {"amax": _reduced("ReduceMax"), "amin": _reduced("ReduceMin")}),
    **_named("default", {"max": _reduced("ReduceMax"), "min": _reduced("ReduceMin")}),
    **_named("default dim_int", {"prod": _reduced("ReduceProd")}),
    "aten.logsumexp.default": _reduced("ReduceLogSumExp"),
    **_named("default dim correction", {"var": _spread("var"), "std": _spread("std")}),
    **_named("default dim correction", {"var_mean": _spread("var", "mean"), "std_mean": _spread("std", "mean")}),
    "aten.linalg_vector_norm.default": _norm,
    **_named("Scalar ScalarOpt_dim", {"norm": _norm}),
    **_named("default", {"argmax": _placed("ArgMax"), "argmin": _placed("ArgMin")}),
    "aten.max.dim": _extreme("ReduceMax", "ArgMax"),
    "aten.min.dim": _extreme("ReduceMin", "ArgMin"),
}
"""ATen operation -> how it is written."""
