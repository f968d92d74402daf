"""Exact changes inside the heads of an attention, which the linear layers on both sides absorb.

* v → proj: the context is linear in v, channel by channel. The channels of v in a head can be multiplied by any
  invertible matrix if the columns of the layer that reads the context undo it: one factor per channel
  (:func:`rescale_values`), or a rotation (:func:`rotate_values`).
* q, k: the scores are products of the channels of a head, so one rotation of both leaves them as they are
  (:func:`rotate_scores`).

A rotation spreads what a few channels hold over all of a head's, so that one scale fits them (QuaRot, Ashkboos et al.,
NeurIPS 2024).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.graph import ADDS, SCALINGS, VIEWS, Graph, Site, example_sizes, moved, op_name, walk
from quantlens.transforms.layers import add_to_bias, alone, change_input
from quantlens.transforms.norms import NormGroup, find_norm_groups, keeps_channels_last, rescale_norm
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
    pairs = []
    for context in graph.sites.of_kind("context"):
        made = _made(graph, context, "v", VIEWS)
        after = _numbers(context.node, like=made[1]) if made is not None else None
        if made is None or after is None or not after.keys().isdisjoint(graph.outputs):
            continue
        ends = [(u, a) for a in after for u in a.users if u not in after]
        proj = graph.sites.by_node.get(ends[0][0]) if len(ends) == 1 else None
        if proj is None or proj.kind != "linear" or proj.edges["input"].value is not ends[0][1]:
            continue
        values, heads = made  # v is [.., heads, tokens, d]; a channel is (head, d)
        of = _one_per_channel(after[ends[0][1]], heads=False)
        if of is not None and of.numel() == heads.numel() and alone(graph, proj):
            pairs.append(ValuePair(context, values, heads.flatten(), proj, of.flatten(), len(heads)))
    return pairs


def scale_queries(graph: Graph) -> list[str]:
    """Multiply queries by the number that their products with keys are multiplied by, so that nothing stands between
    the product and its mask or softmax. Returns a sentence, where that was done."""
    done = 0
    for scores in graph.sites.of_kind("scores"):
        users = list(scores.node.users)
        scaling = users[0] if len(users) == 1 and op_name(users[0]) in SCALINGS else None
        if scaling is None or scaling.args[0] is not scores.node or not isinstance(scaling.args[1], int | float):
            continue
        query: Any = scores.node.args[0]
        scaled = graph.insert(scores.node, scaling.target, (query, scaling.args[1]), query.meta["shape"])
        scores.node.replace_input_with(query, scaled)
        scaling.replace_all_uses_with(scores.node)
        graph.fx.erase_node(scaling)
        done += 1
    graph.invalidate()
    return [f"queries of {done} attentions are scaled before their product with the keys"] if done else []


def find_score_pairs(graph: Graph) -> list[ScorePair]:
    """The attentions where the graph proves that one rotation of q and k per head is exact: both come from linear
    layers through moves and multiplications by numbers alone, and nothing else reads their channels."""
    pairs = []
    for scores in graph.sites.of_kind("scores"):
        q, k = (_made(graph, scores, name, VIEWS | SCALINGS) for name in ("q", "k"))
        if q is not None and k is not None and q[1].shape == k[1].shape:
            pairs.append(ScorePair(scores, *q, *k))
    return pairs


def _made(graph: Graph, product: Site, operand: str, through: set[str]) -> tuple[Site, Tensor] | None:
    """The linear layer that makes an operand [.., heads, tokens, d] (or [.., heads, d, tokens]) of a product, and its
    output channels [heads, d] that are the operand; None unless this product alone reads them."""
    value = product.edges[operand].value
    source: Any = value
    while _passes(source, through):
        source = source.args[0]
    layer = graph.sites.by_node.get(source)
    if layer is None or layer.kind != "linear" or not alone(graph, layer):
        return None
    seen = _numbers(source, through=through)
    if seen is None or not seen.keys().isdisjoint(graph.outputs):
        return None
    rows = _one_per_channel(seen.get(value))
    if rows is None and operand == "k" and isinstance(seen.get(value), Tensor):
        rows = _one_per_channel(seen[value].transpose(-1, -2))
    readers = [(u, a) for a in seen for u in a.users if u not in seen and u.op == "call_function"]
    others = [seen[a] for u, a in readers if not (u is product.node and a is value)]
    if rows is None or any(bool(torch.isin(rows, o).any()) for o in others if isinstance(o, Tensor)):
        return None
    return layer, rows


def rescale_values(graph: Graph, pair: ValuePair, scale: Tensor) -> None:
    """Divide v by ``scale`` [C] > 0 (in the order of ``pair.rows``) and undo it in proj's columns, exactly."""
    scale = scale.to(graph.device, torch.float64)
    _change_rows(graph, pair.values, pair.rows, lambda rows: rows / scale.view(-1, *[1] * (rows.dim() - 1)))
    change_input(graph, pair.proj, lambda weight: weight * scale[pair.of.to(weight.device)])


