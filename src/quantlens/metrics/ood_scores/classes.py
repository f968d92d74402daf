"""Scores that compare an image with what the model gives on ID images of each class, and MSP at a fitted temperature.
They are measured where they are asked for by name."""

import numpy as np
from numpy.typing import ArrayLike

from quantlens.errors import QuantlensError
from quantlens.metrics._arrays import Float, as_matrix, log_softmax, per_row, row_blocks
from quantlens.metrics.classification import temperature
from quantlens.metrics.ood_scores.features import class_means
from quantlens.metrics.ood_scores.registry import FitData, ScoreInfo, Scorer, energy, given, msp, register_score

# ---- KL matching -----------------------------------------------------------------------------------------------------


def kl_matching(logits: ArrayLike, log_templates: Float) -> Float:
    """-min_c KL(p || d_c) of the softmax p and templates d_c. logits [N, K] -> [N], at most 0.

    `log_templates` log d [C, K]. Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML
    2022: a template is the mean softmax of the held-out images that are predicted as one class. Departure: a class that
    no fit image is predicted as has none (OpenOOD gives it a one-hot template, from which every other softmax is
    infinitely far).
    """

    def block(f: Float) -> Float:
        log_p = log_softmax(f)
        p = np.exp(log_p)
        return np.minimum((p @ log_templates.T).max(axis=1) - np.einsum("nk,nk->n", p, log_p), 0.0)

    return per_row(as_matrix(logits, "logits"), block, row_elements=len(log_templates))


@register_score(
    ScoreInfo(
        "kl_matching",
        "KL matching",
        "Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022",
        needs_fit=True,
        formula="-min_c KL(p | mean p of the fit images predicted as c)",
        departure="a class that no fit image is predicted as has no template",
        label="KL matching",
        optional=True,
    )
)
def fit_kl_matching(data: FitData) -> Scorer:
    """`kl_matching` against the classes that the fit images are predicted as; labels are not used."""
    f = given(data.logits, "logits")
    predicted = f.argmax(axis=1)
    order = np.argsort(predicted, kind="stable")
    _, starts, counts = np.unique(predicted[order], return_index=True, return_counts=True)
    templates = np.empty((len(starts), f.shape[1]))
    log_sum = energy(f)[order, None]
    for classes in row_blocks(f.shape[1], len(f)):  # a mean of exponentials, so that no template is ever 0
        log_p = f[:, classes][order] - log_sum
        top = np.maximum.reduceat(log_p, starts)
        share = np.add.reduceat(np.exp(log_p - np.repeat(top, counts, axis=0)), starts) / counts[:, None]
        templates[:, classes] = top + np.log(share)

    def score(logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        return kl_matching(given(logits, "logits", templates.shape[1]), templates)

    return score


# ---- stored patterns -------------------------------------------------------------------------------------------------


def she(logits: ArrayLike, features: ArrayLike, patterns: Float, classes: np.ndarray) -> Float:
    """h . S_c of the class c that an image is predicted as. logits [N, K], features [N, D] -> [N].

    `patterns` S [C, D] of `classes` [C]. Zhang et al., Out-of-Distribution Detection based on In-Distribution Data
    Patterns Memorization with Modern Hopfield Energy, ICLR 2023 (SHE, the simplified energy): a pattern is the mean
    feature of the training images of a class that are classified correctly. Departure: a class without such an image
    has no pattern, and an image is taken to be of the most likely class that has one.
    """
    f, h = as_matrix(logits, "logits"), as_matrix(features, "features")
    out = np.empty(len(h))
    for rows in row_blocks(len(h), max(f.shape[1], h.shape[1])):
        predicted = f[rows][:, classes].argmax(axis=1)
        out[rows] = np.einsum("nd,nd->n", h[rows], patterns[predicted], dtype=np.float64)
    return out


@register_score(
    ScoreInfo(
        "she",
        "Simplified Hopfield energy",
        "Zhang et al., OOD Detection based on In-Distribution Data Patterns Memorization, ICLR 2023",
        needs_fit=True,
        needs_features=True,
        formula="h . mean h of the right fit images of the predicted class",
        departure="the most likely of the classes that have a right fit image stands for the predicted one",
        label="SHE",
        optional=True,
    )
)
def fit_she(data: FitData) -> Scorer:
    """`she` with the mean features of the fit images that are classified correctly: of all where there are no labels,
    or no image is right."""
    predicted = given(data.logits, "logits").argmax(axis=1)
    right = predicted == data.classes()
    kept = right if right.any() else np.ones_like(right)
    patterns, _ = class_means(data.features64()[kept], predicted[kept])
    classes = np.unique(predicted[kept])

    def score(logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        f, h = given(logits, "logits"), given(features, "features", patterns.shape[1])
        if len(f) != len(h):
            raise QuantlensError(f"the logits are of {len(f)} images and the features of {len(h)}")
        return she(f, h, patterns, classes)

    return score


# ---- temperature scaling ---------------------------------------------------------------------------------------------


@register_score(
    ScoreInfo(
        "msp_temperature",
        "Maximum softmax probability after temperature scaling",
        "Guo et al., On Calibration of Modern Neural Networks, ICML 2017",
        needs_fit=True,
        needs_labels=True,
        formula="max_k softmax(f / T)_k",
        label="MSP, temperature",
        optional=True,
    )
)
def fit_msp_temperature(data: FitData) -> Scorer:
    """`msp` of logits divided by the `temperature` of the fit images."""
    f = given(data.logits, "logits")
    if data.labels is None:
        raise QuantlensError("a temperature is fitted on labelled images: give the fit images their labels")
    fitted = temperature(f, data.labels)

    def score(logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
        rows = given(logits, "logits", f.shape[1])
        return per_row(rows, lambda block: msp(block / fitted))

    return score
