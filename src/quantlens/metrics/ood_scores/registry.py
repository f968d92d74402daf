"""What a score is: what it may be fitted on, how it is called, and all of them by name. Those of quantlens are
registered where they are defined, those of the logits alone here; `register_score` adds any other."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from quantlens.errors import QuantlensError, QuantlensWarning, UnknownNameError, UnsupportedError
from quantlens.metrics._arrays import Float, as_labels, as_matrix, log_softmax, per_row
from quantlens.plugins import Registry

Maker = TypeVar("Maker", bound=Callable[..., Any])

ONE_LABEL = ("classify", "zero-shot")
SIGMOID = ("binary", "multilabel")
EVERY_TASK = (*ONE_LABEL, *SIGMOID, "features")

RANK_TOLERANCE = 1e-10
"""Directions whose variance is below this share of the largest are rounding noise of float32 features."""


@dataclass(eq=False)
class FitData:
    """Outputs of the model on stated ID images, and its classifier: all that a score may be fitted on.

    logits [N, K] (None of a model without a classifier), features [N, D] or None, labels [N] (class numbers 0..K-1) or
    None, weight [K, D] and bias [K] of the classifier or None (a weight without a bias has bias 0). Where labels are
    None the predicted classes stand in for them, without logits one class. Raises QuantlensError: no image, shapes
    that do not belong together, values that are not finite, labels outside 0..K-1.
    """

    logits: np.ndarray | None
    features: np.ndarray | None = None
    labels: np.ndarray | None = None
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.logits is not None:
            self.logits = as_matrix(self.logits, "fit logits")
            n, k = self.logits.shape
        elif self.has_images:
            n = len(np.asarray(self.features))
            k = int(np.max(self.labels, initial=0)) + 1 if self.labels is not None else 1
        else:
            n, k = 0, len(np.asarray(self.weight))
        if n == 0 and self.has_images:
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

    @property
    def has_images(self) -> bool:
        """Whether it is more than a classifier."""
        return self.logits is not None or self.features is not None or self.weight is None

    def classes(self) -> np.ndarray:
        """Labels [N], or the predicted classes where there are none; all 0 without logits."""
        if self.labels is not None:
            return self.labels
        return np.zeros(len(self.features64()), np.int64) if self.logits is None else self.logits.argmax(axis=1)

    def features64(self) -> Float:
        """Features [N, D] in float64, for scores that need them."""
        return np.asarray(self.features, dtype=np.float64)

    def classifier(self) -> tuple[Float, Float]:
        """Weight [K, D] and bias [K], for scores that need them."""
        return np.asarray(self.weight), np.asarray(self.bias)


class Scorer(Protocol):
    """A fitted score: (logits [N, K], features [N, D] or None) -> [N], larger = more in-distribution."""

    def __call__(self, logits: ArrayLike | None, features: ArrayLike | None = None) -> Float: ...


@dataclass(frozen=True)
class ScoreInfo:
    """What a score is called, where it comes from and what it needs.

    label: its short name in tables and plots (default: the name). needs_fit: it is fitted on ID images.
    needs_features: it reads penultimate features [N, D]. needs_classifier: it reads weight and bias of the classifier.
    departure: where it departs from its paper. tasks: those that it fits ("classify", "zero-shot", "binary",
    "multilabel", "features"); by default one label of several, as a softmax has it. needs_classes: and images of
    several classes to be fitted on; needs_labels: and labels of them. optional: measured only where asked for by name,
    and then caution is said.
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
    tasks: tuple[str, ...] = ONE_LABEL
    needs_classes: bool = False
    needs_labels: bool = False
    optional: bool = False
    caution: str = ""

    def lacks(self, *, features: bool, fit: bool, classifier: bool, classes: bool = True, labels: bool = True) -> str:
        """Why it cannot be had of a model that gives no features, without fit images, of a model that shows no
        classifier, or without classes or labels of the fit images; "" where it can."""
        if self.needs_features and not features:
            return "needs penultimate features, which this model lacks"
        if self.needs_fit and not fit:
            return "is fitted on ID images: give a `fit` set"
        if self.needs_classifier and not classifier:
            return "needs the weights of a linear classifier, which this model does not show"
        if self.needs_classes and not classes:
            return "needs classes: give a `fit` set with one label per image"
        if self.needs_labels and not labels:
            return "is fitted on labels: give a `fit` set with one label per image"
        return ""


