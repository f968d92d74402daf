"""Scores of the features of an image: functions of arrays, each with the function that fits it on ID images.
They are listed to people in this order."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from quantlens.errors import QuantlensError
from quantlens.metrics._arrays import Float, as_matrix, per_row
from quantlens.metrics.ood_scores.registry import (
    EVERY_TASK,
    ONE_LABEL,
    RANK_TOLERANCE,
    FitData,
    ScoreInfo,
    Scorer,
    energy,
    given,
    register_score,
)

WELL_DETERMINED = 5
"""Degrees of freedom per feature from which a covariance is used as estimated, without shrinkage."""


def l2_normalise(features: np.ndarray) -> Float:
    """h / ||h||, row by row, in float64; a row of zeros stays zero."""
    h = np.asarray(features, dtype=np.float64)
    norm = np.linalg.norm(h, axis=1, keepdims=True)
    return h / np.where(norm > 0, norm, 1.0)


# ---- nearest neighbours ----------------------------------------------------------------------------------------------


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
        tasks=EVERY_TASK,
    )
)
def fit_knn(data: FitData) -> Scorer:
    """`knn` against the L2-normalised features of the fit images."""
    bank = l2_normalise(data.features64())
    return lambda logits, features=None: knn(given(features, "features", bank.shape[1]), bank)


# ---- virtual-logit matching ------------------------------------------------------------------------------------------


def vim(logits: ArrayLike, features: ArrayLike, origin: Float, residual_basis: Float, alpha: float) -> Float:
    """log sum_k exp(f_k) - alpha ||R^T (h - u)||. logits [N, K], features [N, D] -> [N].

    `origin` u [D] = -pinv(W) b, `residual_basis` R [D, D - d] orthonormal: the directions in which fit
    features vary least about u, `alpha` scales the residual to the size of a logit. Wang, Li, Feng and Zhang,
    ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022. For the choice of d and the departures
    see `vim_parameters`.
    """
    residual = per_row(as_matrix(features, "features"), lambda h: np.linalg.norm((h - origin) @ residual_basis, axis=1))
    return energy(logits) - alpha * residual


def vim_dimension(n_features: int, n_images: int) -> int:
    """Dimension d of ViM's principal space, before `vim_parameters` looks at the rank.

    The authors' rule: 1000 where D >= 2048, 512 where D >= 768, D // 2 below; and never more than half the
    number of fit images, because the residual of the images that span the space is zero by construction.
    """
    published = 1000 if n_features >= 2048 else 512 if n_features >= 768 else n_features // 2
    return min(published, n_images // 2)


def vim_parameters(data: FitData) -> tuple[Float, Float, float]:
    """Origin u [D], residual basis R [D, D - d] and alpha of `vim`, from the fit images.

    R: the D - d eigenvectors of smallest eigenvalue of the second-moment matrix of h - u (no mean taken off,
    symmetric eigensolver). alpha = |mean of max_k f_k| / mean of ||R^T (h - u)|| on the fit images.

    Departures: d is limited for few fit images (`vim_dimension`), and where the fit features about u span no
    more than d directions it is half their number; alpha takes the magnitude of the mean largest logit, which
    the paper has positive and networks trained with a sigmoid loss may have negative, where the formula would
    reward a large residual; alpha = 0 (plain energy) where fit features leave no residual at all.
    """
    weight, bias = data.classifier()
    origin = -np.linalg.pinv(weight) @ bias
    centred = data.features64() - origin
    n, d_features = centred.shape
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / n)  # ascending
    d = vim_dimension(d_features, n)
    rank = int((eigenvalues > RANK_TOLERANCE * max(float(eigenvalues[-1]), 0.0)).sum())
    if d >= rank:
        d = rank // 2
    basis = np.ascontiguousarray(vectors[:, : d_features - d])
    mean_residual = float(np.linalg.norm(centred @ basis, axis=1).mean())
    mean_logit = abs(float(np.asarray(data.logits).max(axis=1).mean(dtype=np.float64)))
    return origin, basis, mean_logit / mean_residual if mean_residual > 0 else 0.0


@register_score(
    ScoreInfo(
        "vim",
        "Virtual-logit matching",
        "Wang et al., ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022",
        needs_fit=True,
        needs_features=True,
        needs_classifier=True,
        formula="log sum_k exp(f_k) - alpha |R^T (h - u)|",
        departure="principal space of at most half as many dimensions as fit images; alpha never negative",
        label="ViM",
    )
)
def fit_vim(data: FitData) -> Scorer:
    """`vim` with the parameters that the fit images give."""
    parameters = vim_parameters(data)

    def score(logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        f, h = given(logits, "logits"), given(features, "features", len(parameters[0]))
        if len(f) != len(h):
            raise QuantlensError(f"the logits are of {len(f)} images and the features of {len(h)}")
        return vim(f, h, *parameters)

    return score


# ---- Mahalanobis distances -------------------------------------------------------------------------------------------


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


def fit_mahalanobis(data: FitData, *, relative: bool = False, normalise: bool = False) -> Scorer:
    """`mahalanobis` to the classes of the fit images.

    Classes are the labels or, without labels, the predicted classes; a class without fit images is left out. Where all
    fit features are equal the score is 0 for every image. normalise: features are divided by their L2 norm first
    (Mueller and Hein, Mahalanobis++: Improving OOD Detection via Feature Normalization, ICML 2025). relative: less the
    same distance to one Gaussian of all fit images, -min_c (d_c - d_0) (Ren, Fort, Liu, Roy, Padhy and
    Lakshminarayanan, A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection, arXiv 2106.09022, 2021).
    """
    prepared = l2_normalise if normalise else np.asarray
    h = prepared(data.features64())
    means, row = class_means(h, data.classes())
    within, total = tied_covariances(h, means, row)
    gaussians = [(means, whitening(within))]
    if relative:
        gaussians.append((h.mean(axis=0)[None], whitening(total)))

    def block(h: Float) -> Float:
        near, *background = (mahalanobis(prepared(h), *gaussian) for gaussian in gaussians)
        return near - background[0] if relative else near

    return lambda logits, features=None: per_row(given(features, "features", means.shape[1]), block)


_FEW_IMAGES = "covariances are shrunk where the fit images are few"
_L2 = "Mueller and Hein, Mahalanobis++: Improving OOD Detection via Feature Normalization, ICML 2025"


def _register(
    name: str, label: str, title: str, paper: str, formula: str, departure: str = "", **settings: bool
) -> None:
    """Add `fit_mahalanobis` with settings of its own. Relative distances need classes, others take one Gaussian."""
    departure, relative = f"{departure}{_FEW_IMAGES}", settings.get("relative", False)
    tasks = (*ONE_LABEL, "binary", "features") if relative else EVERY_TASK
    info = ScoreInfo(
        name,
        title,
        paper,
        needs_fit=True,
        needs_features=True,
        needs_classes=relative,
        formula=formula,
        departure=departure,
        label=label,
        tasks=tasks,
    )

    def fit(data: FitData) -> Scorer:
        return fit_mahalanobis(data, **settings)

    register_score(info)(fit)


_register(
    "mahalanobis",
    "Mahalanobis",
    "Mahalanobis distance",
    "Lee et al., A Simple Unified Framework for Detecting OOD Samples and Attacks, NeurIPS 2018",
    "-min_c (h - mu_c)^T Sigma^-1 (h - mu_c)",
    "penultimate features only, no input perturbation; ",
)
_register(
    "rmahalanobis",
    "relative Mahalanobis",
    "Relative Mahalanobis distance",
    "Ren et al., A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection, arXiv 2021",
    "-min_c (d_c - d_0)",
    relative=True,
)
_register(
    "mahalanobis_l2",
    "Mahalanobis, L2-normalised",
    "Mahalanobis distance, L2-normalised",
    _L2,
    "mahalanobis of h/|h|",
    normalise=True,
)
_register(
    "rmahalanobis_l2",
    "relative Mahalanobis, L2-normalised",
    "Relative Mahalanobis distance, L2-normalised",
    _L2,
    "rmahalanobis of h/|h|",
    relative=True,
    normalise=True,
)


# ---- rectified activations -------------------------------------------------------------------------------------------


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
def fit_react(data: FitData, percentile: float = 90.0) -> Scorer:
    """`react` with the threshold taken at a percentile of the fit features (linear interpolation)."""
    weight, bias = data.classifier()
    threshold = float(np.percentile(data.features64(), percentile))
    return lambda logits, features=None: react(given(features, "features", weight.shape[1]), weight, bias, threshold)
