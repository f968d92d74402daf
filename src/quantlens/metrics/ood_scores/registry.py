"""The scores by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numpy.typing import ArrayLike

from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.metrics._arrays import Float
from quantlens.metrics.ood_scores.base import FitData, LogitScorer, Scorer
from quantlens.metrics.ood_scores.logits import energy, entropy, gen, maxlogit, msp
from quantlens.metrics.ood_scores.mahalanobis import MahalanobisScorer
from quantlens.metrics.ood_scores.neighbours import KNNScorer
from quantlens.metrics.ood_scores.react import ReActScorer
from quantlens.metrics.ood_scores.vim import ViMScorer


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


def available_scores() -> dict[str, ScoreInfo]:
    """Every score by name, in the order in which they are listed to people."""
    return {info.name: info for info in _INFOS}


def make_scorer(name: str, fit: FitData | None = None) -> Scorer:
    """The score of that name, fitted where it needs it: call it as `scorer(logits [N, K], features [N, D] |
    None)`.

    Logits may be None for scores that read features alone. Raises UnknownNameError for another name;
    QuantlensError where the score needs a fit and `fit` is None; UnsupportedError where the model behind
    `fit` has no features or no linear classifier and the score needs them.
    """
    infos = available_scores()
    if name not in infos:
        raise UnknownNameError("OOD score", name, infos)
    info = infos[name]
    if name in _LOGIT_SCORES:
        return LogitScorer(_LOGIT_SCORES[name])
    if fit is None:
        raise QuantlensError(f"the score {name!r} is fitted on ID images, but none were given: name some for it")
    if info.needs_features and fit.features is None:
        raise UnsupportedError(f"the score {name!r} needs penultimate features, which this model lacks: leave it out")
    if info.needs_classifier and fit.weight is None:
        raise UnsupportedError(f"the score {name!r} needs a linear classifier, which this model lacks: leave it out")
    return _FITTED_SCORES[name](fit)
