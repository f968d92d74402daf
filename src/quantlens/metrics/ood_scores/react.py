"""Rectified activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from quantlens.metrics._arrays import Float, as_matrix
from quantlens.metrics.ood_scores.base import FitData, given, per_row
from quantlens.metrics.ood_scores.registry import ScoreInfo, register_score


def react(features: ArrayLike, weight: Float, bias: Float, threshold: float) -> Float:
    """log sum_k exp of the logits W min(h, c) + b. features [N, D], weight [K, D], bias [K] -> [N].

    Sun, Guo and Li, ReAct: Out-of-distribution Detection With Rectified Activations, NeurIPS 2021, with
    `threshold` c the 90th percentile of all activations of the fit images and the energy score. Departures:
    the paper clips ReLU features; those of a vision transformer take both signs and are clipped from above
    all the same. The logits are recomputed in float64 from the classifier's weights as used (a quantized
    model's: dequantized), without rounding the clipped features to the codes of the classifier's input.
    """
    return per_row(
        as_matrix(features, "features"),
        lambda h: logsumexp(np.minimum(h, threshold) @ weight.T + bias, axis=1),
        row_elements=len(weight),
    )


@register_score(
    ScoreInfo(
        "react",
        "Rectified activations",
        "Sun et al., ReAct: Out-of-distribution Detection With Rectified Activations, NeurIPS 2021",
        needs_fit=True,
        needs_features=True,
        needs_classifier=True,
        formula="log sum_k exp(W min(h, c) + b)_k",
        departure="features of both signs are clipped from above; logits from the dequantized classifier",
        label="ReAct",
    )
)
@dataclass(frozen=True, eq=False)
class ReActScorer:
    """`react` with the `threshold` taken at a percentile of the fit features (linear interpolation)."""

    weight: Float
    bias: Float
    threshold: float

    @classmethod
    def fit(cls, data: FitData, percentile: float = 90.0) -> ReActScorer:
        weight, bias = data.classifier()
        return cls(weight=weight, bias=bias, threshold=float(np.percentile(data.features64(), percentile)))

    def __call__(self, logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        return react(given(features, "features", self.weight.shape[1]), self.weight, self.bias, self.threshold)
