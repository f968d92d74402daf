"""Exact changes inside the heads of an attention, which the linear layers on both sides absorb.

* v → proj: the context is linear in v, channel by channel. The channels of v in a head can be multiplied by any
  invertible matrix if the columns of the layer that reads the context undo it: one factor per channel
  (:func:`rescale_values`), or a rotation (:func:`rotate_values`).
* q, k: the scores are products of the channels of a head, so one rotation of both leaves them as they are
  (:func:`rotate_scores`).

A rotation spreads what a few channels hold over all of a head's, so that one scale fits them (QuaRot, Ashkboos et al.,
NeurIPS 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.graph import Graph, Site
from quantlens.graph.graph import VIEWS, op_name
from quantlens.graph.sites import SCALINGS
from quantlens.transforms.layers import alone
from quantlens.transforms.rotation import orthogonal


@dataclass(frozen=True)
class ValuePair:
    """A linear layer that makes v and the one that reads the context, with their channels matched.

    context: the attention product. values: the layer that makes v; rows [C]: its output channels that are v, head after
    head. proj: the layer that reads the context; of[j] in 0 … C − 1: which of ``rows`` its input column j carries.
    heads: their number.
    """

    context: Site
    values: Site
    rows: Tensor
    proj: Site
    of: Tensor
    heads: int


@dataclass(frozen=True)
class ScorePair:
    """The linear layers that make q and k (often one). q_rows, k_rows [heads, d]: their output channels that are q and
    k, in the order in which the product multiplies them."""

    scores: Site
    q: Site
    q_rows: Tensor
    k: Site
    k_rows: Tensor


def find_value_pairs(graph: Graph) -> list[ValuePair]:
    """The pairs where the graph proves that dividing rows of v and multiplying columns of proj is exact.

    Proof by execution: the numbers of the channels are sent through the operations between the layer and v, and
    between the context and the next layer. Every one of these must only move values, every channel must arrive at one
    place of every token, v's channels must be read by nothing but this product, and the context by nothing but one
    linear layer.
    """
    by_node = {site.node: site for site in graph.sites}
    pairs = []
    for context in graph.sites.of_kind("context"):
        made = _made(graph, by_node, context, "v", VIEWS)
        if made is None:
            continue
        values, heads = made
        rows = heads.flatten()  # v is [.., heads, tokens, d]; a channel is (head, d)
        after = _numbers(graph, context.node, like=heads)
        if after is None or graph.output in after:
            continue
        ends = [(u, a) for a in after for u in a.users if u not in after]
        if len(ends) != 1 or op_name(ends[0][0]) != "aten.linear.default" or ends[0][0].args[0] is not ends[0][1]:
            continue
        proj, of = by_node.get(ends[0][0]), _one_per_column(after[ends[0][1]])
        if (
            proj is None
            or of is None
            or len(of) != len(rows)
            or not alone(graph, proj)
            or not torch.equal(of.sort().values, torch.arange(len(of)))
        ):
            continue
        pairs.append(ValuePair(context, values, rows, proj, of, len(heads)))
    return pairs


def find_score_pairs(graph: Graph) -> list[ScorePair]:
    """The attentions where the graph proves that one rotation of q and k per head is exact: both come from linear
    layers through moves and multiplications by numbers alone, and nothing else reads their channels."""
    by_node = {site.node: site for site in graph.sites}
    pairs = []
    for scores in graph.sites.of_kind("scores"):
        q, k = (_made(graph, by_node, scores, name, VIEWS | SCALINGS) for name in ("q", "k"))
        if q is not None and k is not None and q[1].shape == k[1].shape:
            pairs.append(ScorePair(scores, *q, *k))
    return pairs


def _made(
    graph: Graph, by_node: dict[fx.Node, Site], product: Site, operand: str, through: set[str]
) -> tuple[Site, Tensor] | None:
    """The linear layer that makes an operand [.., heads, tokens, d] (or [.., heads, d, tokens]) of a product, and its
    output channels [heads, d] that are the operand; None unless this product alone reads them."""
    value = product.edges[operand].value
    source = _source(value, through)
    layer = by_node.get(source)
    if layer is None or layer.kind != "linear" or not alone(graph, layer):
        return None
    seen = _numbers(graph, source, through=through)
    if seen is None or graph.output in seen:
        return None
    rows = _one_per_channel(seen.get(value))
    if rows is None and operand == "k" and isinstance(seen.get(value), Tensor):
        rows = _one_per_channel(seen[value].transpose(-1, -2))
    if rows is None:
        return None
    readers = [(u, a) for a in seen for u in a.users if u not in seen and u.op == "call_function"]
    others = [seen[a] for u, a in readers if not (u is product.node and a is value)]
    if any(bool(torch.isin(rows, o).any()) for o in others if isinstance(o, Tensor)):
        return None
    return layer, rows


def rescale_values(graph: Graph, pair: ValuePair, scale: Tensor) -> None:
    """Divide v by ``scale`` [C] > 0 (in the order of ``pair.rows``) and undo it in proj's columns, exactly."""
    weight, name = graph.tensor(str(pair.values.weight)), str(pair.values.weight)
    factor = torch.ones(weight.shape[0], dtype=torch.float64, device=weight.device)
    factor[pair.rows.to(weight.device)] = scale.to(weight.device, torch.float64)
    graph.set_tensor(name, (weight.double() / factor[:, None]).to(weight.dtype))
    if pair.values.bias is not None:
        bias = graph.tensor(pair.values.bias)
        graph.set_tensor(pair.values.bias, (bias.double() / factor).to(bias.dtype))
    columns_of = scale.to(weight.device, torch.float64)[pair.of.to(weight.device)]
    proj = graph.tensor(str(pair.proj.weight))
    graph.set_tensor(str(pair.proj.weight), (proj.double() * columns_of).to(proj.dtype))


