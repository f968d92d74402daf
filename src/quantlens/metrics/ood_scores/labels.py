"""Scores of models with a sigmoid per output: binary and multi-label classifiers; and of detectors, whose logit of a
class is the largest log-odds p / (1 - p) of any of its detections in the image."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from quantlens.metrics._arrays import Float, as_matrix, per_row
from quantlens.metrics.ood_scores.registry import SIGMOID, ScoreInfo, register_score


@register_score(
    ScoreInfo(
        "max_confidence",
        "Largest confidence",
        "Hendrycks and Gimpel, A Baseline for Detecting Misclassified and OOD Examples, ICLR 2017",
        formula="max_k p_k",
        departure="the largest score of any detection in the image",
        label="largest confidence",
        tasks=("detect",),
    )
)
def max_confidence(logits: ArrayLike) -> Float:
    """The score of a detector's surest detection, max_k p_k, p the sigmoid. logits [N, C] -> [N] in 0..1."""
    return np.asarray(expit(as_matrix(logits, "logits").max(axis=1).astype(np.float64)))


@register_score(
    ScoreInfo(
        "joint_energy",
        "Joint energy",
        "Wang et al., Can multi-label classification networks know what they don't know?, NeurIPS 2021",
        formula="sum_k log(1 + exp(f_k))",
        label="JointEnergy",
        tasks=(*SIGMOID, "detect"),
    )
)
def joint_energy(logits: ArrayLike) -> Float:
    """Label-wise energies added up, sum_k log(1 + exp(f_k)). logits [N, L] -> [N], larger where more labels hold."""
    return per_row(as_matrix(logits, "logits"), lambda f: np.logaddexp(0.0, f).sum(axis=1))


@register_score(
    ScoreInfo(
        "sigmoid_confidence",
        "Mean confidence of the labels",
        "Hendrycks and Gimpel, A Baseline for Detecting Misclassified and OOD Examples, ICLR 2017",
        formula="mean_k max(p_k, 1 - p_k)",
        departure="MSP of each label, which holds or not, averaged over the labels",
        label="sigmoid confidence",
        tasks=SIGMOID,
    )
)
def sigmoid_confidence(logits: ArrayLike) -> Float:
    """Mean over labels of max(p_k, 1 - p_k), p the sigmoid. logits [N, L] -> [N] in 1/2..1; for one label, MSP."""
    return per_row(as_matrix(logits, "logits"), lambda f: np.asarray(expit(np.abs(f)).mean(axis=1)))
