"""Mahalanobis distances to the classes of the fit images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quantlens.metrics._arrays import Float, as_matrix
from quantlens.metrics.ood_scores.base import RANK_TOLERANCE, FitData, given, l2_normalise, per_row
from quantlens.metrics.ood_scores.registry import ScoreInfo, register_score

WELL_DETERMINED = 5
"""Degrees of freedom per feature from which a covariance is used as estimated, without shrinkage."""


def class_means(features: Float, classes: np.ndarray) -> tuple[Float, np.ndarray]:
    """Means [C, D] of the C classes that occur in `classes` [N], and the row of each image's class [N]."""
    _, row = np.unique(classes, return_inverse=True)
    order = np.argsort(row, kind="stable")
    count = np.bincount(row)
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    return np.add.reduceat(features[order], starts, axis=0) / count[:, None], row


def ledoit_wolf(centred: Float) -> Float:
    """Covariance [D, D] of centred rows [N, D], shrunk towards a multiple of the identity.

    (1 - rho) S + rho (tr S / D) I with the rho that minimises the expected squared Frobenius error. Ledoit
    and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, J. Multivariate Analysis
    88, 2004.
    """
    from sklearn.covariance import ledoit_wolf as shrunk  # late: it takes a second to import

    covariance: Float = shrunk(centred, assume_centered=True)[0] if len(centred) > 1 else centred.T @ centred
    return covariance


def tied_covariances(features: Float, means: Float, row: np.ndarray) -> tuple[Float, Float]:
    """Covariance within classes and covariance of all images about their mean, both [D, D].

    `features` [N, D], `means` [C, D], `row` [N] as from `class_means`. With N - C >= 5 D degrees of freedom
    these are the published estimates, (1/N) sum (h - mu_y)(h - mu_y)^T and (1/N) sum (h - mu)(h - mu)^T. With
    fewer, both are shrunk by `ledoit_wolf`, the one within classes is scaled by N / (N - C), and where N - C
    is below D, so that it is singular, it is mixed with the covariance of all images: w within + (1 - w)
    total with w = (N - C) / D. Where images do not differ within classes (one image per class, or a model
    whose features have collapsed) the total stands for both.
    """
    n, d = features.shape
    freedom = n - len(means)
    about_class = _deviations(features, means[row])
    about_mean = _deviations(features, features.mean(axis=0))
    well_determined = freedom >= WELL_DETERMINED * d
    total = about_mean.T @ about_mean / n if well_determined else ledoit_wolf(about_mean)
    if not about_class.any():
        return total, total
    if well_determined:
        return about_class.T @ about_class / n, total
    weight = min(1.0, freedom / d)
    return weight * ledoit_wolf(about_class) * (n / freedom) + (1 - weight) * total, total


def _deviations(features: Float, mean: Float) -> Float:
    """`features` - `mean`, with what is only the rounding of the mean set to 0."""
    away = features - mean
    away[np.abs(away) <= 1e-13 * np.abs(features).max()] = 0.0
    return away