def rotate_values(graph: Graph, pair: ValuePair, generator: torch.Generator) -> None:
    """Rotate v's channels in every head at random, and undo it in proj's columns, exactly."""
    rows = pair.rows.view(pair.heads, -1)
    rotation = torch.stack([orthogonal(rows.shape[1], generator) for _ in range(pair.heads)])
    _turn_rows(graph, pair.values, rows, rotation)
    place = pair.of.argsort().view(pair.heads, -1)  # the columns of every head, in v's order

    def turned(weight: Tensor) -> Tensor:
        columns = weight[:, place.to(weight.device)]
        weight[:, place.to(weight.device)] = torch.einsum("ohd,hed->ohe", columns, rotation.to(weight.device))
        return weight

    change_input(graph, pair.proj, turned)


def rotate_scores(graph: Graph, pair: ScorePair, generator: torch.Generator) -> None:
    """Rotate the channels of q and of k in every head alike, at random; the scores stay, exactly."""
    heads, size = pair.q_rows.shape
    rotation = torch.stack([orthogonal(size, generator) for _ in range(heads)])
    _turn_rows(graph, pair.q, pair.q_rows, rotation)
    _turn_rows(graph, pair.k, pair.k_rows, rotation)


def _turn_rows(graph: Graph, layer: Site, rows: Tensor, rotation: Tensor) -> None:
    """Multiply the output channels ``rows`` [heads, d] of a linear layer by ``rotation`` [heads, d, d]."""
    rotation = rotation.to(graph.device)
    _change_rows(graph, layer, rows, lambda values: torch.einsum("hed,hd...->he...", rotation, values))


def _change_rows(graph: Graph, layer: Site, rows: Tensor, new: Callable[[Tensor], Tensor]) -> None:
    """Replace what a linear layer has for its output channels ``rows``, in weight and bias, by what ``new`` makes."""

    def changed(value: Tensor) -> Tensor:
        value[rows.to(value.device)] = new(value[rows.to(value.device)])
        return value

    for name in (layer.weight, layer.bias):
        if name is not None:
            graph.change(name, changed)


def _passes(node: fx.Node, through: set[str]) -> bool:
    """Whether a node is one of these operations; of multiplications, by one number."""
    op = op_name(node)
    return op in through and (op not in SCALINGS or isinstance(node.args[1], int | float))


def _numbers(start: fx.Node, like: Tensor | None = None, *, through: set[str] = VIEWS) -> dict[fx.Node, Any] | None:
    """Channel numbers after ``start`` through all operations that only move values (or are named): node -> int64
    tensor (or a tuple of them). ``start`` holds the number of its last channel, or (head, channel) numbers for ``like``
    [.., heads, d]."""
    nodes = list(walk([start], lambda n: [u for u in n.users if u.args[0] is n and _passes(u, through)]))
    sizes = example_sizes(nodes)
    if like is None:
        value = torch.arange(sizes[-1]).expand(sizes)
    elif sizes[-3::2] != list(like.shape):
        return None
    else:
        value = torch.arange(like.numel()).view(like.shape[0], 1, like.shape[1]).expand(sizes)
    found: dict[fx.Node, Any] = {start: value}
    for node in nodes[1:]:  # a number stays what it is where it is scaled
        source = found[node.args[0]]  # type: ignore[index]
        found[node] = source if op_name(node) in SCALINGS else moved(source, node)
    return found


def _one_per_channel(numbers: Any, *, heads: bool = True) -> Tensor | None:
    """[heads, d] if ``numbers`` [.., heads, tokens, d] (without heads: [.., tokens, d], one head) holds the same number
    for every image and token, and no number twice."""
    if not isinstance(numbers, Tensor) or numbers.dim() < 2 + heads:
        return None
    numbers = numbers if heads else numbers.unsqueeze(-3)
    first = numbers.reshape(-1, *numbers.shape[-3:])[0, :, 0, :]
    same = bool((numbers == first[:, None, :]).all())
    return first if same and len(first.unique()) == first.numel() else None


