"""Statistics of the tensors that are quantized: what makes a tensor hard to put on few integer codes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantlens.calibration import EdgeView
from quantlens.errors import QuantlensError
from quantlens.formats import Quantizer
from quantlens.graph import Edge
from quantlens.metrics.divergence import sqnr_db
from quantlens.transforms.outlier_channels import outlier_channels


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
    than 16 times the median channel's (:mod:`quantlens.transforms.outlier_channels`), with that magnitude in ``peaks``;
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
    moments, noise = _Moments(), _Noise(quantizer)
    channels = _Channels(tokens=not edge.is_weight and kind != "conv")
    for value in view.tensors():
        moments.add(value)
        noise.add(value)
        seen = by_channel(edge, kind, value)
        if seen is not None:
            channels.add(seen)
    if not math.isfinite(moments.low) or not math.isfinite(moments.high):
        raise QuantlensError(f"{edge.key}: values are not finite; check the weights and the calibration images")
    return EdgeStatistics(
        edge.key,
        edge.name,
        edge.is_weight,
        quantizer.bits,
        moments.low,
        moments.high,
        moments.kurtosis(),
        noise.sqnr_db(),
        **channels.figures(),
    )


def by_channel(edge: Edge, kind: str, value: Tensor) -> Tensor | None:
    """The values of an edge with channels last, [tokens …, C]; None for one without channels.

    Weights [C, …] give their output channels, images [B, C, H, W] theirs; heads of q, k and v [B, h, N, d] stand side
    by side, as the layer before them made them (k is stored transposed).
    """
    if edge.is_weight:
        return value.movedim(0, -1)
    if kind == "probs" or (kind, edge.name) in {("scores", "output"), ("context", "probs"), ("matmul", "rhs")}:
        return None
    if kind == "conv":
        return value.movedim(1, -1)
    if kind in ("scores", "context"):
        rows = value.transpose(-1, -2) if edge.name == "k" else value
        return rows.transpose(1, 2).flatten(2) if rows.dim() == 4 else rows
    return value


class _Moments:
    """Extremes and central moments of values that arrive in pieces: sums of powers about the first piece's mean, in
    float64, so that nothing cancels."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._count, self._about = 0, torch.zeros(())
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        if self._count == 0:
            self._about = value.double().mean()
        low, high = value.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        if low.isnan():
            self.low = math.nan
        power = one = value.double() - self._about
        sums = []
        for _ in range(4):
            sums.append(power.sum())
            power = power * one
        self._sums = self._sums + torch.stack(sums).cpu()
        self._count += value.numel()

    def kurtosis(self) -> float | None:
        if not self.low < self.high:
            return None
        m, s2, s3, s4 = (self._sums / self._count).tolist()
        variance = s2 - m * m
        fourth = s4 - 4 * m * s3 + 6 * m * m * s2 - 3 * m**4
        return fourth / variance**2 if variance > 0 else None


class _Noise:
    """Signal and error of a quantizer on values that arrive in pieces."""

    def __init__(self, quantizer: Quantizer):
        self._quantizer, self._signal, self._error = quantizer, 0.0, 0.0

    def add(self, value: Tensor) -> None:
        self._signal += float(value.square().sum(dtype=torch.float64))
        self._error += float((self._quantizer(value) - value).square_().sum(dtype=torch.float64))

    def sqnr_db(self) -> float | None:
        return sqnr_db(self._signal, self._error)


@dataclass
class _Channels:
    """Extremes of channels and norms of tokens of values [tokens …, C] that arrive in pieces."""

    tokens: bool
    low: Tensor | None = None
    high: Tensor | None = None
    norms: list[Tensor] = field(default_factory=list)

    def add(self, value: Tensor) -> None:
        rows = value.flatten(0, -2) if value.dim() > 1 else value[None]
        low, high = rows.aminmax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if self.tokens:
            self.norms.append(rows.norm(dim=-1))

    def figures(self) -> dict[str, Any]:
        """The fields of :class:`EdgeStatistics` from ``channels`` on."""
        if self.low is None or self.high is None:
            return {}
        ranges, largest = self.high - self.low, torch.maximum(self.high.abs(), self.low.abs())
        massive, middle = outlier_channels(largest), float(ranges.median())
        others = largest.clone()
        others[massive] = 0
        norms = torch.cat(self.norms) if self.norms else None
        return {
            "channels": len(ranges),
            "range_ratio": float(ranges.max()) / middle if middle > 0 else None,
            "dead": tuple((ranges == 0).nonzero().flatten().tolist()),
            "massive": tuple(massive.tolist()),
            "peaks": tuple(largest[massive].tolist()),
            "rest": float(others.max()) if len(massive) else None,
            "token_norm": None if norms is None else float(norms.max()),
            "token_norm_median": None if norms is None else float(norms.median()),
        }
