"""Attention rollout: how much every patch reaches the class token through all blocks.

    Â = row-normalised (fuse(A) with its smallest entries discarded + I),   R = Â_L · … · Â₁

(Abnar and Zuidema, ACL 2020, section 3.2; settings of Kuang and Wong, 2026, section 2.) The map is the class token's
row over the patches, divided by its largest value; a vector times a matrix at every block, from the last to the first.

``compat="vit-explain"`` reproduces Gildenblat's code: of the discarded entries it keeps (class, class) alone, and it
divides column j by the sum of row j. Here what class tokens give or get is kept, and rows are divided by their own sum.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from quantlens.errors import QuantlensError, UnknownNameError

FUSIONS = {"max": Tensor.amax, "mean": Tensor.mean, "min": Tensor.amin}
COMPAT = ("vit-explain",)


def fuse_heads(probs: Tensor, fusion: str = "max") -> Tensor:
    """Attention of all heads [B, H, N, N] -> one map [B, N, N]: the maximum, mean or minimum over heads."""
    return FUSIONS[fusion](probs, dim=1)


def discard_smallest(fused: Tensor, ratio: float, prefix: int = 1, *, compat: str | None = None) -> Tensor:
    """Set the share ``ratio`` of each image's smallest entries [B, N, N] to 0.

    What the first ``prefix`` tokens give or get stays (compat: only the very first entry). Of entries that are equal to
    the smallest one kept, none is discarded: quantized maps hold few values, and which of equal ones go must not depend
    on their order. So at most the share goes (compat: exactly the share, as ``topk`` happens to choose).
    """
    flat = fused.flatten(1)
    count = int(flat.shape[1] * ratio)
    if count == 0:
        return fused
    if compat:
        kept = flat.scatter(1, flat.topk(count, dim=1, largest=False).indices, 0.0).view_as(fused)
        kept[:, 0, 0] = fused[:, 0, 0]
        return kept
    kept = fused * (fused >= _smallest_kept(flat.detach(), count))
    kept[:, :prefix, :] = fused[:, :prefix, :]
    kept[:, :, :prefix] = fused[:, :, :prefix]
    return kept


def _smallest_kept(flat: Tensor, count: int) -> Tensor:
    """The smallest entry of each image [B, 1, 1] when ``count`` smaller ones are discarded."""
    if flat.is_cpu and flat.dtype in (torch.float32, torch.float64):
        # numpy selects with vector instructions, some thirty times as fast as torch's kthvalue
        return torch.from_numpy(np.partition(flat.numpy(), count, axis=1)[:, count, None, None])
    return flat.kthvalue(count + 1, dim=1).values[:, None, None]


def check_settings(discard: float, fusion: str, compat: str | None) -> None:
    """Raises QuantlensError for settings of rollout that do not exist."""
    if not 0 <= discard < 1:
        raise QuantlensError(f"discard ratio {discard}: give a share of at least 0 and below 1 (the paper: 0.9)")
    for what, name, known in (("head fusion", fusion, FUSIONS), ("compat", compat, COMPAT)):
        if name is not None and name not in known:
            raise UnknownNameError(what, name, known)


def rollout(
    blocks: Iterable[Tensor],
    *,
    discard: float = 0.9,
    fusion: str = "max",
    prefix: int = 1,
    compat: str | None = None,
) -> Tensor:
    """Rollout map [B, P], largest 1: the class token's row over the patches; without a class token, the mean of all.

    blocks: attention of all blocks, first block first, each [B, H, N, N] (or [B, N, N] where heads are fused already).
    discard: share of entries set to 0. fusion: max, mean or min over heads. prefix: number of class and register
    tokens in front of the patches. compat: ``None`` or ``"vit-explain"``.
    Raises QuantlensError for settings that do not exist.
    """
    check_settings(discard, fusion, compat)
    blocks = list(blocks)
    last = blocks[-1]
    row = last.new_zeros(len(last), last.shape[-1])
    row[:, : 1 if prefix else None] = 1 if prefix else 1 / row.shape[1]
    for probs in reversed(blocks):
        fused = fuse_heads(probs, fusion) if probs.dim() == 4 else probs
        kept = discard_smallest(fused, discard, max(prefix, 1), compat=compat)
        sums = kept.sum(-1) + 1
        if compat:  # row times (kept + I) with its columns divided by the rows' sums
            row = ((row[:, None] @ kept)[:, 0] + row) / sums
        else:  # the same with rows divided by their own sums
            scaled = row / sums
            row = (scaled[:, None] @ kept)[:, 0] + scaled
    patches = row[:, prefix:]
    return patches / patches.amax(dim=1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