# -- means of channels ---------------------------------------------------------------------------------------------
# Means of channels taken out of what is quantized, exactly. A quantizer's range is symmetric about what it codes; a
# channel that is always large spends it on a number that is known beforehand.
#
# * LayerNorm outputs: LN(x) − μ, and the linear layers after it take W·μ into their biases.
# * Keys: k − μ. All logits of a query change by the same −q·μ, which the softmax does not see (SageAttention, Zhang et
#   al., ICLR 2025, subtracts the mean of every sequence; here it is one of all images, and the bias of the layer that
#   makes k takes it up).
# * What an attention reads out: v − μ. Rows of probabilities sum to one, so that the outputs change by −μ, which the
#   biases on both sides take up. Quantized rows keep it exact where they sum to one too
#   (:class:`quantlens.formats.SqrtSoftmax`), and lose nothing of the mean where they do not.


@dataclass(frozen=True)
class MeanSubtraction:
    """Where the graph proves that a mean per channel can be taken out, by the key of the edge that carries it."""

    norms: Mapping[str, NormGroup]
    keys: Mapping[str, ScorePair]
    outputs: Mapping[str, ValuePair]

    @classmethod
    def find(cls, graph: Graph) -> "MeanSubtraction":
        """All such places of a graph."""
        return cls(
            {f"{group.norm.name}.output": group for group in find_norm_groups(graph)},
            {f"{p.k.name}.output": p for p in find_score_pairs(graph) if _rows_shift_freely(graph, p.scores)},
            {f"{p.proj.name}.input": p for p in find_value_pairs(graph) if _rows_sum_to_one(p.context)},
        )

    @property
    def edges(self) -> tuple[str, ...]:
        """Keys of the edges whose means are taken out."""
        return (*self.norms, *self.keys, *self.outputs)

    def apply(self, graph: Graph, means: Mapping[str, Tensor]) -> list[str]:
        """Take ``means`` (float64 [C] by edge key, those of :attr:`edges` at least) out. Returns one sentence, or
        nothing where there is nothing."""
        for key, group in self.norms.items():
            rescale_norm(graph, group, torch.ones_like(means[key]), means[key])
        for key, pair in self.keys.items():
            rows = pair.k_rows.flatten()
            add_to_bias(graph, pair.k, -means[key][rows.to(means[key].device)], rows)
        for key, context in self.outputs.items():
            mean = torch.empty_like(means[key])
            mean[context.of.to(mean.device)] = means[key]  # column j of proj carries channel of[j] of v
            add_to_bias(graph, context.values, -mean, context.rows)
            weight = graph.tensor(str(context.proj.weight)).double()
            add_to_bias(graph, context.proj, weight @ means[key].to(weight.device))
            change_input(graph, context.proj, shift=means[key])
        graph.invalidate()
        done = {"LayerNorms": len(self.norms), "keys": len(self.keys), "attention outputs": len(self.outputs)}
        found = ", ".join(f"{count} {what}" for what, count in done.items() if count)
        return [f"means taken out of {found}"] if found else []


def _rows_shift_freely(graph: Graph, scores: Site) -> bool:
    """Whether a number added to all logits of a query leaves the softmax as it is: it goes over the keys, and between
    the product and it there are sums, masks, views, and factors that are the same for all keys."""
    passing = VIEWS | ADDS | SCALINGS | {"aten.masked_fill.Scalar", "aten.where.self"}

    def free(node: fx.Node) -> bool:
        if op_name(node) in SCALINGS:
            return all(_same_for_all_keys(graph, other) for other in node.args[1:])
        return op_name(node) in passing or _is_softmax_over_keys(node)

    return all(free(n) for n in walk(scores.node.users, lambda n: n.users if op_name(n) in passing else ()))


def _rows_sum_to_one(context: Site) -> bool:
    """Whether what an attention multiplies v with are whole rows of a softmax over the keys."""
    node: Any = context.edges["probs"].value
    while op_name(node) == "aten.expand.default" or (
        op_name(node) in VIEWS and keeps_channels_last(node, node.args[0])
    ):
        node = node.args[0]
    return _is_softmax_over_keys(node)


def _is_softmax_over_keys(node: fx.Node) -> bool:
    rank = len(node.meta.get("shape") or ())
    return op_name(node) == "aten.softmax.int" and rank > 0 and node.args[1] % rank == rank - 1  # type: ignore[operator]


def _same_for_all_keys(graph: Graph, factor: object) -> bool:
    constant = graph.constant(factor)
    return not isinstance(factor, fx.Node) or (constant is not None and constant.shape[-1:] in ((), (1,)))