def rotate_values(graph: Graph, pair: ValuePair, generator: torch.Generator) -> None:
    """Rotate v's channels in every head at random, and undo it in proj's columns, exactly."""
    rows = pair.rows.view(pair.heads, -1)
    rotation = torch.stack([orthogonal(rows.shape[1], generator) for _ in range(pair.heads)])
    _turn_rows(graph, pair.values, rows, rotation)
    name = str(pair.proj.weight)
    weight = graph.tensor(name)
    place = pair.of.argsort().to(weight.device).view(pair.heads, -1)  # the columns of every head, in v's order
    turned = weight.to(torch.float64, copy=True)
    turned[:, place] = torch.einsum("ohd,hed->ohe", turned[:, place], rotation.to(weight.device))
    graph.set_tensor(name, turned.to(weight.dtype))


def rotate_scores(graph: Graph, pair: ScorePair, generator: torch.Generator) -> None:
    """Rotate the channels of q and of k in every head alike, at random; the scores stay, exactly."""
    heads, size = pair.q_rows.shape
    rotation = torch.stack([orthogonal(size, generator) for _ in range(heads)])
    _turn_rows(graph, pair.q, pair.q_rows, rotation)
    _turn_rows(graph, pair.k, pair.k_rows, rotation)


def _turn_rows(graph: Graph, layer: Site, rows: Tensor, rotation: Tensor) -> None:
    """Multiply the output channels ``rows`` [heads, d] of a linear layer by ``rotation`` [heads, d, d]."""
    weight = graph.tensor(str(layer.weight))
    rows, rotation = rows.to(weight.device), rotation.to(weight.device)
    turned = weight.to(torch.float64, copy=True)
    turned[rows] = torch.einsum("hed,hdi->hei", rotation, turned[rows])
    graph.set_tensor(str(layer.weight), turned.to(weight.dtype))
    if layer.bias is not None:
        bias = graph.tensor(layer.bias)
        turned = bias.to(torch.float64, copy=True)
        turned[rows] = torch.einsum("hed,hd->he", rotation, turned[rows])
        graph.set_tensor(layer.bias, turned.to(bias.dtype))


