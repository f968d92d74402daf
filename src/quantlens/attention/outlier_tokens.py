"""Outlier tokens: patch tokens whose norm stands far out of their image's others (Darcet et al., ICLR 2024, section 2).

They cut at a fixed norm that fits one model. Precisions and models have norms of different size, so the rule here is
relative to the image: a patch token is an outlier if its norm exceeds the median norm of its image's patch tokens by
more than :data:`SPREAD` robust standard deviations (1.4826·MAD) and is at least :data:`RATIO` times that median.

Where many tokens are large, the median and the spread are theirs, and none is an outlier. What is then seen in a
picture is counted by :func:`large`: tokens of at least :data:`RATIO` times the lower quartile of their image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPREAD = 6.0
RATIO = 1.5


def token_norms(tokens: Tensor, prefix: int = 0) -> Tensor:
    """Euclidean norms of patch tokens: [B, N, C] (or [B, H, W, C]) -> [B, P], class and register tokens left out."""
    return tokens.flatten(1, -2)[:, prefix:].norm(dim=-1)


def quantile(values: Tensor, q: float) -> Tensor:
    """Quantile along the last dimension, which is kept with size 1, interpolated between neighbours: of an even number
    of values the median is the mean of the middle two."""
    ordered = values.sort(dim=-1).values
    place = q * (values.shape[-1] - 1)
    low, high = ordered[..., [math.floor(place)]], ordered[..., [math.ceil(place)]]
    return low + (place - math.floor(place)) * (high - low)


def outliers(norms: Tensor, *, spread: float = SPREAD, ratio: float = RATIO) -> Tensor:
    """Which of the norms [..., P] are outliers of their row: bool [..., P]."""
    middle = quantile(norms, 0.5)
    deviation = 1.4826 * quantile((norms - middle).abs(), 0.5)
    return (norms > middle + spread * deviation) & (norms >= ratio * middle)


def large(norms: Tensor, *, ratio: float = RATIO) -> Tensor:
    """Which of the norms [..., P] are at least ``ratio`` times the lower quartile of their row: bool [..., P]."""
    quartile = quantile(norms, 0.25)
    return (norms >= ratio * quartile) & (norms > quartile)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of positions that two sets of outliers (bool [B, P]) have in common, intersection over union: [B]; 1 where
    neither has any."""
    both, either = (first & second).sum(-1), (first | second).sum(-1)
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both, dtype=torch.float32))
