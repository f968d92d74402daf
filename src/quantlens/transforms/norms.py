"""LayerNorms and the linear layers that read them: finding them, and moving scales and shifts between the two.

:func:`find_norm_groups` finds each LayerNorm whose output is read by linear layers alone, through any operations that
keep the channels last (Swin's shifted windows, the choice of the class token); no list of module names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantlens.graph.graph import Graph, op_name
from quantlens.graph.sites import Site
from quantlens.transforms.layers import alone, ensure_bias


@dataclass(frozen=True)
class NormGroup:
    """A LayerNorm site and all the linear sites that read its output."""

    norm: Site
    linears: tuple[Site, ...]


def find_norm_groups(graph: Graph) -> list[NormGroup]:
    """LayerNorms (with scale and shift over the last dimension only) that feed linear layers and nothing else, none of
    them with parameters that something else reads."""
    by_node = {s.node: s for s in graph.sites}
    groups = []
    for norm in graph.sites.of_kind("layer_norm"):
        node = norm.node
        if len(node.args[1]) != 1 or len(node.args) < 4 or graph.constant(node.args[2]) is None:
            continue
        if graph.constant(node.args[3]) is None:
            continue
        readers = _channel_readers(node)
        if readers and all(op_name(r) == "aten.linear.default" and r in by_node for r in readers):
            groups.append(NormGroup(norm, tuple(by_node[r] for r in readers)))
    return [group for group in groups if all(alone(graph, site) for site in (group.norm, *group.linears))]


def _channel_readers(node: fx.Node) -> list[fx.Node] | None:
    """Nodes that read ``node`` through operations that keep its channels as the last dimension, in graph order.

    ``None`` if some reader sees the channels in another way (residual sums, concatenation, a view that splits
    channels).
    """
    readers: dict[fx.Node, None] = {}
    queue = [node]
    while queue:
        value = queue.pop(0)
        for user in value.users:
            if op_name(user) == "aten.linear.default" and user.args[0] is value:
                readers[user] = None
            elif keeps_channels_last(user, value):
                queue.append(user)
            else:
                return None
    return list(readers)


def keeps_channels_last(node: fx.Node, value: fx.Node) -> bool:
    """Whether ``node`` only moves tokens of ``value``: the last dimension stays last and whole."""
    op = op_name(node)
    before, after = value.meta.get("shape"), node.meta.get("shape")
    if before is None or after is None or not before or not after or before[-1] is None or before[-1] != after[-1]:
        return False
    rank = len(before)
    if op in ("aten.reshape.default", "aten.flatten.using_ints", "aten.unflatten.int"):
        # the last dimension keeps its size, and the elements their order: channels stay last
        return True
    if op == "aten.permute.default":
        return node.args[1][-1] % rank == rank - 1  # type: ignore[index, operator]
    if op == "aten.transpose.int":
        return all(d % rank != rank - 1 for d in node.args[1:3])  # type: ignore[operator]
    if op in ("aten.select.int", "aten.slice.Tensor"):
        dim = node.args[1] if len(node.args) > 1 else 0
        return dim % rank != rank - 1  # type: ignore[operator]
    if op == "aten.roll.default":
        dims = node.args[2] if len(node.args) > 2 else []
        return bool(dims) and all(d % rank != rank - 1 for d in dims)  # type: ignore[union-attr, operator]
    if op == "aten.unsqueeze.default":
        return node.args[1] % (rank + 1) != rank  # type: ignore[operator]
    return op in ("aten.clone.default", "aten.contiguous.default")


def rescale_norm(graph: Graph, group: NormGroup, scale: Tensor, shift: Tensor) -> None:
    """Make the LayerNorm put out ``LN(x)/scale − shift`` and the linears undo it exactly.

    scale, shift: [C], scale > 0. With W [out, C]: W ← W·diag(scale), bias ← bias + W_new·shift; a missing bias is made.
    The edges, sites and names of the graph stay as they are.
    """
    weight_name, bias_name = str(group.norm.node.args[2].target), str(group.norm.node.args[3].target)  # type: ignore[union-attr]
    gamma, beta = graph.tensor(weight_name), graph.tensor(bias_name)
    kind, precise = gamma.dtype, torch.float64
    scale, shift = scale.to(gamma.device, precise), shift.to(gamma.device, precise)
    for linear in group.linears:
        name = linear.weight
        weight = graph.tensor(name).to(precise) * scale  # type: ignore[arg-type]
        extra = weight @ shift
        bias_of = ensure_bias(graph, linear)
        graph.set_tensor(bias_of, (graph.tensor(bias_of).to(precise) + extra).to(kind))
        graph.set_tensor(name, weight.to(kind))  # type: ignore[arg-type]
    graph.set_tensor(weight_name, (gamma.to(precise) / scale).to(kind))
    graph.set_tensor(bias_name, (beta.to(precise) / scale - shift).to(kind))


def fold_norm(graph: Graph, group: NormGroup) -> None:
    """Move a LayerNorm's scale γ and shift β into its linears: W ← W·diag(γ), bias ← bias + W_old·β; then γ = 1, β = 0.

    Channels with γ = 0 are exact too: their weights become 0 and β reaches the bias.
    """
    weight_name, bias_name = str(group.norm.node.args[2].target), str(group.norm.node.args[3].target)  # type: ignore[union-attr]
    gamma, beta = graph.tensor(weight_name), graph.tensor(bias_name)
    for linear in group.linears:
        name = linear.weight
        weight = graph.tensor(name).double()  # type: ignore[arg-type]
        bias_of = ensure_bias(graph, linear)
        graph.set_tensor(bias_of, (graph.tensor(bias_of).double() + weight @ beta.double()).to(gamma.dtype))
        graph.set_tensor(name, (weight * gamma.double()).to(gamma.dtype))  # type: ignore[arg-type]
    graph.set_tensor(weight_name, torch.ones_like(gamma))
    graph.set_tensor(bias_name, torch.zeros_like(beta))
