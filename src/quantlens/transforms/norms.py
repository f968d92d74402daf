"""LayerNorms and the linear layers that read them: finding them, and moving scales and shifts between the two.

:func:`find_norm_groups` finds each LayerNorm whose output is read by linear layers alone, through any operations that
keep the channels last (Swin's shifted windows, the choice of the class token); no list of module names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.graph.graph import Graph, argument, op_name, walk
from quantlens.graph.sites import Site
from quantlens.transforms.layers import add_to_bias, alone

RESHAPES = (
    "aten.reshape.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.clone.default",
    "aten.contiguous.default",
)
"""Operations that keep the order of the elements."""


@dataclass(frozen=True)
class NormGroup:
    """A LayerNorm site and all the linear sites that read its output."""

    norm: Site
    linears: tuple[Site, ...]

    @property
    def parameters(self) -> tuple[str, str]:
        """Names of the LayerNorm's scale γ and shift β."""
        gamma, beta = self.norm.node.args[2:4]
        return str(gamma.target), str(beta.target)  # type: ignore[union-attr]


def find_norm_groups(graph: Graph) -> list[NormGroup]:
    """LayerNorms (with scale and shift over the last dimension only) that feed linear layers and nothing else, none of
    them with parameters that something else reads."""
    by_node, groups = graph.sites.by_node, []
    for norm in graph.sites.of_kind("layer_norm"):
        shape, *parameters = norm.node.args[1:4]
        if len(shape) != 1 or len(parameters) < 2 or any(graph.constant(p) is None for p in parameters):
            continue
        passed_on = walk([norm.node], lambda value: [u for u in value.users if keeps_channels_last(u, value)])
        readers = [(u, value) for value in passed_on for u in value.users if not keeps_channels_last(u, value)]
        if readers and all(op_name(u) == "aten.linear.default" and u.args[0] is v and u in by_node for u, v in readers):
            groups.append(NormGroup(norm, tuple(by_node[u] for u, _ in readers)))
    return [group for group in groups if all(alone(graph, site) for site in (group.norm, *group.linears))]


def keeps_channels_last(node: fx.Node, value: fx.Node) -> bool:
    """Whether ``node`` only moves tokens of ``value``: the last dimension stays last and whole."""
    before, after = value.meta.get("shape"), node.meta.get("shape")
    if not before or not after or before[-1] is None or before[-1] != after[-1]:
        return False
    op, last = op_name(node), len(before) - 1
    if op == "aten.unsqueeze.default":
        return node.args[1] % (last + 2) != last + 1  # type: ignore[operator]
    if op == "aten.permute.default":
        return node.args[1][-1] % (last + 1) == last  # type: ignore[index, operator]
    if op == "aten.transpose.int":
        touched: Any = node.args[1:3]
    elif op in ("aten.select.int", "aten.slice.Tensor"):
        touched = [argument(node, "dim")]
    elif op == "aten.roll.default":
        touched = argument(node, "dims") or [last]
    else:  # a last dimension that keeps its size in a reshape stays last: the elements keep their order
        return op in RESHAPES
    return all(dim % (last + 1) != last for dim in touched)


def rescale_norm(graph: Graph, group: NormGroup, scale: Tensor, shift: Tensor) -> None:
    """Make the LayerNorm put out ``LN(x)/scale − shift`` and the linears undo it exactly.

    scale, shift: [C], scale > 0. With W [out, C]: W ← W·diag(scale), bias ← bias + W_new·shift; a missing bias is made.
    The edges, sites and names of the graph stay as they are.
    """
    gamma, beta = group.parameters
    scale, shift = (t.to(graph.tensor(gamma).device, torch.float64) for t in (scale, shift))
    for linear in group.linears:
        add_to_bias(graph, linear, (graph.tensor(str(linear.weight)).double() * scale) @ shift)
        graph.change(str(linear.weight), lambda weight: weight * scale)
    graph.change(gamma, lambda value: value / scale)
    graph.change(beta, lambda value: value / scale - shift)


def fold_norm(graph: Graph, group: NormGroup) -> None:
    """Move a LayerNorm's scale γ and shift β into its linears: W ← W·diag(γ), bias ← bias + W_old·β; then γ = 1, β = 0.

    Channels with γ = 0 are exact too: their weights become 0 and β reaches the bias.
    """
    gamma, beta = (graph.tensor(name).double() for name in group.parameters)
    for linear in group.linears:
        add_to_bias(graph, linear, graph.tensor(str(linear.weight)).double() @ beta)
        graph.change(str(linear.weight), lambda weight: weight * gamma)
    for name, new in zip(group.parameters, (torch.ones_like, torch.zeros_like), strict=True):
        graph.change(name, new)
