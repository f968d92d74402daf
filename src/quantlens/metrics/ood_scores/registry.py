"""What a score is: what it may be fitted on, how it is called, and all of them by name. Those of quantlens are
registered where they are defined; `register_score` adds any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.metrics._arrays import Float, as_labels, as_matrix
from quantlens.plugins import Registry

Maker = TypeVar("Maker", bound=Callable[..., Any])

RANK_TOLERANCE = 1e-10
"""Directions whose variance is below this share of the largest are rounding noise of float32 features."""


@dataclass(eq=False)
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
        self.logits = as_matrix(self.logits, "fit logits")
        n, k = self.logits.shape
        if n == 0:
            raise QuantlensError("there are no fit images: give at least one ID image to fit the scores on")
        if self.features is not None:
            self.features = as_matrix(self.features, "fit features")
            if len(self.features) != n:
                raise QuantlensError(f"the fit features are of {len(self.features)} images, the fit logits of {n}")
        if self.labels is not None:
            self.labels = as_labels(self.labels, n, k)
        if self.weight is not None:
            self.weight = as_matrix(self.weight, "classifier weights").astype(np.float64)
            d = (self.weight if self.features is None else self.features).shape[1]
            if self.weight.shape != (k, d):
                raise QuantlensError(f"the classifier weight has shape {self.weight.shape}, but {(k, d)} is expected")
            self.bias = np.zeros(k) if self.bias is None else np.asarray(self.bias, dtype=np.float64)
            if self.bias.shape != (k,) or not np.isfinite(self.bias).all():
                raise QuantlensError(f"the classifier bias must be {k} finite numbers, not of shape {self.bias.shape}")

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


@dataclass(frozen=True)
class ScoreInfo:
    """What a score is called, where it comes from and what it needs.

    label: its short name in tables and plots (default: the name). needs_fit: it is fitted on ID images.
    needs_features: it reads penultimate features [N, D]. needs_classifier: it reads weight and bias of the classifier.
    departure: where it departs from its paper.
    """

    name: str
    title: str
    paper: str
    needs_fit: bool = False
    needs_features: bool = False
    needs_classifier: bool = False
    formula: str = ""
    departure: str = ""
    label: str = ""

    def lacks(self, *, features: bool, fit: bool, classifier: bool) -> str:
        """Why it cannot be had of a model that gives no features, without fit images, or of a model that shows no
        classifier; "" where it can."""
        if self.needs_features and not features:
            return "needs penultimate features, which this model lacks"
        if self.needs_fit and not fit:
            return "is fitted on ID images: give a `fit` set"
        if self.needs_classifier and not classifier:
            return "needs the weights of a linear classifier, which this model does not show"
        return ""


def register_score(info: ScoreInfo) -> Callable[[Maker], Maker]:
    """Decorator that adds a score under `info.name`; it is then measured like those of quantlens.

    What it decorates is a function of logits [N, K] -> [N], larger = more in-distribution; or, with `info.needs_fit`, a
    class whose `fit` takes `FitData`, or any function of `FitData`, that returns a `Scorer`. A name in use is replaced
    only by the same function or class, defined again. Raises QuantlensError for a name that is taken.

        @register_score(ScoreInfo("margin", "Margin of the largest logit", "ours"))
        def margin(logits): ...
    """

    def add(score: Maker) -> Maker:
        _SCORES.add((info, score), info.name, maker=score)
        return score

    return add


def _adopt(name: str, found: Any) -> None:
    """Register a function that an entry point names, as a score of the logits."""
    if name and not isinstance(found, ModuleType):
        title = (found.__doc__ or name).strip().splitlines()[0].rstrip(".")
        register_score(ScoreInfo(name, title, ""))(found)


_SCORES: Registry[tuple[ScoreInfo, Callable[..., Any]]] = Registry("OOD score", "quantlens.scores", adopt=_adopt)


def available_scores(*, own: bool = False) -> dict[str, ScoreInfo]:
    """Every score by name, in the order in which they are listed to people. own: those of quantlens alone."""
    return {name: info for name, (info, _) in _SCORES.all(own=own).items()}


def score_label(name: str) -> str:
    """What tables and plots call a score; its name where it is not known (a result may be of another program)."""
    found = _SCORES.find(name)
    return name if found is None else found[0].label or name


def make_scorer(name: str, fit: FitData | None = None) -> Scorer:
    """The score of that name, fitted where it needs it: call it as `scorer(logits [N, K], features [N, D] |
    None)`.

    Logits may be None for scores that read features alone. Raises UnknownNameError for another name, UnsupportedError
    where the score needs a fit and `fit` is None, or what the model `fit` comes from does not have.
    """
    info, score = _SCORES.get(name)
    if not info.needs_fit:
        return partial(_scored, score)
    features, classifier = fit is None or fit.features is not None, fit is None or fit.weight is not None
    lacking = info.lacks(features=features, fit=fit is not None, classifier=classifier)
    if lacking:
        raise UnsupportedError(f"the score {name!r} {lacking}")
    scorer: Scorer = getattr(score, "fit", score)(fit)
    return scorer


def _scored(score: Callable[..., ArrayLike], logits: ArrayLike | None, features: ArrayLike | None = None) -> Float:
    """A score of the logits alone, of images."""
    rows = given(logits, "logits")
    values = np.asarray(score(rows), dtype=np.float64)
    if values.shape != (len(rows),):
        raise QuantlensError(f"a score of {len(rows)} images must be {len(rows)} numbers, not {values.shape}")
    return values


def given(values: ArrayLike | None, what: str, width: int | None = None) -> np.ndarray:
    """What a score reads of the images that it is taken of; width: the number of columns that it was fitted on."""
    if values is None:
        raise QuantlensError(f"this score reads the {what} of the images, but none were given")
    matrix = as_matrix(values, what)
    if width not in (None, matrix.shape[1]):
        raise QuantlensError(
            f"the {what} have {matrix.shape[1]} columns, but the score was fitted on {width}: use one model"
        )
    return matrix
