"""The scores by name. Those of quantlens are registered where they are defined; `register_score` adds any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.metrics.ood_scores.base import FitData, LogitScorer, Scorer

Maker = TypeVar("Maker", bound=Callable[..., Any])


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


_SCORES: dict[str, tuple[ScoreInfo, Callable[..., Any]]] = {}


def register_score(info: ScoreInfo) -> Callable[[Maker], Maker]:
    """Decorator that adds a score under `info.name`; it is then measured like those of quantlens.

    What it decorates is a function of logits [N, K] -> [N], larger = more in-distribution; or, with `info.needs_fit`, a
    class whose `fit` takes `FitData`, or any function of `FitData`, that returns a `Scorer`. A name in use is replaced
    only by the same function or class, defined again. Raises QuantlensError for a name that is taken.

        @register_score(ScoreInfo("margin", "Margin of the largest logit", "ours"))
        def margin(logits): ...
    """

    def add(score: Maker) -> Maker:
        known = _SCORES.get(info.name, (None, score))[1]
        if _address(known) != _address(score):
            raise QuantlensError(f"the OOD score name {info.name!r} is taken by {_address(known)}; give another one")
        _SCORES[info.name] = (info, score)
        return score

    return add


def _address(score: Callable[..., Any]) -> str:
    return f"{getattr(score, '__module__', '')}.{getattr(score, '__qualname__', repr(score))}"


def available_scores() -> dict[str, ScoreInfo]:
    """Every score by name, in the order in which they are listed to people."""
    return {name: info for name, (info, _) in _SCORES.items()}


def score_label(name: str) -> str:
    """What tables and plots call a score; its name where it is not known (a result may be of another program)."""
    info = available_scores().get(name)
    return name if info is None else info.label or name


def make_scorer(name: str, fit: FitData | None = None) -> Scorer:
    """The score of that name, fitted where it needs it: call it as `scorer(logits [N, K], features [N, D] |
    None)`.

    Logits may be None for scores that read features alone. Raises UnknownNameError for another name;
    QuantlensError where the score needs a fit and `fit` is None; UnsupportedError where the model `fit` comes
    from has no features or no linear classifier and the score needs them.
    """
    if name not in _SCORES:
        raise UnknownNameError("OOD score", name, _SCORES)
    info, score = _SCORES[name]
    if not info.needs_fit:
        return LogitScorer(score)
    if fit is None:
        raise QuantlensError(f"the score {name!r} is fitted on ID images, but none were given: name some for it")
    if info.needs_features and fit.features is None:
        raise UnsupportedError(f"the score {name!r} needs penultimate features, which this model lacks: leave it out")
    if info.needs_classifier and fit.weight is None:
        raise UnsupportedError(f"the score {name!r} needs a linear classifier, which this model lacks: leave it out")
    scorer: Scorer = getattr(score, "fit", score)(fit)
    return scorer
