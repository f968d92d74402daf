"""Scores that say how in-distribution an image looks: larger = more in-distribution, float64 throughout.

Notation: logits f in R^K, softmax p, penultimate features h in R^D (the input of the classifier), classifier
weight W [K, D] and bias b [K], so that f = W h + b. *Fit images* are stated ID images of which the statistics
are taken; they are never the images scored, and they are run through the very model that is scored (for a
quantized model, the quantized one).

Each score is a pure function of arrays. Those that need statistics have a small fitted class on top, whose
`fit` takes `FitData` and which is called as `scorer(logits, features)`. `make_scorer` builds any score by
name; `register_score` adds one. Departures from the papers are data in `available_scores()`.
"""

# Scores are listed to people in the order of these imports.
# isort: off
from quantlens.metrics.ood_scores.registry import (
    FitData,
    ScoreInfo,
    Scorer,
    available_scores,
    choose_scores,
    energy,
    entropy,
    first_score,
    gen,
    make_scorer,
    maxlogit,
    msp,
    register_score,
    score_label,
)
from quantlens.metrics.ood_scores.features import (
    class_means,
    knn,
    l2_normalise,
    ledoit_wolf,
    mahalanobis,
    react,
    tied_covariances,
    vim,
    vim_dimension,
    vim_parameters,
    whitening,
)
from quantlens.metrics.ood_scores.classes import kl_matching, she
from quantlens.metrics.ood_scores.shaping import ash_b, ash_p, ash_s, dice, scale
from quantlens.metrics.ood_scores.labels import joint_energy, max_confidence, sigmoid_confidence
# isort: on

__all__ = [
    "FitData",
    "ScoreInfo",
    "Scorer",
    "ash_b",
    "ash_p",
    "ash_s",
    "available_scores",
    "choose_scores",
    "class_means",
    "dice",
    "energy",
    "entropy",
    "first_score",
    "gen",
    "joint_energy",
    "kl_matching",
    "knn",
    "l2_normalise",
    "ledoit_wolf",
    "mahalanobis",
    "make_scorer",
    "max_confidence",
    "maxlogit",
    "msp",
    "react",
    "register_score",
    "scale",
    "score_label",
    "she",
    "sigmoid_confidence",
    "tied_covariances",
    "vim",
    "vim_dimension",
    "vim_parameters",
    "whitening",
]
