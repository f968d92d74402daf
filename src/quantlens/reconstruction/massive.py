"""Massive channels: input channels of a linear layer that are far larger than all others.

A trained transformer may put one value of several hundred into one channel behind a GELU, for a few tokens of every
image, where all other channels stay below seven (Sun et al., 2024, "Massive Activations in Large Language Models").
One scale for the tensor then has no codes left for the rest: in ViT-Tiny (AugReg) one channel of one layer
(``blocks.7.mlp.fc2``, channel 417: 215 against 6.8) costs 3 points of top-1 at 8 bits and 10 at W4A4.
No factor can be moved through a GELU, and a factor moved into the weights makes their column the outlier. Splitting the
layer is exact: y = W₁x₁ + W₂x₂ + bias, the massive channels x₂ with a scale of their own (LLM.int8()'s decomposition,
Dettmers et al., 2022, with integers on both sides).

More groups, by range, do not pay: cut with the least rounding error on 32 images of DeiT-Tiny, three groups per layer
raise what remains of 8-bit inputs of fc2 from 24.4 to 28.8 dB on those images and lower it from 25.3 to 18.8 on 50
others, whose values leave the narrow groups' ranges (256 images: 22.6 to 26.8, and 23.1 to 23.9).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlens.calibration import Calibration, Look, Walk
from quantlens.graph import Edge, Graph
from quantlens.graph.sites import Site
from quantlens.transforms import hidden_source, permute_hidden, split_linear
from quantlens.transforms.rewrites import alone

RATIO = 16.0
"""A channel is massive if its largest magnitude exceeds this many times the median channel's: four bits of an integer
code would go to it alone."""

SHARE = 1 / 16
"""A layer with more massive channels than this share of all is left alone: its channels are uneven, not massive."""


def massive_channels(largest: Tensor, ratio: float = RATIO) -> Tensor:
    """Massive ones among channels with largest magnitudes [C]: int64 [m], none if they are more than :data:`SHARE`."""
    massive = (largest > ratio * largest.median()).nonzero().flatten()
    return massive if len(massive) <= SHARE * len(largest) else massive[:0]


def find_massive(graph: Graph, calibration: Calibration, ratio: float = RATIO) -> dict[Site, Tensor]:
    """Linear layers behind a GELU or another activation function (not behind a LayerNorm, whose channels can be
    rescaled exactly, nor inside an attention) with massive input channels: site -> int64 [m]. One pass over the images.
    """
    seen = {site: torch.maximum(high.abs(), low.abs()) for site, (low, high) in _ranges(graph, calibration).items()}
    found = {site: massive_channels(largest, ratio) for site, largest in seen.items() if alone(graph, site)}
    return {site: channels for site, channels in found.items() if len(channels)}


def split_massive(graph: Graph, calibration: Calibration, ratio: float = RATIO) -> list[str]:
    """Split every layer that :func:`find_massive` finds; returns one sentence per layer. The function is unchanged."""
    done = []
    for site, channels in find_massive(graph, calibration, ratio).items():
        _split(graph, site, channels)
        names = ", ".join(map(str, channels.tolist()))
        done.append(f"massive input channel{'s' if len(channels) > 1 else ''} {names} of {site.name} split off")
    graph.invalidate()
    return done


def _split(graph: Graph, site: Site, channels: Tensor) -> None:
    """Split channels off a layer. Where nothing else reads its input, they are put behind the others before (exactly),
    so that each part is a slice, not a gather, where the model is exported."""
    source = hidden_source(graph, site)
    if source is not None:
        rest = torch.ones(graph.tensor(site.weight).shape[1], dtype=torch.bool, device=channels.device)  # type: ignore[arg-type]
        rest[channels] = False
        permute_hidden(graph, source, site, torch.cat([rest.nonzero().flatten(), channels]))
        channels = torch.arange(len(rest) - len(channels), len(rest))
    split_linear(graph, site, {"massive": channels})


def _ranges(graph: Graph, calibration: Calibration) -> dict[Site, tuple[Tensor, Tensor]]:
    """Smallest and largest value [C] of each input channel of linear layers behind activation functions."""
    skipped = {site.node for site in graph.sites.of_kind("layer_norm", "context", "linear", "conv")}
    sites = {
        site.edges["input"].key: site
        for site in graph.sites.of_kind("linear")
        if site.block is not None and _origin(site) not in skipped
    }
    found: dict[Site, tuple[Tensor, Tensor]] = {}

    def decide(edge: Edge, look: Look) -> None:
        seen = look(axis=-1)
        found[sites[edge.key]] = (seen.low, seen.high)

    Walk(graph, calibration, sequential=False).run([s.edges["input"] for s in sites.values()], decide)
    return found


def _origin(site: Site) -> object:
    """The node that made a linear's input, through operations that move values."""
    from quantlens.graph.graph import VIEWS, op_name

    node = site.node.args[0]
    while op_name(node) in VIEWS:  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[union-attr]
    return node
