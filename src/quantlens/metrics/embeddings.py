"""How good features are without a classifier: nearest neighbours, a linear probe, and how near they stay to others."""

import warnings

import numpy as np
from numpy.typing import ArrayLike

from quantlens.errors import QuantlensError
from quantlens.metrics._arrays import Float, Int, as_matrix, row_blocks
from quantlens.metrics.ood_scores.features import l2_normalise

NEIGHBOURS = 20
TEMPERATURE = 0.07
PROBE_ITERATIONS = 1000


def knn_classes(
    features: ArrayLike, bank: ArrayLike, labels: ArrayLike, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Int:
    """The class [N] that the k nearest of the bank [M, D] with classes [M] vote for, for features [N, D].

    A neighbour of cosine c votes with exp(c / temperature). Wu, Xiong, Yu and Lin, Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination, CVPR 2018; k = 20 and temperature 0.07 as in Caron et al., Emerging
    Properties in Self-Supervised Vision Transformers (DINO), ICCV 2021. k is cut to M; equal votes go to the lower
    class.
    """
    known, h = l2_normalise(as_matrix(bank, "bank features")), as_matrix(features, "features")
    classes, row = np.unique(np.asarray(labels), return_inverse=True)
    k = min(k, len(known))
    found = np.empty(len(h), dtype=np.int64)
    for rows in row_blocks(len(h), max(len(known), len(classes))):
        cosine = l2_normalise(h[rows]) @ known.T
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        weight = np.exp((np.take_along_axis(cosine, nearest, axis=1) - 1) / temperature)
        n = len(cosine)
        cell = np.arange(n)[:, None] * len(classes) + row[nearest]
        votes = np.bincount(cell.ravel(), weight.ravel(), n * len(classes)).reshape(n, -1)
        found[rows] = votes.argmax(axis=1)
    return classes[found].astype(np.int64)


def linear_classes(features: ArrayLike, bank: ArrayLike, labels: ArrayLike) -> Int:
    """The class [N] that a linear probe gives features [N, D], fitted on the bank [M, D] with classes [M].

    Multinomial logistic regression with an L2 penalty by L-BFGS, at most 1000 iterations, as in Radford et al. (CLIP),
    ICML 2021, appendix A.3. Departures: features are standardised with the bank's mean and deviation and C is 1, where
    the paper sweeps C on validation images. Raises QuantlensError for fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression  # late: it takes a second to import

    known, h = as_matrix(bank, "bank features").astype(np.float64), as_matrix(features, "features").astype(np.float64)
    classes = np.asarray(labels)
    if np.unique(classes).size < 2:
        raise QuantlensError("a linear probe needs fit images of at least two classes")
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    scale = np.where(deviation > 1e-10 * max(float(deviation.max()), 1e-300), deviation, np.inf)
    with warnings.catch_warnings():  # of many classes with few images each, and of the limit of iterations
        warnings.simplefilter("ignore")
        probe = LogisticRegression(C=1.0, max_iter=PROBE_ITERATIONS).fit((known - mean) / scale, classes)
    return np.asarray(probe.predict((h - mean) / scale)).astype(np.int64)


def cosines(features: ArrayLike, others: ArrayLike) -> Float:
    """Cosine [N] of each image's features [N, D] to its other ones [N, D]; 0 where one of them is all 0."""
    first, second = as_matrix(features, "features"), as_matrix(others, "other features")
    if first.shape != second.shape:
        raise QuantlensError(f"features of shape {first.shape} have no cosine to features of shape {second.shape}")
    return np.einsum("nd,nd->n", l2_normalise(first), l2_normalise(second))


def linear_cka(features: ArrayLike, others: ArrayLike) -> float | None:
    """Linear centred kernel alignment of features [N, D] and [N, E], 0 to 1; None where one of them does not vary.

    |X^T Y|² / (|X^T X| |Y^T Y|) of centred features. Kornblith, Norouzi, Lee and Hinton, Similarity of Neural Network
    Representations Revisited, ICML 2019.
    """
    x, y = (as_matrix(f, "features").astype(np.float64) for f in (features, others))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    size = float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return float(np.linalg.norm(x.T @ y) ** 2 / size) if size > 0 else None


def similarity(features: ArrayLike, others: ArrayLike) -> dict[str, float | None]:
    """{"cosine" (mean over images), "cosine_p5" (5th percentile), "cka"} of features [N, D] to others of the images."""
    cosine = cosines(features, others)
    low = float(np.percentile(cosine, 5))
    return {"cosine": float(cosine.mean()), "cosine_p5": low, "cka": linear_cka(features, others)}
