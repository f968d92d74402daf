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
from typing import Any

import torch
from torch import Tensor, fx

from quantlens.graph import Graph
from quantlens.graph.graph import VIEWS, op_name, walk
from quantlens.graph.sites import ADDS, SCALINGS, Site
from quantlens.transforms.heads import ScorePair, ValuePair, find_score_pairs, find_value_pairs
from quantlens.transforms.layers import add_to_bias
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