def whitening(covariance: Float) -> Float:
    """A [D, r] with A A^T = pinv(covariance), so that |(x - y) A| is the Mahalanobis distance of x and y."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    kept = eigenvalues > RANK_TOLERANCE * max(float(eigenvalues[-1]), 0.0)
    return vectors[:, kept] / np.sqrt(eigenvalues[kept])


def mahalanobis(features: ArrayLike, means: Float, whiten: Float) -> Float:
    """-min_c (h - mu_c)^T Sigma^-1 (h - mu_c). features [N, D] -> [N], at most 0.

    `means` mu [C, D]; `whiten` A [D, r] with A A^T = Sigma^-1. Lee, Lee, Lee and Shin, A Simple Unified
    Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks, NeurIPS 2018. Departures:
    penultimate features only, without their input perturbation and ensemble of layers; the covariance as in
    `tied_covariances`.
    """
    centre = means.mean(axis=0)
    white_means = (means - centre) @ whiten
    half_squares = 0.5 * np.einsum("cr,cr->c", white_means, white_means)

    def block(h: Float) -> Float:
        white = (h - centre) @ whiten
        nearest = (white @ white_means.T - half_squares).argmax(axis=1)
        away = white - white_means[nearest]
        return -np.einsum("nr,nr->n", away, away)

    return per_row(as_matrix(features, "features"), block, row_elements=len(means))


def relative_mahalanobis(
    features: ArrayLike, means: Float, whiten: Float, background_mean: Float, background_whiten: Float
) -> Float:
    """-min_c (d_c - d_0). features [N, D] -> [N].

    d_c as in `mahalanobis`, d_0 the squared distance to one Gaussian of all fit images. `background_mean`
    [D], `background_whiten` [D, r0]. Ren, Fort, Liu, Roy, Padhy and Lakshminarayanan, A Simple Fix to
    Mahalanobis Distance for Improving Near-OOD Detection, arXiv 2106.09022, 2021. Departure: the covariances
    as in `tied_covariances`.
    """
    return mahalanobis(features, means, whiten) - mahalanobis(features, background_mean[None], background_whiten)


@dataclass(frozen=True, eq=False)
class MahalanobisScorer:
    """`mahalanobis`, or `relative_mahalanobis` where there is a background, fitted on the fit images.

    Classes are the labels or, without labels, the predicted classes; a class without fit images is left out.
    With `normalise` features are divided by their L2 norm first: Mueller and Hein, Mahalanobis++: Improving
    OOD Detection via Feature Normalization, ICML 2025. Where all fit features are equal the score is 0 for
    every image.
    """

    means: Float
    whiten: Float
    background_mean: Float | None
    background_whiten: Float | None
    normalise: bool

    @classmethod
    def fit(cls, data: FitData, *, relative: bool = False, normalise: bool = False) -> MahalanobisScorer:
        h = data.features64()
        if normalise:
            h = l2_normalise(h)
        means, row = class_means(h, data.classes())
        within, total = tied_covariances(h, means, row)
        return cls(
            means=means,
            whiten=whitening(within),
            background_mean=h.mean(axis=0) if relative else None,
            background_whiten=whitening(total) if relative else None,
            normalise=normalise,
        )

    def __call__(self, logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        return per_row(given(features, "features", self.means.shape[1]), self._score)

    def _score(self, h: Float) -> Float:
        if self.normalise:
            h = l2_normalise(h)
        if self.background_mean is None or self.background_whiten is None:
            return mahalanobis(h, self.means, self.whiten)
        return relative_mahalanobis(h, self.means, self.whiten, self.background_mean, self.background_whiten)


_FEW_IMAGES = "covariances are shrunk where the fit images are few"
_L2 = "Mueller and Hein, Mahalanobis++: Improving OOD Detection via Feature Normalization, ICML 2025"


def _variant(
    name: str, label: str, title: str, paper: str, formula: str, departure: str = "", **settings: bool
) -> None:
    """Register `MahalanobisScorer` with settings of its own."""

    def fit(data: FitData) -> MahalanobisScorer:
        return MahalanobisScorer.fit(data, **settings)

    departure = f"{departure}{_FEW_IMAGES}"
    info = ScoreInfo(name, title, paper, True, True, formula=formula, departure=departure, label=label)
    register_score(info)(fit)


_variant(
    "mahalanobis",
    "Mahalanobis",
    "Mahalanobis distance",
    "Lee et al., A Simple Unified Framework for Detecting OOD Samples and Attacks, NeurIPS 2018",
    "-min_c (h - mu_c)^T Sigma^-1 (h - mu_c)",
    "penultimate features only, no input perturbation; ",
)
_variant(
    "rmahalanobis",
    "relative Mahalanobis",
    "Relative Mahalanobis distance",
    "Ren et al., A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection, arXiv 2021",
    "-min_c (d_c - d_0)",
    relative=True,
)
_variant(
    "mahalanobis_l2",
    "Mahalanobis, L2-normalised",
    "Mahalanobis distance, L2-normalised",
    _L2,
    "mahalanobis of h/|h|",
    normalise=True,
)
_variant(
    "rmahalanobis_l2",
    "relative Mahalanobis, L2-normalised",
    "Relative Mahalanobis distance, L2-normalised",
    _L2,
    "rmahalanobis of h/|h|",
    relative=True,
    normalise=True,
)
