"""Statistics of the tensors that are quantized: what makes a tensor hard to put on few integer codes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor

from quantlens.calibration import EdgeView
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Edge
from quantlens.metrics.divergence import sqnr_db
from quantlens.transforms.layers import outlier_channels


@dataclass(frozen=True)
class EdgeStatistics:
    """The values of one edge in the float model: of a weight, or of an activation over all images.

    key, name, is_weight: the edge; bits: width of its quantizer. low, high: smallest and largest value.
    kurtosis: E(x − μ)⁴ / σ⁴ of all values (3 for a normal distribution); None for a constant tensor.
    sqnr_db: 10·log₁₀(Σ x² / Σ (x − x̂)²) of its own quantizer; None where that loses nothing.
    channels: their number; None for a tensor without channels (attention scores and probabilities), which then has
    no metric below. Channels of a weight are its output channels; those of q, k and v count through the heads.
    range_ratio: range (largest less smallest value) of the widest channel over that of the median one; None where the
    median channel is dead.
    dead: channels with one value only, whatever the image and token. massive: channels whose largest magnitude is more
    than 16 times the median channel's (:mod:`quantlens.transforms.layers`), with that magnitude in ``peaks``;
    rest: the largest magnitude in the other channels, None where no channel is massive.
    token_norm, token_norm_median: largest and median Euclidean norm of a token; None for weights and pixels.
    """

    key: str
    name: str
    is_weight: bool
    bits: int
    low: float
    high: float
    kurtosis: float | None
    sqnr_db: float | None
    channels: int | None = None
    range_ratio: float | None = None
    dead: tuple[int, ...] = ()
    massive: tuple[int, ...] = ()
    peaks: tuple[float, ...] = ()
    rest: float | None = None
    token_norm: float | None = None
    token_norm_median: float | None = None


def edge_statistics(edge: Edge, kind: str, view: EdgeView, quantizer: Quantizer) -> EdgeStatistics:
    """Statistics of what a pass shows of ``edge``, an edge of a site of the kind ``kind``.

    Raises QuantlensError naming the edge where values are not finite.
    """
    about: Any = None
    count, signal, error = 0, 0.0, 0.0
    sums = torch.zeros(4, dtype=torch.float64)
    extremes, by_channels, norms = [], [], []
    for value in view.tensors():
        extremes.append(torch.stack(value.aminmax()))
        one = value.double()
        about = one.mean() if about is None else about
        one = one - about
        sums = sums + torch.stack([power.sum() for power in accumulate(repeat(one, 4), torch.mul)]).cpu()
        count += value.numel()
        signal += float(value.square().sum(dtype=torch.float64))
        error += float((quantizer(value) - value).square_().sum(dtype=torch.float64))
        seen = by_channel(edge, kind, value)
        if seen is not None:
            rows = seen.reshape(-1, seen.shape[-1])
            by_channels.append(torch.stack(rows.aminmax(dim=0)))
            if not edge.is_weight and kind != "conv":
                norms.append(rows.norm(dim=-1))
    low, high = (float(end) for end in _extremes(extremes))
    if not math.isfinite(low) or not math.isfinite(high):
        raise QuantlensError(f"{edge.key}: values are not finite; check the weights and the calibration images")
    return EdgeStatistics(
        edge.key,
        edge.name,
        edge.is_weight,
        quantizer.bits,
        low,
        high,
        _kurtosis(sums / count) if low < high else None,
        sqnr_db(signal, error),
        **(_of_channels(*_extremes(by_channels)) if by_channels else {}),
        token_norm=float(torch.cat(norms).max()) if norms else None,
        token_norm_median=float(torch.cat(norms).median()) if norms else None,
    )


def by_channel(edge: Edge, kind: str, value: Tensor) -> Tensor | None:
    """The values of an edge with channels last, [tokens …, C]; None for one without channels.

    Weights [C, …] give their output channels, images [B, C, H, W] theirs; heads of q, k and v [B, h, N, d] stand side
    by side, as the layer before them made them (k is stored transposed).
    """
    if edge.is_weight or kind == "conv":
        return value.movedim(0 if edge.is_weight else 1, -1)
    if kind == "probs" or (kind, edge.name) in {("scores", "output"), ("context", "probs"), ("matmul", "rhs")}:
        return None
    if kind in ("scores", "context"):
        rows = value.transpose(-1, -2) if edge.name == "k" else value
        return rows.transpose(1, 2).flatten(2) if rows.dim() == 4 else rows
    return value


def _extremes(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the (smallest, largest) of every piece [2, …]."""
    stacked = torch.stack(list(pieces))
    return stacked[:, 0].amin(0), stacked[:, 1].amax(0)


def _kurtosis(moments: Tensor) -> float | None:
    """Of the first four moments about some value, float64; it is near the mean, so that nothing cancels."""
    m, s2, s3, s4 = moments.tolist()
    variance = s2 - m * m
    fourth = s4 - 4 * m * s3 + 6 * m * m * s2 - 3 * m**4
    return fourth / variance**2 if variance > 0 else None


def _of_channels(low: Tensor, high: Tensor) -> dict[str, Any]:
    """The fields of :class:`EdgeStatistics` that follow from the smallest and largest value of every channel [C]."""
    ranges, largest = high - low, torch.maximum(high.abs(), low.abs())
    massive, middle = outlier_channels(largest), float(ranges.median())
    others = largest.clone()
    others[massive] = 0
    return {
        "channels": len(ranges),
        "range_ratio": float(ranges.max()) / middle if middle > 0 else None,
        "dead": tuple((ranges == 0).nonzero().flatten().tolist()),
        "massive": tuple(massive.tolist()),
        "peaks": tuple(largest[massive].tolist()),
        "rest": float(others.max()) if len(massive) else None,
    }
