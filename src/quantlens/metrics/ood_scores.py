"""Scores that say how in-distribution an image looks: larger = more in-distribution, float64 throughout.

Notation: logits f in R^K, softmax p, penultimate features h in R^D (the input of the classifier), classifier
weight W [K, D] and bias b [K], so that f = W h + b. *Fit images* are stated ID images of which the statistics
are taken; they are never the images scored, and they are run through the very model that is scored (for a
quantized model, the quantized one).

Each score is a pure function of arrays. Those that need statistics have a small fitted class on top, whose
`fit` takes `FitData` and which is called as `scorer(logits, features)`. `make_scorer` builds any score by
name.

All departures from the papers are named here, in the docstring of the score, and as data in
`available_scores()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.metrics._arrays import (
    Float,
    as_labels,
    as_matrix,
    log_softmax,
    log_sum_exp,
    row_blocks,
)
from quantlens.plugins import Registry

# ----------------------------------------------------------------------------------------------------
# scores of the logits alone


def _per_row(matrix: np.ndarray, function: Callable[[Float], Float], row_elements: int | None = None) -> Float:
    """`function` (float64 block [n, M] -> [n]) over blocks of rows, so that memory stays bounded."""
    n, width = matrix.shape
    out = np.empty(n)
    for rows in row_blocks(n, max(width, row_elements or 0)):
        out[rows] = function(matrix[rows].astype(np.float64))
    return out


def msp(logits: ArrayLike) -> Float:
    """Maximum softmax probability, max_k p_k. logits [N, K] -> [N] in 1/K..1.

    Hendrycks and Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
    Networks, ICLR 2017. No departure.
    """
    return _per_row(as_matrix(logits, "logits"), lambda f: np.exp(log_softmax(f).max(axis=1)))


def maxlogit(logits: ArrayLike) -> Float:
    """Largest logit, max_k f_k. logits [N, K] -> [N].

    Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022. No departure.
    """
    return as_matrix(logits, "logits").max(axis=1).astype(np.float64)


def energy(logits: ArrayLike) -> Float:
    """Negative free energy at temperature 1, log sum_k exp(f_k). logits [N, K] -> [N].

    Liu, Wang, Owens and Li, Energy-based Out-of-distribution Detection, NeurIPS 2020. T = 1, as they advise.
    """
    return _per_row(as_matrix(logits, "logits"), log_sum_exp)


def entropy(logits: ArrayLike) -> Float:
    """Negative Shannon entropy of the softmax, sum_k p_k log p_k. logits [N, K] -> [N] in -log K..0.

    As an OOD score: Chan, Rottmann and Gottschalk, Entropy Maximization and Meta Classification for
    Out-of-Distribution Detection in Semantic Segmentation, ICCV 2021, there per pixel and here per image,
    without their retraining.
    """

    def block(f: Float) -> Float:
        log_p = log_softmax(f)
        return np.einsum("nk,nk->n", np.exp(log_p), log_p)

    return _per_row(as_matrix(logits, "logits"), block)


def gen(logits: ArrayLike, gamma: float = 0.1, top: int = 100) -> Float:
    """Generalized entropy, -sum over the M largest p of p^gamma (1 - p)^gamma. logits [N, K] -> [N], at most
    0.

    Liu, Lochman and Zach, GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection, CVPR 2023;
    gamma = 0.1 and M = `top` = 100 as there (all classes where K < 100). No departure. 1 - p is formed from
    log p, because (1 - p)^0.1 still differs from 0 where 1 - p is far below the rounding of p.
    """

    def block(f: Float) -> Float:
        log_p = log_softmax(f)
        if top < log_p.shape[1]:
            log_p = np.partition(log_p, log_p.shape[1] - top, axis=1)[:, -top:]
        return -(np.exp(gamma * log_p) * (-np.expm1(log_p)) ** gamma).sum(axis=1)

    return _per_row(as_matrix(logits, "logits"), block)


# ----------------------------------------------------------------------------------------------------
# what a score may be fitted on


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


def _given(values: ArrayLike | None, what: str, width: int | None) -> np.ndarray:
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
        given = _given(logits, "logits", None)
        values = np.asarray(self.function(given), dtype=np.float64)
        if values.shape != (len(given),):
            raise QuantlensError(f"a score of {len(given)} images must be {len(given)} numbers, not {values.shape}")
        return values


def l2_normalise(features: np.ndarray) -> Float:
    """h / ||h||, row by row, in float64; a row of zeros stays zero."""
    h = np.asarray(features, dtype=np.float64)
    norm = np.linalg.norm(h, axis=1, keepdims=True)
    return h / np.where(norm > 0, norm, 1.0)


# ----------------------------------------------------------------------------------------------------
# nearest neighbours


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

    return _per_row(as_matrix(features, "features"), block, row_elements=len(known))


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
        return knn(_given(features, "features", self.bank.shape[1]), self.bank, self.k)


# ----------------------------------------------------------------------------------------------------
# virtual-logit matching


def vim(logits: ArrayLike, features: ArrayLike, origin: Float, residual_basis: Float, alpha: float) -> Float:
    """log sum_k exp(f_k) - alpha ||R^T (h - u)||. logits [N, K], features [N, D] -> [N].

    `origin` u [D] = -pinv(W) b, `residual_basis` R [D, D - d] orthonormal: the directions in which fit
    features vary least about u, `alpha` scales the residual to the size of a logit. Wang, Li, Feng and Zhang,
    ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022. For the choice of d and the departures
    see `ViMScorer`.
    """
    residual = _per_row(
        as_matrix(features, "features"), lambda h: np.linalg.norm((h - origin) @ residual_basis, axis=1)
    )
    return energy(logits) - alpha * residual


def vim_dimension(n_features: int, n_images: int) -> int:
    """Dimension d of ViM's principal space, before `ViMScorer` looks at the rank.

    The authors' rule: 1000 where D >= 2048, 512 where D >= 768, D // 2 below; and never more than half the
    number of fit images, because the residual of the images that span the space is zero by construction.
    """
    published = 1000 if n_features >= 2048 else 512 if n_features >= 768 else n_features // 2
    return min(published, n_images // 2)


@dataclass(frozen=True, eq=False)
class ViMScorer:
    """`vim` with origin u [D], residual basis R [D, D - d] and alpha fitted on the fit images.

    R: the D - d eigenvectors of smallest eigenvalue of the second-moment matrix of h - u (no mean taken off,
    symmetric eigensolver). alpha = |mean of max_k f_k| / mean of ||R^T (h - u)|| on the fit images.

    Departures: d is limited for few fit images (`vim_dimension`), and where the fit features about u span no
    more than d directions it is half their number; alpha takes the magnitude of the mean largest logit, which
    the paper has positive and networks trained with a sigmoid loss may have negative, where the formula would
    reward a large residual; alpha = 0 (plain energy) where fit features leave no residual at all.
    """

    origin: Float
    residual_basis: Float
    alpha: float

    @classmethod
    def fit(cls, data: FitData) -> ViMScorer:
        weight, bias = data.classifier()
        origin = -np.linalg.pinv(weight) @ bias
        centred = data.features64() - origin
        n, d_features = centred.shape
        eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / n)  # ascending
        d = vim_dimension(d_features, n)
        rank = int((eigenvalues > _RANK_TOLERANCE * max(float(eigenvalues[-1]), 0.0)).sum())
        if d >= rank:
            d = rank // 2
        basis = np.ascontiguousarray(vectors[:, : d_features - d])
        mean_residual = float(np.linalg.norm(centred @ basis, axis=1).mean())
        mean_logit = abs(float(data.logits.max(axis=1).mean(dtype=np.float64)))
        return cls(
            origin=origin,
            residual_basis=basis,
            alpha=mean_logit / mean_residual if mean_residual > 0 else 0.0,
        )

    def __call__(self, logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        f, h = _given(logits, "logits", None), _given(features, "features", len(self.origin))
        if len(f) != len(h):
            raise QuantlensError(f"the logits are of {len(f)} images and the features of {len(h)}")
        return vim(f, h, self.origin, self.residual_basis, self.alpha)


# ----------------------------------------------------------------------------------------------------
# Mahalanobis distances

_RANK_TOLERANCE = 1e-10
"""Directions whose variance is below this share of the largest are rounding noise of float32 features."""

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
    n, d = centred.shape
    covariance = centred.T @ centred / n
    mean_variance = np.trace(covariance) / d
    squared = float((covariance**2).sum())
    fourth = float((np.einsum("nd,nd->n", centred, centred) ** 2).sum() / n)  # mean of ||x||^4
    distance = squared / d - mean_variance**2
    error = (fourth - squared) / (n * d)
    rho = 1.0 if distance <= 0 else min(max(error / distance, 0.0), 1.0)
    shrunk = (1 - rho) * covariance
    shrunk[np.diag_indices(d)] += rho * mean_variance
    return shrunk


def tied_covariances(features: Float, means: Float, row: np.ndarray) -> tuple[Float, Float]:
    """Covariance within classes and covariance of all images about their mean, both [D, D].

    `features` [N, D], `means` [C, D], `row` [N] as from `class_means`. With N - C >= 5 D degrees of freedom
    these are the published estimates, (1/N) sum (h - mu_y)(h - mu_y)^T and (1/N) sum (h - mu)(h - mu)^T. With
    fewer, both are shrunk by `ledoit_wolf`, the one within classes is scaled by N / (N - C), and where N - C
    is below D, so that it is singular, it is mixed with the covariance of all images: w within + (1 - w)
    total with w = (N - C) / D. Where images do not differ within classes (one image per class, or a model
    whose features have collapsed) the total stands for both.

    Why: on deit_tiny and vit_tiny features of 100 to 600 ImageNet images of nearly as many classes, with
    three OOD sets, the pseudo-inverse of the singular estimate gave a mean AUROC of 40 to 64 % (relative
    Mahalanobis 20 to 59 %), this one 45 to 75 % (51 to 65 %).
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
    kept = eigenvalues > _RANK_TOLERANCE * max(float(eigenvalues[-1]), 0.0)
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

    return _per_row(as_matrix(features, "features"), block, row_elements=len(means))


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
        return _per_row(_given(features, "features", self.means.shape[1]), self._score)

    def _score(self, h: Float) -> Float:
        if self.normalise:
            h = l2_normalise(h)
        if self.background_mean is None or self.background_whiten is None:
            return mahalanobis(h, self.means, self.whiten)
        return relative_mahalanobis(h, self.means, self.whiten, self.background_mean, self.background_whiten)


