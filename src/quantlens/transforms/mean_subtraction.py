"""Means of channels taken out of what is quantized, exactly. A quantizer's range is symmetric about what it codes; a
channel that is always large spends it on a number that is known beforehand.

* LayerNorm outputs: LN(x) − μ, and the linear layers after it take W·μ into their biases.
* Keys: k − μ. All logits of a query change by the same −q·μ, which the softmax does not see (SageAttention, Zhang et
  al., ICLR 2025, subtracts the mean of every sequence; here it is one of all images, and the bias of the layer that
  makes k takes it up).
* What an attention reads out: v − μ. Rows of probabilities sum to one, so that the outputs change by −μ, which the
  biases on both sides take up. Quantized rows keep it exact where they sum to one too
  (:class:`quantlens.formats.SqrtSoftmax`), and lose nothing of the mean where they do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantlens.graph import Graph
from quantlens.graph.graph import VIEWS, op_name
from quantlens.graph.sites import ADDS, SCALINGS, Site
from quantlens.transforms.heads import ScorePair, ValuePair, find_score_pairs, find_value_pairs
from quantlens.transforms.layers import alone, ensure_bias
from quantlens.transforms.norms import NormGroup, find_norm_groups, keeps_channels_last, rescale_norm


@dataclass(frozen=True)
class MeanSubtraction:
    """Where the graph proves that a mean per channel can be taken out, by the key of the edge that carries it."""

    norms: Mapping[str, NormGroup]
    keys: Mapping[str, ScorePair]
    outputs: Mapping[str, ValuePair]

    @classmethod
    def find(cls, graph: Graph) -> MeanSubtraction:
        """All such places of a graph."""

        def own(*layers: Site) -> bool:  # a bias that two layers share cannot take up what one of them needs
            return all(alone(graph, layer) for layer in layers)

        return cls(
            {f"{group.norm.name}.output": group for group in find_norm_groups(graph) if own(*group.linears)},
            {
                f"{pair.k.name}.output": pair
                for pair in find_score_pairs(graph)
                if own(pair.k) and _rows_shift_freely(graph, pair.scores)
            },
            {
                f"{pair.proj.name}.input": pair
                for pair in find_value_pairs(graph)
                if own(pair.values, pair.proj) and _rows_sum_to_one(pair.context)
            },
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
            _add(graph, pair.k, -means[key][rows.to(means[key].device)], rows)
        for key, context in self.outputs.items():
            mean = torch.empty_like(means[key])
            mean[context.of.to(mean.device)] = means[key]  # column j of proj carries channel of[j] of v
            _add(graph, context.values, -mean, context.rows)
            weight = graph.tensor(str(context.proj.weight)).double()
            _add(graph, context.proj, weight @ means[key].to(weight.device))
        graph.invalidate()
        done = {"LayerNorms": len(self.norms), "keys": len(self.keys), "attention outputs": len(self.outputs)}
        found = ", ".join(f"{count} {what}" for what, count in done.items() if count)
        return [f"means taken out of {found}"] if found else []


def _add(graph: Graph, layer: Site, value: Tensor, rows: Tensor | None = None) -> None:
    """Add ``value`` to a layer's bias, or to these rows of it."""
    name = ensure_bias(graph, layer)
    bias = graph.tensor(name).to(torch.float64, copy=True)
    if rows is None:
        bias = bias + value.to(bias.device)
    else:
        bias[rows.to(bias.device)] += value.to(bias.device)
    graph.set_tensor(name, bias.to(graph.tensor(name).dtype))


def _rows_shift_freely(graph: Graph, scores: Site) -> bool:
    """Whether a number added to all logits of a query leaves the softmax as it is: it goes over the keys, and between
    the product and it there are sums, masks, views, and factors that are the same for all keys."""
    queue, seen = list(scores.node.users), set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        op = op_name(node)
        if op == "aten.softmax.int":
            shape = node.meta.get("shape")
            if shape is None or int(node.args[1]) % len(shape) != len(shape) - 1:  # type: ignore[arg-type]
                return False
        elif op in SCALINGS:
            if not all(_same_for_all_keys(graph, other) for other in node.args[1:]):
                return False
            queue.extend(node.users)
        elif op in VIEWS | ADDS | {"aten.masked_fill.Scalar", "aten.where.self"}:
            queue.extend(node.users)
        else:
            return False
    return True


def _rows_sum_to_one(context: Site) -> bool:
    """Whether what an attention multiplies v with are whole rows of a softmax over the keys."""
    node = context.edges["probs"].value
    while op_name(node) != "aten.softmax.int":
        source = node.args[0]
        if not isinstance(source, fx.Node) or not (
            op_name(node) == "aten.expand.default" or keeps_channels_last(node, source)
        ):
            return False
        node = source
    rank = len(node.meta["shape"])
    return int(node.args[1]) % rank == rank - 1  # type: ignore[arg-type]


def _same_for_all_keys(graph: Graph, factor: object) -> bool:
    if not isinstance(factor, fx.Node):
        return True
    constant = graph.constant(factor)
    return constant is not None and (constant.dim() == 0 or constant.shape[-1] == 1)
