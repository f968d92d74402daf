"""Outlier channels: input channels of a linear layer that are far larger than all others.

A trained transformer may put one value of several hundred into one channel after a GELU, for a few tokens of every
image, where all other channels stay below seven (Sun et al., 2024, "Massive Activations in Large Language Models"). One
scale for the tensor then has no codes left for the rest. No factor can be moved through a GELU, and a factor moved into
the weights makes their column the outlier. Splitting the layer is exact: y = W₁x₁ + W₂x₂ + bias, the outlier channels
x₂ with a scale of their own (LLM.int8()'s decomposition, Dettmers et al., 2022, with integers on both sides).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantlens.graph import Graph
from quantlens.graph.graph import VIEWS, op_name
from quantlens.graph.sites import Site
from quantlens.transforms.layers import alone, hidden_source, permute_hidden, split_linear

RATIO = 16.0
"""A channel is an outlier if its largest magnitude exceeds this many times the median channel's: four bits of an
integer code would go to it alone."""

SHARE = 1 / 16
"""A layer with more outlier channels than this share of all is left alone: its channels are uneven."""


def outlier_channels(largest: Tensor, ratio: float = RATIO) -> Tensor:
    """Outliers among channels with largest magnitudes [C]: int64 [m], none if they are more than :data:`SHARE`."""
    outliers = (largest > ratio * largest.median()).nonzero().flatten()
    return outliers if len(outliers) <= SHARE * len(largest) else outliers[:0]


def outlier_candidates(graph: Graph) -> list[Site]:
    """Linear layers that may be split: those of blocks that read an activation function (not a LayerNorm, whose
    channels can be rescaled exactly, nor an attention) and have parameters of their own."""
    skipped = {site.node for site in graph.sites.of_kind("layer_norm", "context", "linear", "conv")}
    layers = [site for site in graph.sites.of_kind("linear") if site.block is not None]
    return [site for site in layers if _origin(site) not in skipped and alone(graph, site)]


def split_outliers(graph: Graph, channels: Mapping[str, Tensor]) -> list[str]:
    """Split input channels off layers (by site name, int64 [m] each); returns one sentence per layer. The function is
    unchanged."""
    done = []
    for name, chosen in channels.items():
        _split(graph, graph.sites[name], chosen)
        names = ", ".join(map(str, chosen.tolist()))
        done.append(f"outlier input channel{'s' if len(chosen) > 1 else ''} {names} of {name} split off")
    graph.invalidate()
    return done


def _split(graph: Graph, site: Site, channels: Tensor) -> None:
    """Split channels off a layer. Where nothing else reads its input, they are put after the others before (exactly),
    so that each part is a slice, not a gather, where the model is exported."""
    source = hidden_source(graph, site)
    if source is not None:
        rest = torch.ones(graph.tensor(site.weight).shape[1], dtype=torch.bool, device=channels.device)  # type: ignore[arg-type]
        rest[channels] = False
        permute_hidden(graph, source, site, torch.cat([rest.nonzero().flatten(), channels]))
        channels = torch.arange(len(rest) - len(channels), len(rest))
    split_linear(graph, site, {"massive": channels})


def _origin(site: Site) -> object:
    """The node that made a linear's input, through operations that move values."""
    node = site.node.args[0]
    while op_name(node) in VIEWS:  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[union-attr]
    return node
