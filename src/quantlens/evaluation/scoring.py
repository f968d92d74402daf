"""OOD scores of one model: fitted once, then taken of the ID images and of one OOD set after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.metrics import FitData, ScoreInfo, Scorer, available_scores, make_scorer, ood_metrics


def choose_scores(names: Sequence[str] | None) -> dict[str, ScoreInfo]:
    """name -> ScoreInfo of the scores asked for, in that order (None: all of quantlens' own). A score is found by its
    name, label or title; case and what stands between words do not matter. Raises UnknownNameError."""
    if names is None:
        return available_scores(own=True)
    known = available_scores()
    spellings = {_letters(text): name for name, info in known.items() for text in (info.title, info.label)}
    spellings |= {_letters(name): name for name in known}
    found = {}
    for asked in names:
        name = asked if asked in known else spellings.get(_letters(asked))
        if name is None:
            raise UnknownNameError("OOD score", str(asked), known)
        found[name] = known[name]
    return found


def _letters(text: str) -> str:
    return "".join(c for c in str(text).lower() if c.isalnum())


def why_not(info: ScoreInfo, *, features: bool, fit: bool, classifier: bool) -> str | None:
    """Why a score cannot be had of a model that lacks features, fit images or a classifier; None where it can."""
    if info.needs_features and not features:
        return "the model gives no features"
    if info.needs_fit and not fit:
        return "needs statistics of ID images: give a `fit` set"
    if info.needs_classifier and not classifier:
        return "needs the weights of the last linear layer, which the model does not show"
    return None


def fit_scores(
    scores: Mapping[str, ScoreInfo], data: FitData | None, *, features: bool, fit: bool, classifier: bool
) -> tuple[dict[str, Scorer], dict[str, str]]:
    """(scorer by name, reason by name of those that cannot be had).

    data: the model's outputs on the fit images, None without them. features, fit, classifier: what there is.
    """
    scorers: dict[str, Scorer] = {}
    unavailable: dict[str, str] = {}
    for name, info in scores.items():
        reason = why_not(info, features=features, fit=fit, classifier=classifier)
        if reason is None:
            try:
                scorers[name] = make_scorer(name, data if info.needs_fit else None)
                continue
            except QuantlensError as error:
                reason = str(error)
        unavailable[name] = reason
    return scorers, unavailable


@dataclass
class SetScores:
    """Scores [N] float64 of images, larger = more in-distribution: `id[score]` and `ood[score][set]`."""

    scorers: Mapping[str, Scorer]
    id: dict[str, np.ndarray] = field(default_factory=dict)
    ood: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def add_id(self, logits: np.ndarray, features: np.ndarray | None) -> None:
        """Score the ID images, from logits [N, K] and features [N, D]."""
        self.id = {name: _scored(scorer, name, logits, features) for name, scorer in self.scorers.items()}
        self.ood = {name: {} for name in self.scorers}

    def add(self, set_name: str, logits: np.ndarray, features: np.ndarray | None) -> dict[str, dict[str, Any]]:
        """Score an OOD set; the metrics of every score, as `metrics.ood_metrics` gives them."""
        metrics = {}
        for name, scorer in self.scorers.items():
            self.ood[name][set_name] = values = _scored(scorer, name, logits, features)
            metrics[name] = ood_metrics(self.id[name], values)
        return metrics


def _scored(scorer: Scorer, name: str, logits: np.ndarray, features: np.ndarray | None) -> np.ndarray:
    values = np.asarray(scorer(logits, features), dtype=np.float64)
    if not np.isfinite(values).all():
        raise QuantlensError(f"the OOD score {name!r} is not finite on these images; leave it out with `scores`")
    return values