def register_score(info: ScoreInfo) -> Callable[[Maker], Maker]:
    """Decorator that adds a score under `info.name`; it is then measured like those of quantlens.

    What it decorates is a function of logits [N, K] -> [N], larger = more in-distribution; or, with `info.needs_fit`
    or `info.needs_classifier`, a class whose `fit` takes `FitData`, or any function of `FitData`, that returns a
    `Scorer`. A name in use is replaced
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


def choose_scores(names: Sequence[str] | None, task: str | None = None) -> dict[str, ScoreInfo]:
    """name -> ScoreInfo of the scores asked for, in that order (None: all of quantlens' own that fit the task, but for
    the optional ones). A score is found by its name, label or title; case and what stands between words do not matter.
    Warns where a score asks for caution. Raises UnknownNameError, and UnsupportedError for one that does not fit the
    task (None: any task)."""
    if names is None:
        own = {name: info for name, info in available_scores(own=True).items() if not info.optional}
        return {name: info for name, info in own.items() if task is None or task in info.tasks}
    known = available_scores()
    spellings = {_letters(text): name for name, info in known.items() for text in (info.title, info.label)}
    spellings |= {_letters(name): name for name in known}
    found = {}
    for asked in names:
        name = asked if asked in known else spellings.get(_letters(asked))
        if name is None:
            raise UnknownNameError("OOD score", str(asked), known)
        if task is not None and task not in known[name].tasks:
            fitting = ", ".join(k for k, info in known.items() if task in info.tasks)
            raise UnsupportedError(
                f"the OOD score {name} does not fit the task {task!r}: it is for {', '.join(known[name].tasks)}; "
                f"scores for {task!r} are {fitting}"
            )
        found[name] = known[name]
    for caution in dict.fromkeys(info.caution for info in found.values() if info.caution):
        warned = ", ".join(name for name, info in found.items() if info.caution == caution)
        warnings.warn(f"{warned}: {caution}", QuantlensWarning, stacklevel=2)
    return found


def _letters(text: str) -> str:
    return "".join(c for c in str(text).lower() if c.isalnum())


def score_label(name: str) -> str:
    """What tables and plots call a score; its name where it is not known (a result may be of another program)."""
    found = _SCORES.find(name)
    return name if found is None else found[0].label or name


def first_score(names: Iterable[str]) -> str:
    """Which of several scores stands for all where one is shown: MSP, of detectors the largest confidence, else the
    first that asks for no caution, else the first; "msp" of none."""
    known = list(names)
    infos = {name: _SCORES.find(name) for name in known}
    plain = (name for name, found in infos.items() if found is None or not found[0].caution)
    usual = (name for name in ("msp", "max_confidence") if name in known)
    return next((name for some in (usual, plain, known) for name in some), "msp")


def make_scorer(name: str, fit: FitData | None = None) -> Scorer:
    """The score of that name, fitted where it needs it: call it as `scorer(logits [N, K], features [N, D] |
    None)`.

    Logits may be None for scores that read features alone. Raises UnknownNameError for another name, UnsupportedError
    where the score needs a fit and `fit` is None, or what the model `fit` comes from does not have.
    """
    info, score = _SCORES.get(name)
    if not (info.needs_fit or info.needs_classifier):
        return partial(_scored, score)
    images = fit if fit is not None and fit.has_images else None
    lacking = info.lacks(
        features=images is None or images.features is not None,
        fit=images is not None,
        classifier=info.needs_fit if fit is None else fit.weight is not None,
        labels=images is None or images.labels is not None,
    )
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


# ---- scores of the logits alone --------------------------------------------------------------------------------------


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
        tasks=(*ONE_LABEL, "multilabel"),
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
