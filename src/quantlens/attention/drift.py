"""How far a quantized model's attention is from the float model's: pure functions of maps, one number per image.

All take batches and are vectorised. Attention rows are distributions over N tokens; maps are weights over P patches.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TINY = 1e-12
"""Added to a quantized probability before its logarithm is taken: log formats hold exact zeros."""


def _log(values: Tensor) -> Tensor:
    """Natural logarithm; on the CPU by numpy, whose vector code is three times as fast as torch's."""
    if values.device.type == "cpu" and not values.requires_grad:
        return torch.from_numpy(np.log(values.numpy()))
    return values.log()


class Rows:
    """Attention rows of a block [B, H, N, N] with what is needed of them for every comparison, computed once.

    Rows are read as distributions: negative values as 0, :data:`TINY` added, divided by their sum. A row of zeros (all
    of it below half a step of its quantizer) is therefore uniform.
    """

    def __init__(self, probs: Tensor):
        self.probs = probs
        self.norm = probs.norm(dim=-1)
        self.weights = probs.clamp_min(0).add_(TINY)
        self.logs = _log(self.weights)
        self.total = self.weights.sum(-1)
        self.entropy = self.total.log() - (self.weights * self.logs).sum(-1) / self.total
        """Entropy of every row in nats: [B, H, N]."""

    def drop_logs(self) -> Rows:
        """Give back what only the second of two compared needs."""
        del self.logs
        return self

    def cosine_to(self, other: Rows) -> Tensor:
        """Mean cosine similarity of rows: [B, H]."""
        dot = (self.probs * other.probs).sum(-1)
        return (dot / (self.norm * other.norm).clamp_min(TINY)).mean(-1)

    def kl_to(self, other: Rows) -> Tensor:
        """Mean KL(self ‖ other) of rows in nats: [B, H]."""
        cross = other.total.log() - (self.weights * other.logs).sum(-1) / self.total
        return (cross - self.entropy).mean(-1).clamp_min(0)


def row_cosine(reference: Tensor, other: Tensor) -> Tensor:
    """Mean cosine similarity of attention rows: [B, H, N, N] twice -> [B, H]."""
    return Rows(reference).cosine_to(Rows(other))


def row_kl(reference: Tensor, other: Tensor) -> Tensor:
    """Mean KL divergence KL(reference ‖ other) of attention rows in nats: [B, H, N, N] twice -> [B, H]; see
    :class:`Rows` for rows that do not sum to 1."""
    return Rows(reference).kl_to(Rows(other))


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, ties given their mean (as scipy's ``rankdata``), float: 1 … P."""
    ordered, order = values.sort(dim=-1, stable=True)
    count = values.shape[-1]
    flat = ordered.reshape(-1, count)
    new = torch.ones_like(flat, dtype=torch.bool)
    new[:, 1:] = flat[:, 1:] != flat[:, :-1]
    group = new.long().cumsum(-1) - 1
    size = torch.zeros(flat.shape, dtype=torch.float64, device=values.device)
    position = torch.arange(1, count + 1, dtype=torch.float64, device=values.device).expand(flat.shape)
    total = size.clone().scatter_add_(1, group, position)
    size = size.scatter_add_(1, group, torch.ones_like(position))
    mean = (total / size.clamp_min(1)).gather(1, group).reshape(values.shape)
    return torch.empty_like(mean).scatter_(-1, order, mean)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of maps: [B, P] twice -> [B]. 1 for equal maps, 0 where one is constant and the
    other is not."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    size = a.norm(dim=-1) * b.norm(dim=-1)
    same = (first == second).all(-1)
    found = torch.where(size > 0, (a * b).sum(-1) / size.clamp_min(TINY), torch.zeros_like(size))
    return torch.where(same, torch.ones_like(found), found).float()


def top_overlap(first: Tensor, second: Tensor, k: int) -> Tensor:
    """Share of the k largest patches that two maps [B, P] have in common: [B]."""
    k = min(k, first.shape[-1])
    top = torch.zeros_like(first, dtype=torch.bool).scatter_(1, first.topk(k, dim=1).indices, True)
    return top.gather(1, second.topk(k, dim=1).indices).float().mean(1)


def centre(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Centre of mass of maps [B, P] on a grid of (rows, columns), as shares of height and width: [B, 2]; the middle
    for an empty map."""
    rows, columns = grid
    weights = maps.clamp_min(0).view(-1, rows, columns)
    total = weights.sum((1, 2))
    y = (torch.arange(rows, device=maps.device) + 0.5) / rows
    x = (torch.arange(columns, device=maps.device) + 0.5) / columns
    found = torch.stack([(weights.sum(2) * y).sum(1), (weights.sum(1) * x).sum(1)], dim=1)
    return torch.where(total[:, None] > 0, found / total.clamp_min(TINY)[:, None], torch.full_like(found, 0.5))


def movement(first: Tensor, second: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far the centre of mass moves between two maps [B, P], as a share of the image's diagonal: [B]."""
    return (centre(first, grid) - centre(second, grid)).norm(dim=1) / 2**0.5
