"""Massive channels: input channels of a linear layer that are far larger than all others.

A trained transformer may put one value of several hundred into one channel behind a GELU, for a few tokens of every
image, where all other channels stay below seven (Sun et al., 2024, "Massive Activations in Large Language Models").
One scale for the tensor then has no codes left for the rest: in ViT-Tiny (AugReg) one channel of one layer
(``blocks.7.mlp.fc2``, channel 417: 215 against 6.8) costs 3 points of top-1 at 8 bits and 10 at W4A4.
No factor can be moved through a GELU, and a factor moved into the weights makes their column the outlier. Splitting the
layer is exact: y = W₁x₁ + W₂x₂ + bias, the massive channels x₂ with a scale of their own (LLM.int8()'s decomposition,
Dettmers et al., 2022, with integers on both sides).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlens.calibration import Calibration, Look, Walk
from quantlens.graph import Edge, Graph, hidden_source, permute_hidden, split_linear
from quantlens.graph.sites import Site

RATIO = 16.0
"""A channel is massive if its largest magnitude exceeds this many times the median channel's: four bits of an integer
code would go to it alone."""

GROUPS = 3
"""Most groups of channels that :func:`split_groups` makes."""

GAIN = 1.0
"""Decibels of rounding error that a layer may keep for having fewer groups."""

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
    found = {site: massive_channels(largest, ratio) for site, largest in seen.items()}
    return {site: channels for site, channels in found.items() if len(channels)}


def split_massive(graph: Graph, calibration: Calibration, ratio: float = RATIO) -> list[str]:
    """Split every layer that :func:`find_massive` finds; returns one sentence per layer. The function is unchanged."""
    done = []
    for site, channels in find_massive(graph, calibration, ratio).items():
        _split(graph, site, {"massive": channels})
        names = ", ".join(map(str, channels.tolist()))
        done.append(f"massive input channel{'s' if len(channels) > 1 else ''} {names} of {site.name} split off")
    graph.invalidate()
    return done


def split_groups(graph: Graph, calibration: Calibration, groups: int = GROUPS, gain: float = GAIN) -> list[str]:
    """Split the layers that :func:`find_massive` looks at into layers over groups of channels with like ranges.

    A tensor's step is that of its widest channel; the rounding error of channel c reaches the output times its weights'
    norm. The groups minimise Σ_groups range² · Σ_c ‖W_c‖², exactly, among all cuts of the channels ordered by range; a
    layer takes the fewest of at most ``groups`` parts whose error is within ``gain`` (decibels) of the best, and is
    left alone if that is one. Where nothing but the layer reads its input, the channels are put in that order before
    (exactly), so that a part is a slice. Returns one sentence per layer.
    """
    done = []
    for site, (low, high) in _ranges(graph, calibration).items():
        spread = high.clamp(min=0) - low.clamp(max=0)
        parts = channel_groups(spread, graph.tensor(site.weight).square().sum(0), groups, gain)  # type: ignore[arg-type]
        if len(parts) > 1:
            _split(graph, site, {f"group{n}": part for n, part in enumerate(parts[1:], 2)})
            sizes = ", ".join(str(len(part)) for part in parts)
            done.append(f"input channels of {site.name} in {len(parts)} groups by range ({sizes})")
    graph.invalidate()
    return done


def channel_groups(spread: Tensor, energy: Tensor, groups: int, gain: float) -> list[Tensor]:
    """Channels [C] with ranges ``spread`` [C], whose errors count ``energy`` [C], in up to ``groups`` groups by range:
    int64 indices, the narrowest group first. Exact, O(groups · C²)."""
    order = spread.argsort(stable=True)
    wide = spread[order].double()
    total = torch.cat([wide.new_zeros(1), energy[order].double().cumsum(0)])
    # cost[i, j]: of one group of the channels i to j of the order
    cost = wide.square() * (total[None, 1:] - total[:-1, None])
    cost = cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(-1), torch.inf)
    least, ends, errors = cost[0], [], [cost[0, -1]]
    for _ in range(1, min(groups, len(order))):
        least, before = (least[:-1, None] + cost[1:]).min(0)
        ends.append(before)
        errors.append(least[-1])
    decibels = 10 * torch.stack(errors).clamp(min=1e-300).log10()
    count = int((decibels - decibels.min() <= gain).nonzero()[0])
    cuts, last = [], len(order) - 1
    for before in reversed(ends[:count]):
        last = int(before[last])
        cuts.append(last + 1)
    return list(order.tensor_split(sorted(cuts)))


def _split(graph: Graph, site: Site, parts: dict[str, Tensor]) -> None:
    """Split a layer, its channels put in order before where that is possible: the parts follow what stays."""
    source = hidden_source(graph, site)
    if source is not None:
        count = graph.tensor(site.weight).shape[1]  # type: ignore[arg-type]
        rest = torch.ones(count, dtype=torch.bool)
        for channels in parts.values():
            rest[channels.cpu()] = False
        permute_hidden(graph, source, site, torch.cat([rest.nonzero().flatten(), *(c.cpu() for c in parts.values())]))
        start, moved = int(rest.sum()), {}
        for suffix, channels in parts.items():
            moved[suffix] = torch.arange(start, start + len(channels))
            start += len(channels)
        parts = moved
    split_linear(graph, site, parts)


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