def _source(node: Any, through: set[str] = VIEWS) -> Any:
    while isinstance(node, fx.Node) and _passes(node, through):
        node = node.args[0]
    return node


def _passes(node: fx.Node, through: set[str]) -> bool:
    """Whether a node is one of these operations; of multiplications, by one number."""
    op = op_name(node)
    return op in through and (op not in SCALINGS or isinstance(node.args[1], int | float))


def _numbers(
    graph: Graph, start: fx.Node, like: Tensor | None = None, *, through: set[str] = VIEWS
) -> dict[fx.Node, Any] | None:
    """Channel numbers after ``start`` through all operations that only move values (or are named): node -> int64
    tensor (or a tuple of them). ``start`` holds the number of its last channel, or (head, channel) numbers for ``like``
    [.., heads, d]."""
    shape = start.meta["shape"]
    if shape is None:
        return None
    # two images; windows make several rows of an image, so the first dimension is found by trial
    for rows in (2, *(2 * n for n in _window_counts(graph))):
        size = [rows if d is None else d for d in shape]
        if like is None:
            value = torch.arange(size[-1]).expand(*size)
        else:
            if len(size) < 3 or size[-3] != like.shape[0] or size[-1] != like.shape[1]:
                return None
            value = torch.arange(like.numel()).view(like.shape[0], 1, like.shape[1]).expand(*size)
        env: dict[fx.Node, Any] = {start: value}
        stub: dict[fx.Node, Any] = {graph.input: torch.empty((2, *graph.input.meta["shape"][1:]), device="meta")}
        try:
            queue = [start]
            while queue:
                for user in queue.pop(0).users:
                    if user not in env and _passes(user, through) and user.args[0] in env:
                        if op_name(user) in SCALINGS:
                            env[user] = env[user.args[0]]
                            queue.append(user)
                            continue
                        args = fx.map_arg(user.args, lambda n, e=env, s=stub: e[n] if n in e else graph._value(n, s))
                        env[user] = user.target(*args, **user.kwargs)  # type: ignore[operator]
                        queue.append(user)
        except (RuntimeError, IndexError, TypeError):
            continue
        if all(_fits(value, node.meta.get("shape")) for node, value in env.items()):
            return env
    return None


def _fits(value: Any, shape: tuple | None) -> bool:
    """Whether a value has the shape that its node had in the capture (None: any size)."""
    if shape is None or not isinstance(value, Tensor):
        return True
    return value.dim() == len(shape) and all(b is None or a == b for a, b in zip(value.shape, shape, strict=True))


def _window_counts(graph: Graph) -> list[int]:
    """Numbers of windows per image that the graph multiplies its batch with."""
    counts = {
        a
        for node in graph.fx.nodes
        if node.op == "call_function" and node.meta.get("symbolic") and op_name(node) == "<built-in function mul>"
        for a in node.args
        if isinstance(a, int)
    }
    return sorted(counts)


def _one_per_channel(numbers: Any) -> Tensor | None:
    """[heads, d] if ``numbers`` [.., heads, tokens, d] holds the same number for every image and token."""
    if not isinstance(numbers, Tensor) or numbers.dim() < 3:
        return None
    first = numbers.reshape(-1, *numbers.shape[-3:])[0, :, 0, :]
    same = bool((numbers == first[:, None, :]).all())
    return first if same and len(first.flatten().unique()) == first.numel() else None


def _one_per_column(numbers: Any) -> Tensor | None:
    """[C] if ``numbers`` [.., C] holds the same number for every image and token."""
    if not isinstance(numbers, Tensor) or numbers.dim() < 2:
        return None
    first = numbers.reshape(-1, numbers.shape[-1])[0]
    return first if bool((numbers == first).all()) else None


__all__ = [
    "ScorePair",
    "ValuePair",
    "find_score_pairs",
    "find_value_pairs",
    "rescale_values",
    "rotate_scores",
    "rotate_values",
]
