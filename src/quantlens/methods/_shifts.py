"""Where a shift per channel costs nothing: outputs of layers that no matrix product reads."""

from __future__ import annotations

from collections.abc import Iterable

from quantlens.graph import Edge, Graph
from quantlens.graph.graph import VIEWS, op_name

PASSES_ON = VIEWS | {"aten.cat.default"}
"""Operations that move values or join them to others."""
ELEMENTWISE = {"gelu", "add", "layer_norm"}
"""Kinds of sites that read every value by itself, so that a shift can be undone where it is read."""


def shift_axis(graph: Graph, edges: Iterable[Edge]) -> int | None:
    """The dimension of the output channels (−1 of a linear layer, 1 of a convolution) of a tensor that one such layer
    makes and only GELUs, sums and LayerNorms read; None for any other tensor.

    The layer requantizes per output channel anyway, and what reads the values works on each alone: a power of two per
    channel is a shift at both ends. A matrix product would have to sum over channels of different scale.
    """
    edges = tuple(edges)
    site = graph.sites[edges[0].site]
    if len(edges) > 1 or edges[0].position is not None or site.kind not in ("linear", "conv"):
        return None
    by_node = {s.node: s for s in graph.sites}
    queue, readers = [site.node], set()
    while queue:
        for user in queue.pop().users:
            if user in by_node:
                readers.add(by_node[user].kind)
            elif op_name(user) in PASSES_ON:
                queue.append(user)
            elif op_name(user) == "aten.add.Tensor":  # no site: a constant is added, the position embedding
                readers.add("add")
            elif not op_name(user).startswith("aten.sym_size"):
                return None
    if not readers or not readers <= ELEMENTWISE:
        return None
    return -1 if site.kind == "linear" else 1
