"""Scores that shape the features or the classifier of an image and take the energy of the logits that follow. They were
made for ReLU features; those of a transformer take both signs, and there they are near chance: measured where they are
asked for by name, with a warning."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from quantlens.metrics._arrays import Float, as_matrix, per_row
from quantlens.metrics.ood_scores.registry import FitData, ScoreInfo, Scorer, given, register_score

CAUTION = (
    "made for the ReLU features of convolutional networks; on transformers, whose features take both signs, OpenOOD "
    "v1.5 measures such scores near chance (ASH on ViT-B: AUROC 53 near, 52 far)"
)
LARGEST_SCALE = 100.0
"""The exponent of a scale at most: sums of features of both signs come near 0, which they are divided by."""


def _cut(h: Float, percentile: float) -> tuple[Float, Float]:
    """The places [N, D] (as 0 and 1) of each image's largest features, of which `percentile` % are cut, and
    exp(sum of all / sum of those that stay) [N, 1]."""
    kept = max(1, h.shape[1] - round(h.shape[1] * percentile / 100))
    places = np.zeros_like(h)
    np.put_along_axis(places, np.argpartition(h, -kept, axis=1)[:, -kept:], 1.0, axis=1)
    whole, rest = h.sum(axis=1, keepdims=True), (h * places).sum(axis=1, keepdims=True)
    ratio = np.divide(whole, rest, out=np.zeros_like(whole), where=rest != 0)
    return places, np.exp(np.minimum(ratio, LARGEST_SCALE))


def ash_p(features: Float, percentile: float = 60.0) -> Float:
    """Features [N, D] with all but the largest of each image set to 0. Djurisic, Bozanic, Ashok and Liu, Extremely
    Simple Activation Shaping for Out-of-Distribution Detection, ICLR 2023, with their percentiles."""
    return features * _cut(features, percentile)[0]


def ash_b(features: Float, percentile: float = 65.0) -> Float:
    """As `ash_p`, and what stays of an image is set to one value, so that its sum is that of all its features."""
    places, _ = _cut(features, percentile)
    return places * (features.sum(axis=1, keepdims=True) / places.sum(axis=1, keepdims=True))


def ash_s(features: Float, percentile: float = 90.0) -> Float:
    """As `ash_p`, times exp(sum of all features / sum of those that stay)."""
    places, scale = _cut(features, percentile)
    return features * places * scale


def scale(features: Float, percentile: float = 85.0) -> Float:
    """As `ash_s`, but nothing is cut. Xu, Chen, Franchi and Yao, Scaling for Training Time and Post-hoc
    Out-of-distribution Detection Enhancement, ICLR 2024."""
    return features * _cut(features, percentile)[1]


def dice(weight: Float, mean: Float, percentile: float = 90.0) -> Float:
    """The classifier's weight [K, D] where its contribution w * mean to the logits, `mean` [D] that of the features of
    ID images, is above the percentile of all; 0 elsewhere. Sun and Li, DICE: Leveraging Sparsification for
    Out-of-Distribution Detection, ECCV 2022; the percentile as in OpenOOD."""
    contribution = weight * mean
    return np.where(contribution > np.percentile(contribution, percentile), weight, 0.0)


def _energy_of(shape: Callable[[Float], Float] | None, weight: Float, bias: Float) -> Scorer:
    def score(logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        h = as_matrix(given(features, "features", weight.shape[1]), "features")
        return per_row(
            h, lambda h: logsumexp((shape(h) if shape else h) @ weight.T + bias, axis=1), row_elements=len(weight)
        )

    return score


_ASH = "Djurisic et al., Extremely Simple Activation Shaping for OOD Detection, ICLR 2023"
_SCALE = "Xu et al., Scaling for Training Time and Post-hoc OOD Detection Enhancement, ICLR 2024"


def _register(name: str, label: str, title: str, paper: str, formula: str, shape: Callable[[Float], Float]) -> None:
    """Add the energy of the logits of shaped features. Nothing is fitted; the classifier is needed."""

    @register_score(
        ScoreInfo(
            name,
            title,
            paper,
            needs_features=True,
            needs_classifier=True,
            formula=formula,
            departure="features of both signs; logits from the dequantized classifier",
            label=label,
            optional=True,
            caution=CAUTION,
        )
    )
    def shaped(data: FitData) -> Scorer:
        return _energy_of(shape, *data.classifier())


_register("ash_p", "ASH-P", "Activation shaping, pruned", _ASH, "energy of the largest 40 % of h", ash_p)
_register("ash_b", "ASH-B", "Activation shaping, binarized", _ASH, "energy of the largest 35 % of h, set equal", ash_b)
_register("ash_s", "ASH-S", "Activation shaping, scaled", _ASH, "energy of exp(s1 / s2) times the largest 10 %", ash_s)
_register("scale", "SCALE", "Scaled activations", _SCALE, "energy of h exp(s1 / s2), s2 of the largest 15 %", scale)


@register_score(
    ScoreInfo(
        "dice",
        "Sparsified classifier",
        "Sun and Li, DICE: Leveraging Sparsification for Out-of-Distribution Detection, ECCV 2022",
        needs_fit=True,
        needs_features=True,
        needs_classifier=True,
        formula="energy of the weights with the largest 10 % of w E[h]",
        departure="logits from the dequantized classifier",
        label="DICE",
        optional=True,
        caution=CAUTION,
    )
)
def fit_dice(data: FitData) -> Scorer:
    """The energy of the logits that the weights left by `dice` give."""
    weight, bias = data.classifier()
    return _energy_of(None, dice(weight, data.features64().mean(axis=0)), bias)