# ----------------------------------------------------------------------------------------------------
# rectified activations


def react(features: ArrayLike, weight: Float, bias: Float, threshold: float) -> Float:
    """log sum_k exp of the logits W min(h, c) + b. features [N, D], weight [K, D], bias [K] -> [N].

    Sun, Guo and Li, ReAct: Out-of-distribution Detection With Rectified Activations, NeurIPS 2021, with
    `threshold` c the 90th percentile of all activations of the fit images and the energy score. Departures:
    the paper clips ReLU features; those of a vision transformer take both signs and are clipped from above
    all the same. The logits are recomputed in float64 from the classifier's weights as used (a quantized
    model's: dequantized), without rounding the clipped features to the codes of the classifier's input.
    """
    return _per_row(
        as_matrix(features, "features"),
        lambda h: log_sum_exp(np.minimum(h, threshold) @ weight.T + bias),
        row_elements=len(weight),
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
        return react(_given(features, "features", self.weight.shape[1]), self.weight, self.bias, self.threshold)


# ----------------------------------------------------------------------------------------------------
# by name


@dataclass(frozen=True)
class ScoreInfo:
    """What a score is called, where it comes from and what it needs."""

    name: str
    title: str
    paper: str
    needs_fit: bool = False
    """fitted on ID images"""
    needs_features: bool = False
    """reads penultimate features [N, D]"""
    needs_classifier: bool = False
    """reads the weight and bias of the classifier"""
    formula: str = ""
    departure: str = ""


_FEW_IMAGES = "covariances are shrunk where the fit images are few"
_KNN_PAPER = "Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022"
_VIM_PAPER = "Wang et al., ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022"
_MDS_PAPER = "Lee et al., A Simple Unified Framework for Detecting OOD Samples and Attacks, NeurIPS 2018"
_RMD_PAPER = "Ren et al., A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection, arXiv 2021"
_L2_PAPER = "Mueller and Hein, Mahalanobis++: Improving OOD Detection via Feature Normalization, ICML 2025"
_REACT_PAPER = "Sun et al., ReAct: Out-of-distribution Detection With Rectified Activations, NeurIPS 2021"

_INFOS = (
    ScoreInfo(
        "msp",
        "Maximum softmax probability",
        "Hendrycks and Gimpel, A Baseline for Detecting Misclassified and OOD Examples, ICLR 2017",
        formula="max_k p_k",
    ),
    ScoreInfo(
        "maxlogit",
        "Maximum logit",
        "Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022",
        formula="max_k f_k",
    ),
    ScoreInfo(
        "energy",
        "Energy",
        "Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020",
        formula="log sum_k exp(f_k)",
    ),
    ScoreInfo(
        "entropy",
        "Negative entropy",
        "Chan et al., Entropy Maximization and Meta Classification for OOD Detection, ICCV 2021",
        formula="sum_k p_k log p_k",
        departure="per image instead of per pixel, without retraining",
    ),
    ScoreInfo(
        "gen",
        "Generalized entropy",
        "Liu et al., GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection, CVPR 2023",
        formula="-sum over the 100 largest p of p^0.1 (1 - p)^0.1",
    ),
    ScoreInfo(
        "knn",
        "Nearest neighbours",
        _KNN_PAPER,
        needs_fit=True,
        needs_features=True,
        formula="-distance of h/|h| to its 50th nearest fit image",
        departure="the bank is the fit images; K is cut to their number",
    ),
    ScoreInfo(
        "vim",
        "Virtual-logit matching",
        _VIM_PAPER,
        needs_fit=True,
        needs_features=True,
        needs_classifier=True,
        formula="log sum_k exp(f_k) - alpha |R^T (h - u)|",
        departure="principal space of at most half as many dimensions as fit images; alpha never negative",
    ),
    ScoreInfo(
        "mahalanobis",
        "Mahalanobis distance",
        _MDS_PAPER,
        needs_fit=True,
        needs_features=True,
        formula="-min_c (h - mu_c)^T Sigma^-1 (h - mu_c)",
        departure=f"penultimate features only, no input perturbation; {_FEW_IMAGES}",
    ),
    ScoreInfo(
        "rmahalanobis",
        "Relative Mahalanobis distance",
        _RMD_PAPER,
        needs_fit=True,
        needs_features=True,
        formula="-min_c (d_c - d_0)",
        departure=_FEW_IMAGES,
    ),
    ScoreInfo(
        "mahalanobis_l2",
        "Mahalanobis distance, L2-normalised",
        _L2_PAPER,
        needs_fit=True,
        needs_features=True,
        formula="mahalanobis of h/|h|",
        departure=_FEW_IMAGES,
    ),
    ScoreInfo(
        "rmahalanobis_l2",
        "Relative Mahalanobis distance, L2-normalised",
        _L2_PAPER,
        needs_fit=True,
        needs_features=True,
        formula="rmahalanobis of h/|h|",
        departure=_FEW_IMAGES,
    ),
    ScoreInfo(
        "react",
        "Rectified activations",
        _REACT_PAPER,
        needs_fit=True,
        needs_features=True,
        needs_classifier=True,
        formula="log sum_k exp(W min(h, c) + b)_k",
        departure="features of both signs are clipped from above; logits from the dequantized classifier",
    ),
)

_LOGIT_SCORES: dict[str, Callable[[ArrayLike], Float]] = {
    "msp": msp,
    "maxlogit": maxlogit,
    "energy": energy,
    "entropy": entropy,
    "gen": gen,
}

_FITTED_SCORES: dict[str, Callable[[FitData], Scorer]] = {
    "knn": KNNScorer.fit,
    "vim": ViMScorer.fit,
    "mahalanobis": MahalanobisScorer.fit,
    "rmahalanobis": lambda data: MahalanobisScorer.fit(data, relative=True),
    "mahalanobis_l2": lambda data: MahalanobisScorer.fit(data, normalise=True),
    "rmahalanobis_l2": lambda data: MahalanobisScorer.fit(data, relative=True, normalise=True),
    "react": ReActScorer.fit,
}


def register_score(info: ScoreInfo) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that adds a score under ``info.name``: a function logits [N, K] -> [N], larger = more in-distribution;
    or, where ``info.needs_fit``, one that takes `FitData` and returns a `Scorer`. Raises QuantlensError for a name that
    is taken."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _SCORES.add((info, function), info.name, maker=function)
        return function

    return add


def _adopt(name: str, found: Any) -> None:
    """Register a function that an entry point names, as a score of the logits."""
    if name and not isinstance(found, ModuleType):
        title = (found.__doc__ or name).strip().splitlines()[0].rstrip(".")
        register_score(ScoreInfo(name, title, ""))(found)


_SCORES: Registry[tuple[ScoreInfo, Callable[..., Any]]] = Registry("OOD score", "quantlens.scores", adopt=_adopt)
_OWN: dict[str, Callable[..., Any]] = {**_LOGIT_SCORES, **_FITTED_SCORES}
for _info in _INFOS:
    register_score(_info)(_OWN[_info.name])


def available_scores(*, own: bool = False) -> dict[str, ScoreInfo]:
    """Every score by name, in the order in which they are listed to people. own: those of quantlens alone."""
    return {name: info for name, (info, _) in _SCORES.all(own=own).items()}


def make_scorer(name: str, fit: FitData | None = None) -> Scorer:
    """The score of that name, fitted where it needs it: call it as `scorer(logits [N, K], features [N, D] |
    None)`.

    Logits may be None for scores that read features alone. Raises UnknownNameError for another name;
    QuantlensError where the score needs a fit and `fit` is None; UnsupportedError where the model behind
    `fit` has no features or no linear classifier and the score needs them.
    """
    info, function = _SCORES.get(name)
    if not info.needs_fit:
        return LogitScorer(function)
    if fit is None:
        raise QuantlensError(f"the score {name!r} is fitted on ID images, but none were given: name some for it")
    if info.needs_features and fit.features is None:
        raise UnsupportedError(f"the score {name!r} needs penultimate features, which this model lacks: leave it out")
    if info.needs_classifier and fit.weight is None:
        raise UnsupportedError(f"the score {name!r} needs a linear classifier, which this model lacks: leave it out")
    scorer: Scorer = function(fit)
    return scorer
