"""Virtual-logit matching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quantlens.errors import QuantlensError
from quantlens.metrics._arrays import Float, as_matrix
from quantlens.metrics.ood_scores.base import RANK_TOLERANCE, FitData, given, per_row
from quantlens.metrics.ood_scores.logits import energy
from quantlens.metrics.ood_scores.registry import ScoreInfo, register_score


def vim(logits: ArrayLike, features: ArrayLike, origin: Float, residual_basis: Float, alpha: float) -> Float:
    """log sum_k exp(f_k) - alpha ||R^T (h - u)||. logits [N, K], features [N, D] -> [N].

    `origin` u [D] = -pinv(W) b, `residual_basis` R [D, D - d] orthonormal: the directions in which fit
    features vary least about u, `alpha` scales the residual to the size of a logit. Wang, Li, Feng and Zhang,
    ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022. For the choice of d and the departures
    see `ViMScorer`.
    """
    residual = per_row(as_matrix(features, "features"), lambda h: np.linalg.norm((h - origin) @ residual_basis, axis=1))
    return energy(logits) - alpha * residual


def vim_dimension(n_features: int, n_images: int) -> int:
    """Dimension d of ViM's principal space, before `ViMScorer` looks at the rank.

    The authors' rule: 1000 where D >= 2048, 512 where D >= 768, D // 2 below; and never more than half the
    number of fit images, because the residual of the images that span the space is zero by construction.
    """
    published = 1000 if n_features >= 2048 else 512 if n_features >= 768 else n_features // 2
    return min(published, n_images // 2)


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
        rank = int((eigenvalues > RANK_TOLERANCE * max(float(eigenvalues[-1]), 0.0)).sum())
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
        f, h = given(logits, "logits", None), given(features, "features", len(self.origin))
        if len(f) != len(h):
            raise QuantlensError(f"the logits are of {len(f)} images and the features of {len(h)}")
        return vim(f, h, self.origin, self.residual_basis, self.alpha)
