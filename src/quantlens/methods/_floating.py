"""Floating-point formats on the edges of a graph: what methods share that know them."""

import torch
from torch import Tensor

from quantlens.calibration import EdgeView
from quantlens.formats import Blocks, Quantizer, floating_format
from quantlens.graph import Edge, Site
from quantlens.methods.base import Option

ABSMAX, SEARCH = "absmax", "search"

BLOCK_SCALE = Option(
    ABSMAX,
    "scales of the blocks of a floating-point format: absmax (as its standard says) or search (of that and its "
    "neighbours the one with the least squared error)",
    (ABSMAX, SEARCH),
)
"""The option of methods that leave the choice."""


def block_axis(site: Site, edge: Edge) -> int:
    """Where blocks lie: along what the product sums over. Of keys as they are read, [..., channels, tokens], of values
    [..., tokens, channels], and of the second operand of any product, that is the last dimension but one; of maps
    [B, C, H, W] the channels; of a convolution's weight [out, in, h, w] all but the first."""
    if site.kind == "conv":
        return 1 if edge.is_weight else -3
    second = edge.name in ("k", "v", "rhs") and len(edge.value.meta.get("shape") or (0, 0)) > 1
    return -2 if second else -1


def floating_activation(name: str, site: Site, edge: Edge, view: EdgeView, *, search: bool) -> Quantizer:
    """The format of a name for an activation, up to the largest magnitude seen; FP8 per tensor. Scales of blocks are
    dynamic."""
    seen = view(tail=0.0, sample=False)
    largest = torch.maximum(seen.low.abs(), seen.high.abs())[0]
    if not name.startswith("FP8"):
        return floating_format(name, largest, axis=block_axis(site, edge), search=search).to(largest.device)
    return floating_format(name, largest)


def floating_weight(name: str, site: Site, edge: Edge, weight: Tensor, *, search: bool) -> Quantizer:
    """The format of a name with static scales for a weight [out, …]; FP8 per output channel."""
    if name.startswith("FP8"):
        return floating_format(name, weight.flatten(1).abs().amax(1), axis=0)
    made = floating_format(name, weight.abs().amax(), axis=block_axis(site, edge), search=search).to(weight.device)
    return made.fitted(weight) if isinstance(made, Blocks) else made
