"""Nearest neighbours among the features of the fit images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quantlens.metrics._arrays import Float, as_matrix
from quantlens.metrics.ood_scores.base import FitData, given, l2_normalise, per_row
from quantlens.metrics.ood_scores.registry import ScoreInfo, register_score


def knn(features: ArrayLike, bank: ArrayLike, k: int = 50) -> Float:
    """-distance from h / ||h|| to its k-th nearest neighbour among `bank` [M, D], rows of length 1 (or 0).

    features [N, D] -> [N] in -2..0. k is cut to M. Sun, Ming, Zhu and Li, Out-of-Distribution Detection with
    Deep Nearest Neighbors, ICML 2022, with k = 50. Departures: the bank is the fit images, not the training
    set (they take k = 50 on CIFAR-10 and 1000 on ImageNet); k is cut to the number of fit images.
    """
    known = np.asarray(bank, dtype=np.float64)
    kth = len(known) - min(k, len(known))

    def block(h: Float) -> Float:
        unit = l2_normalise(h)
        # |u - v|^2 = |u|^2 + |v|^2 - 2 u.v finds the neighbour; its distance is then taken directly, so
        # that near neighbours lose no digits.
        closeness = unit @ known.T - 0.5 * np.einsum("md,md->m", known, known)
        neighbour = np.argpartition(closeness, kth, axis=1)[:, kth]
        return -np.linalg.norm(unit - known[neighbour], axis=1)

    return per_row(as_matrix(features, "features"), block, row_elements=len(known))


@register_score(
    ScoreInfo(
        "knn",
        "Nearest neighbours",
        "Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022",
        needs_fit=True,
        needs_features=True,
        formula="-distance of h/|h| to its 50th nearest fit image",
        departure="the bank is the fit images; K is cut to their number",
        label="KNN",
    )
)
@dataclass(frozen=True, eq=False)
class KNNScorer:
    """`knn` against the L2-normalised features of the fit images, `bank` [M, D]."""

    bank: Float
    k: int

    @classmethod
    def fit(cls, data: FitData, k: int = 50) -> KNNScorer:
        bank = l2_normalise(data.features64())
        return cls(bank=bank, k=min(k, len(bank)))

    def __call__(self, logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        return knn(given(features, "features", self.bank.shape[1]), self.bank, self.k)
