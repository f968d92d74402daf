"""Outlier tokens: patch tokens whose norm stands far out of their image's others (Darcet et al., ICLR 2024, section 2).

They cut at a fixed norm that fits one model. Precisions and models have norms of different size, so the rule here is
relative to the image: a patch token is an outlier if its norm exceeds the median norm of its image's patch tokens by
more than :data:`SPREAD` robust standard deviations (1.4826·MAD) and is at least :data:`RATIO` times that median.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = 6.0
RATIO = 1.5


def token_norms(tokens: Tensor, prefix: int = 0) -> Tensor:
    """Euclidean norms of patch tokens: [B, N, C] (or [B, H, W, C]) -> [B, P], class and register tokens left out."""
    flat = tokens.flatten(1, -2)
    return flat[:, prefix:].norm(dim=-1)


def outliers(norms: Tensor, *, spread: float = SPREAD, ratio: float = RATIO) -> Tensor:
    """Which of the norms [B, P] are outliers of their row: bool [B, P]."""
    middle = norms.median(dim=-1, keepdim=True).values
    deviation = 1.4826 * (norms - middle).abs().median(dim=-1, keepdim=True).values
    return (norms > middle + spread * deviation) & (norms >= ratio * middle)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of positions that two sets of outliers (bool [B, P]) have in common, intersection over union: [B]; 1 where
    neither has any."""
    both, either = (first & second).sum(-1), (first | second).sum(-1)
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both, dtype=torch.float32))
