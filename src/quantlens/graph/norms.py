"""BatchNorm after a convolution, which is one with other weights, folded into it when a model is captured."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from quantlens.graph.graph import Graph, argument, op_name, replace_argument

CONVOLUTIONS = {"aten.conv2d.default", "aten.conv2d.padding", "aten.convolution.default"}
NORMS = {"aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"}


def fold_batch_norm(graph: Graph) -> None:
    """Fold each BatchNorm that is all that reads a convolution into its weight and bias, in float64. A frozen one is a
    scale and a shift by channel.

    Those of classifiers stay as they are (only frozen ones are folded): their numbers are published.
    """
    for conv in [node for node in graph.fx.nodes if op_name(node) in CONVOLUTIONS]:
        if graph.constant(conv.args[1]) is None or argument(conv, "transposed", False):
            continue
        found = _frozen(graph, conv) or (_batch_norm(graph, conv) if graph.boxes is not None else None)
        if found is not None:
            _fold(graph, conv, *found[1])
            found[0].replace_all_uses_with(conv)
    graph.fx.eliminate_dead_code()


def _fold(graph: Graph, conv: fx.Node, scale: Tensor, shift: Tensor) -> None:
    """Make a convolution give what it gives times ``scale`` plus ``shift`` [C]."""
    weight, bias = conv.args[1], argument(conv, "bias")
    name, old, own = str(weight.target), graph.constant(weight), graph.constant(bias)  # type: ignore[union-attr]
    shift = shift if own is None else shift + own.double() * scale
    stem = str(bias.target) if isinstance(bias, fx.Node) else f"{name.removesuffix('.weight')}.bias"
    new = {
        "weight": (name, old.double() * scale.view(-1, *[1] * (old.dim() - 1))),  # type: ignore[union-attr]
        "bias": (stem, shift),
    }
    for which, (called, wide) in new.items():
        value, held = wide.to(old.dtype), graph.tensors().get(f"{called}_folded")  # type: ignore[union-attr]
        if held is not None and torch.equal(held, value):  # the layer is called again
            made = graph.insert_tensor(conv, f"{called}_folded")
        else:
            made = graph.insert_tensor(conv, graph.unused(f"{called}_folded", ""), value)
        replace_argument(conv, which, made)


def _only(node: fx.Node, which: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The one operation that reads a value, where it is such a one."""
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and which(user) else None


def _frozen(graph: Graph, conv: fx.Node) -> tuple[fx.Node, tuple[Tensor, Tensor]] | None:
    """(the sum, (scale, shift) [C] in float64) of a product and a sum with constants by channel."""
    channels, found, node = len(graph.constant(conv.args[1])), [], conv  # type: ignore[arg-type]
    for op in ("aten.mul.Tensor", "aten.add.Tensor"):
        after = _only(node, lambda user, op=op: op_name(user) == op and not user.kwargs)  # type: ignore[misc]
        other = None if after is None else graph.constant(next((a for a in after.args if a is not node), None))
        if other is None or other.dim() not in (3, 4) or tuple(other.shape[-3:]) != (channels, 1, 1):
            return None
        found.append(other.flatten().double())
        node = after  # type: ignore[assignment]
    return (node, (found[0], found[1])) if len(found[0]) == channels == len(found[1]) else None


def _batch_norm(graph: Graph, conv: fx.Node) -> tuple[fx.Node, tuple[Tensor, Tensor]] | None:
    """(its value, (scale, shift) [C] in float64) of a BatchNorm with constant statistics."""
    norm = _only(conv, lambda user: op_name(user) in NORMS)
    if norm is None or argument(norm, "training"):
        return None
    named = ("running_mean", "running_var", "weight", "bias")
    given = [argument(norm, name) for name in named]
    mean, variance, weight, bias = (graph.constant(value) for value in given)
    if mean is None or variance is None or (given[2] is not None) != (weight is not None):
        return None
    scale = torch.rsqrt(variance.double() + float(argument(norm, "eps")))
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    if op_name(norm) == "aten.batch_norm.default":
        return norm, (scale, shift)
    value = _only(norm, lambda user: op_name(user) == "<built-in function getitem>" and user.args[1] == 0)
    return None if value is None else (value, (scale, shift))
