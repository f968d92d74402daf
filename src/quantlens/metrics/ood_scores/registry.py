"""The scores by name. Those of quantlens are registered where they are defined; `register_score` adds any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.metrics.ood_scores.base import FitData, LogitScorer, Scorer
from quantlens.plugins import Registry

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

    Logits may be None for scores that read features alone. Raises UnknownNameError for another name;
    QuantlensError where the score needs a fit and `fit` is None; UnsupportedError where the model `fit` comes
    from has no features or no linear classifier and the score needs them.
    """
    info, score = _SCORES.get(name)
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
