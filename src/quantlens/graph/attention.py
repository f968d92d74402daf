"""Fused attention opened into q·kᵀ, scale, mask, softmax and ·v, so that each of them is a site."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from quantlens.graph.graph import VIEWS, Graph, argument, op_name

aten = torch.ops.aten


def open_attention(graph: Graph) -> None:
    """Replace each fused attention by the operations that it fuses."""
    for node in graph.fx.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        q, k, v = (argument(node, name) for name in ("query", "key", "value"))
        if argument(node, "enable_gqa"):
            k, v = (_for_every_head(graph, node, x, q.meta["shape"][-3]) for x in (k, v))
        scale = argument(node, "scale")
        if scale is None:
            scale = float(q.meta["shape"][-1]) ** -0.5
        *lead, keys, size = k.meta["shape"]
        square = (*q.meta["shape"][:-1], keys)
        kt = graph.insert(node, aten.transpose.int, (k, -2, -1), (*lead, size, keys))
        logits = graph.insert(node, aten.matmul.default, (q, kt), square)
        logits = graph.insert(node, aten.mul.Tensor, (logits, float(scale)), square)
        logits, dead = _masked(graph, node, logits)
        probs = graph.insert(node, aten.softmax.int, (logits, -1), square)
        out = graph.insert(node, aten.matmul.default, (probs, v), (*square[:-1], v.meta["shape"][-1]))
        if dead is not None:
            out = graph.insert(node, aten.masked_fill.Scalar, (out, dead, 0.0), out.meta["shape"])
        node.replace_all_uses_with(out)
        graph.fx.erase_node(node)


def _for_every_head(graph: Graph, node: fx.Node, x: fx.Node, heads: int) -> fx.Node:
    """Keys or values [B, groups, N, d] of grouped-query attention, once for every head: [B, heads, N, d]."""
    batch, groups, *rest = x.meta["shape"]
    if groups == heads:
        return x
    new = graph.insert(node, aten.unsqueeze.default, (x, 2), (batch, groups, 1, *rest))
    shape = (batch, groups, heads // groups, *rest)
    new = graph.insert(node, aten.expand.default, (new, [-1, -1, heads // groups, -1, -1]), shape)
    return graph.insert(node, aten.flatten.using_ints, (new, 1, 2), (batch, heads, *rest))


def _masked(graph: Graph, node: fx.Node, logits: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The logits with the attention's mask, and the rows [.., N, 1] that attend to nothing, whose result is 0."""
    mask, shape = argument(node, "attn_mask"), logits.meta["shape"]
    if argument(node, "is_causal"):
        allowed = torch.ones(shape[-2:], dtype=torch.bool, device=graph.device).tril()
        return _masked_by(graph, node, logits, "causal", allowed, [])
    if mask is None:
        return logits, None
    moves: list[fx.Node] = []
    while op_name(source := moves[0].args[0] if moves else mask) in VIEWS:  # type: ignore[arg-type]
        moves.insert(0, source)  # type: ignore[arg-type]
    constant = graph.constant(source)
    if constant is not None:
        return _masked_by(graph, node, logits, str(source.target), constant, moves)  # type: ignore[union-attr]
    if mask.meta["dtype"] != torch.bool:
        return graph.insert(node, aten.add.Tensor, (logits, mask), shape), None
    size, lowest = mask.meta["shape"], torch.finfo(torch.float32).min  # −∞ would make NaN of a row without any
    forbidden = graph.insert(node, aten.logical_not.default, (mask,), size)
    some = graph.insert(node, aten.any.dim, (mask, -1, True), (*size[:-1], 1))
    none = graph.insert(node, aten.logical_not.default, (some,), (*size[:-1], 1))
    return graph.insert(node, aten.masked_fill.Scalar, (logits, forbidden, lowest), shape), none


def _masked_by(
    graph: Graph, node: fx.Node, logits: fx.Node, name: str, mask: Tensor, moves: Sequence[fx.Node]
) -> tuple[fx.Node, fx.Node | None]:
    """The same for a constant mask, which is read after ``moves``: nothing where it allows all; else what it adds, −∞
    where a boolean one is False."""
    given, shape = argument(node, "attn_mask"), logits.meta["shape"]
    bias = (
        mask if mask.dtype != torch.bool else torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    )
    if not bool(bias.count_nonzero()):
        return logits, None

    def moved(leaf: str, value: Tensor) -> fx.Node:
        made = graph.insert_tensor(node, graph.unused(f"{name}_{leaf}", ""), value)
        for move in moves:
            made = graph.insert(node, move.target, (made, *move.args[1:]), move.meta["shape"])
        return made

    none = (bias == -math.inf).all(-1, keepdim=True)
    if not bool(none.any()):
        added = moved("bias", bias) if mask.dtype == torch.bool else given
        return graph.insert(node, aten.add.Tensor, (logits, added), shape), None
    masked = graph.insert(node, aten.add.Tensor, (logits, moved("bias", bias.masked_fill(none, 0.0))), shape)
    dead = moved("dead", none.expand_as(mask).contiguous())
    return masked, graph.insert(node, aten.slice.Tensor, (dead, -1, 0, 1), (*dead.meta["shape"][:-1], 1))
