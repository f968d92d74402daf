"""Scores of the logits alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from quantlens.metrics._arrays import Float, as_matrix, log_softmax, per_row
from quantlens.metrics.ood_scores.registry import ScoreInfo, register_score


@register_score(
    ScoreInfo(
        "msp",
        "Maximum softmax probability",
        "Hendrycks and Gimpel, A Baseline for Detecting Misclassified and OOD Examples, ICLR 2017",
        formula="max_k p_k",
        label="MSP",
    )
)
def msp(logits: ArrayLike) -> Float:
    """Maximum softmax probability, max_k p_k. logits [N, K] -> [N] in 1/K..1.

    Hendrycks and Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
    Networks, ICLR 2017. No departure.
    """
    return per_row(as_matrix(logits, "logits"), lambda f: np.exp(log_softmax(f).max(axis=1)))


@register_score(
    ScoreInfo(
        "maxlogit",
        "Maximum logit",
        "Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022",
        formula="max_k f_k",
        label="MaxLogit",
    )
)
def maxlogit(logits: ArrayLike) -> Float:
    """Largest logit, max_k f_k. logits [N, K] -> [N].

    Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022. No departure.
    """
    return as_matrix(logits, "logits").max(axis=1).astype(np.float64)


@register_score(
    ScoreInfo(
        "energy",
        "Energy",
        "Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020",
        formula="log sum_k exp(f_k)",
        label="Energy",
    )
)
def energy(logits: ArrayLike) -> Float:
    """Negative free energy at temperature 1, log sum_k exp(f_k). logits [N, K] -> [N].

    Liu, Wang, Owens and Li, Energy-based Out-of-distribution Detection, NeurIPS 2020. T = 1, as they advise.
    """
    return per_row(as_matrix(logits, "logits"), lambda f: logsumexp(f, axis=1))


@register_score(
    ScoreInfo(
        "entropy",
        "Negative entropy",
        "Chan et al., Entropy Maximization and Meta Classification for OOD Detection, ICCV 2021",
        formula="sum_k p_k log p_k",
        departure="per image instead of per pixel, without retraining",
        label="Entropy",
    )
)
def entropy(logits: ArrayLike) -> Float:
    """Negative Shannon entropy of the softmax, sum_k p_k log p_k. logits [N, K] -> [N] in -log K..0.

    As an OOD score: Chan, Rottmann and Gottschalk, Entropy Maximization and Meta Classification for
    Out-of-Distribution Detection in Semantic Segmentation, ICCV 2021, there per pixel and here per image,
    without their retraining.
    """

    def block(f: Float) -> Float:
        log_p = log_softmax(f)
        return np.einsum("nk,nk->n", np.exp(log_p), log_p)

    return per_row(as_matrix(logits, "logits"), block)


@register_score(
    ScoreInfo(
        "gen",
        "Generalized entropy",
        "Liu et al., GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection, CVPR 2023",
        formula="-sum over the 100 largest p of p^0.1 (1 - p)^0.1",
        label="GEN",
    )
)
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

    return per_row(as_matrix(logits, "logits"), block)
