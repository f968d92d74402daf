"""What the scores share: what they may be fitted on, how they are called, and blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.metrics._arrays import Float, as_labels, as_matrix, row_blocks

RANK_TOLERANCE = 1e-10
"""Directions whose variance is below this share of the largest are rounding noise of float32 features."""


def per_row(matrix: np.ndarray, function: Callable[[Float], Float], row_elements: int | None = None) -> Float:
    """`function` (float64 block [n, M] -> [n]) over blocks of rows, so that memory stays bounded."""
    n, width = matrix.shape
    out = np.empty(n)
    for rows in row_blocks(n, max(width, row_elements or 0)):
        out[rows] = function(matrix[rows].astype(np.float64))
    return out


@dataclass(frozen=True, eq=False)
class FitData:
    """Outputs of the model on stated ID images, and its classifier: all that a score may be fitted on.

    logits [N, K], features [N, D] or None, labels [N] (class numbers 0..K-1) or None, weight [K, D] and bias
    [K] of the classifier or None (a weight without a bias has bias 0). Where labels are None the predicted
    classes stand in for them. Raises QuantlensError: no image, shapes that do not belong together, values
    that are not finite, labels outside 0..K-1.
    """

    logits: np.ndarray
    features: np.ndarray | None = None
    labels: np.ndarray | None = None
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        logits = as_matrix(self.logits, "fit logits")
        n, k = logits.shape
        if n == 0:
            raise QuantlensError("there are no fit images: give at least one ID image to fit the scores on")
        fields: dict[str, np.ndarray] = {"logits": logits}
        if self.features is not None:
            fields["features"] = features = as_matrix(self.features, "fit features")
            if len(features) != n:
                raise QuantlensError(f"the fit features are of {len(features)} images, the fit logits of {n}")
        if self.labels is not None:
            fields["labels"] = as_labels(self.labels, n, k)
        if self.weight is not None:
            fields["weight"] = weight = as_matrix(self.weight, "classifier weights").astype(np.float64)
            d = weight.shape[1] if self.features is None else fields["features"].shape[1]
            if weight.shape != (k, d):
                raise QuantlensError(f"the classifier weight has shape {weight.shape}, but {(k, d)} is expected")
            bias = np.zeros(k) if self.bias is None else np.asarray(self.bias, dtype=np.float64)
            if bias.shape != (k,) or not np.isfinite(bias).all():
                raise QuantlensError(f"the classifier bias must be {k} finite numbers, not of shape {bias.shape}")
            fields["bias"] = bias
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def classes(self) -> np.ndarray:
        """Labels [N], or the predicted classes where there are none."""
        return self.labels if self.labels is not None else self.logits.argmax(axis=1)

    def features64(self) -> Float:
        """Features [N, D] in float64; UnsupportedError where the model gives none."""
        if self.features is None:
            raise UnsupportedError("this score needs penultimate features, which the model lacks: leave it out")
        return self.features.astype(np.float64)

    def classifier(self) -> tuple[Float, Float]:
        """Weight [K, D] and bias [K]; UnsupportedError where the model has no linear classifier."""
        if self.weight is None or self.bias is None:
            raise UnsupportedError("this score needs a linear classifier, which the model lacks: leave it out")
        return self.weight, self.bias


class Scorer(Protocol):
    """A fitted score: (logits [N, K], features [N, D] or None) -> [N], larger = more in-distribution."""

    def __call__(self, logits: ArrayLike | None, features: ArrayLike | None = None) -> Float: ...


def given(values: ArrayLike | None, what: str, width: int | None) -> np.ndarray:
    if values is None:
        raise QuantlensError(f"this score reads the {what} of the images, but none were given")
    matrix = as_matrix(values, what)
    if width is not None and matrix.shape[1] != width:
        raise QuantlensError(
            f"the {what} have {matrix.shape[1]} columns, but the score was fitted on {width}: use one model"
        )
    return matrix


@dataclass(frozen=True)
class LogitScorer:
    """A score that is a function of the logits and needs no fit."""

    function: Callable[[ArrayLike], Float]

    def __call__(self, logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        values = np.asarray(self.function(rows := given(logits, "logits", None)), dtype=np.float64)
        if values.shape != (len(rows),):
            raise QuantlensError(f"a score of {len(rows)} images must be {len(rows)} numbers, not {values.shape}")
        return values


def l2_normalise(features: np.ndarray) -> Float:
    """h / ||h||, row by row, in float64; a row of zeros stays zero."""
    h = np.asarray(features, dtype=np.float64)
    norm = np.linalg.norm(h, axis=1, keepdims=True)
    return h / np.where(norm > 0, norm, 1.0)
