"""Measure one model: in-distribution figures, out-of-distribution scores, and what quantization took from both.

The model sees each image once. Logits (float32 [N, K]) and features (float32 [N, D]) of the ID images are kept as numpy
arrays; of an OOD set only the scores (float64 [N]) stay once it has been measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.evaluation.images import (
    ImageProgress,
    check_labels,
    describe,
    groups_of,
    image_set,
    refuse_overlap,
    source_name,
)
from quantlens.evaluation.outputs import check_keep, gather, of_images
from quantlens.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from quantlens.evaluation.outputs import Outputs

ID_FIGURES = ("top1", "top5", "nll", "ece", "ece_adaptive", "brier")
OOD_FIGURES = ("aupr_out", "aupr_in", "auroc", "fpr95_id", "fpr95_ood")
NOT_STORED = frozenset({"extra", "outputs"})
"""Fields of a Result that are no keys of its dictionary."""


@dataclass
class Result:
    """Everything measured on one model; all rates are fractions. `to_dict()` is the stable form (see the README)."""

    model: str
    checkpoint_sha256: str | None
    method: str
    bits: str
    seed: int
    size_mb: float | None
    size_ratio: float | None
    num_parameters: int | None
    options: dict[str, Any]
    calibration: dict[str, Any] | None
    preprocess: dict[str, Any] | None
    environment: dict[str, Any]
    id: dict[str, Any]
    fit: dict[str, Any] | None = None
    ood: dict[str, dict[str, Any]] = field(default_factory=dict)
    ood_mean: dict[str, dict[str, Any]] = field(default_factory=dict)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores_unavailable: dict[str, str] = field(default_factory=dict)
    fp32: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    """How often the guard of an exported file is right (`deploy.guard.guard_figures`); None without one."""
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of a newer quantlens, kept as they are."""
    outputs: Outputs | None = field(default=None, repr=False, compare=False)
    """What the model gave on every image, where it was asked for; no part of `to_dict()`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data that is valid JSON: numbers are Python's, and a figure that is not finite is null."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in NOT_STORED]
        return plain({**self.extra, **{name: getattr(self, name) for name in names}})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`. Raises QuantlensError when a key that every result has is missing."""
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in NOT_STORED}
        known = {k: v for k, v in data.items() if k in fields}
        try:
            return cls(**known, extra={k: v for k, v in data.items() if k not in fields})
        except TypeError as error:
            missing = sorted(
                name
                for name, f in fields.items()
                if name not in known and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            )
            raise QuantlensError(f"this is no result of quantlens: it lacks {', '.join(missing) or error}") from None

    def compare(self, reference: Result) -> None:
        """Set `fp32` and `delta` from the FP32 Result on the same images. Raises QuantlensError for one of other
        images, or of a quantized model."""
        _check_same_images(reference, self.id, self.ood)
        self._compare(reference.to_dict())

    def _compare(self, reference: Mapping[str, Any]) -> None:
        from quantlens.metrics import delta

        own = {"id": self.id, "ood": self.ood, "ood_mean": self.ood_mean}
        self.fp32 = figures_only(reference)
        self.delta = delta(self.fp32, figures_only(own))

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON; the file is there whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _tables(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, no_color=True, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def evaluate(
    model: Any,
    id: Any,
    ood: Mapping[str, Any] | None = None,
    *,
    fit: Any = None,
    reference: Any = None,
    scores: Sequence[str] | None = None,
    groups: Mapping[str, str] | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: ImageProgress | None = None,
    n_bins: int = 15,
    skip_bad: bool = False,
    cache_dir: Any = None,
    keep: bool | str = False,
) -> Result:
    """Measure a model on labelled ID images and on OOD sets.

    model: an FP32 model of `load_model` or a quantized one.
    id: labelled images; with each of `ood` (name -> images) anything that `data.as_image_set` accepts: a SOURCE string,
        an ImageSet, a float tensor [N, 3, H, W] already normalised, a pair (images, labels), or batches of either.
    fit: ID images, not among those evaluated, from which scores that need statistics learn them, on the features of
        this very model. Without it those scores are left out and named in `scores_unavailable`.
    reference: the FP32 model, or its Result on the same images; gives `fp32` and `delta`. A quantized model's own
        `.reference` is used when there is one; False leaves it out.
    scores: names of OOD scores, by default all of quantlens' own (`metrics.available_scores`).
    groups: OOD set name -> "far" or "near"; far by default. The means of the groups are reported apart.
    batch_size: images per forward pass, at most; on a CPU fewer (`QuantizedModel.images_together`).
    device: where to run; by default where the model is.
    progress: called with (what, images done, images in all).
    n_bins: bins of the calibration error. skip_bad: leave out images that cannot be read, and count them.
    cache_dir: place of the decoded-image cache; None is the user's, False none.
    keep: True keeps what the model gave on every image in the Result's `outputs`; "scores" does without the logits.

    Raises QuantlensError when the labels do not match the classes, the logits are not finite, sets overlap that must
    not, or a name is unknown.
    """
    started = time.perf_counter()
    model = measurable(model)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise QuantlensError(f"batch_size is {batch_size!r}; give a whole number of at least 1")
    if device is not None:
        from quantlens.evaluation.environment import choose_device

        model.to(choose_device(device))
    chosen = choose_scores(scores)
    keep = check_keep(keep)

    sets = _Sets.open(model, id, ood, fit, groups, cache_dir=cache_dir, skip_bad=skip_bad, progress=progress)
    quantized = str(model.method) != "fp32"
    if reference is None and quantized:
        reference = getattr(model, "reference", None)
    if isinstance(reference, Result):
        _check_same_images(reference, describe(sets.id), {name: describe(images) for name, images in sets.ood.items()})

    run = _Run(batch_size, progress, n_bins, chosen)
    measured = run.measure(model, sets, keep)
    own_seconds = time.perf_counter() - started

    baseline: Mapping[str, Any] | None = None
    if isinstance(reference, Result):
        baseline = reference.to_dict()
    elif reference is not None and reference is not False:
        reference = measurable(reference)
        if device is not None:
            reference.to(choose_device(device))
        _check_same_preprocess(reference, model)
        baseline = run.measure(reference, sets)

    from quantlens.evaluation.environment import environment

    calibration = getattr(model, "calibration", None) if quantized else None
    seconds = {"evaluation": own_seconds}
    calibrating = getattr(getattr(model, "plan", None), "info", {}).get("seconds")
    if isinstance(calibrating, int | float):
        seconds["calibration"] = float(calibrating)
    result = Result(
        model=str(model.name),
        checkpoint_sha256=model.checkpoint_sha256,
        method=str(model.method),
        bits=str(model.bits),
        seed=int(model.seed or 0),
        size_mb=model.size_mb,
        size_ratio=model.size_ratio,
        num_parameters=_num_parameters(model),
        options=plain(dict(getattr(model, "options", None) or {})),
        calibration=plain(dict(calibration)) if calibration else None,
        preprocess=None if model.preprocess is None else plain(model.preprocess.to_dict()),
        environment=environment(device_of(model)),
        fit=None if sets.fit is None else {"source": source_name(sets.fit), "n": len(sets.fit)},
        seconds=seconds,
        **measured,
    )
    if baseline is not None:
        result._compare(baseline)
    return result


@dataclass(frozen=True)
class _Sets:
    """The images of one evaluation, opened and checked: ID images with their labels, OOD sets with their groups."""

    id: Any
    labels: np.ndarray
    ood: dict[str, Any]
    fit: Any
    groups: dict[str, str]

    @classmethod
    def open(
        cls,
        model: Any,
        id: Any,
        ood: Mapping[str, Any] | None,
        fit: Any,
        groups: Mapping[str, str] | None,
        **reading: Any,
    ) -> _Sets:
        """Raises QuantlensError for an empty set, labels that do not match, or a fit set among those evaluated."""

        def opened(value: Any, name: str) -> Any:
            images = image_set(value, model.preprocess, name, **reading)
            if len(images) == 0:
                raise QuantlensError(f"there are no images in {name} ({source_name(images)})")
            return images

        id_images = opened(id, "the ID set")
        labels = check_labels(id_images, int(model.num_classes), str(model.name))
        ood_images = {str(name): opened(value, f"OOD set {name}") for name, value in (ood or {}).items()}
        fit_images = None if fit is None else opened(fit, "the fit set")
        if fit_images is not None:
            refuse_overlap(fit_images, "the fit set", id_images, "the ID set")
            for name, images in ood_images.items():
                refuse_overlap(fit_images, "the fit set", images, f"OOD set {name}")
        return cls(id_images, labels, ood_images, fit_images, groups_of(ood_images, groups))


# ---- running a model -------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """The settings of one evaluation, and the passes over the images that it makes."""

    batch_size: int
    progress: ImageProgress | None
    n_bins: int
    scores: dict[str, Any]

    def measure(self, model: Any, sets: _Sets, keep: bool | str = False) -> dict[str, Any]:
        """{"id", "ood", "ood_mean", "histograms", "scores_unavailable", "guard", "outputs"} of a result."""
        from quantlens.export.threshold import guard_figures, looks_unknown
        from quantlens.metrics import classification_figures, mean_over_sets, ood_figures, score_histograms

        logits, features = self.outputs(model, sets.id, "the ID set")
        if logits.shape[1] != int(model.num_classes):
            raise QuantlensError(
                f"{model.name} gives {logits.shape[1]} logits but says it has {model.num_classes} classes; "
                "load it with the right number of classes"
            )
        figures = classification_figures(
            logits, sets.labels, n_bins=self.n_bins, class_names=class_names(sets.id, model)
        )
        id_part = {**describe(sets.id), "num_classes": int(model.num_classes), **figures}
        images = of_images(logits, sets.labels, keep) if keep else None
        guard = getattr(model, "guard", None)
        known, unknown = looks_unknown(guard, logits), {}

        scorers: dict[str, Callable[..., np.ndarray]] = {}
        unavailable: dict[str, str] = {}
        id_scores: dict[str, np.ndarray] = {}
        if sets.ood:
            scorers, unavailable = self.scorers(model, features, sets.fit)
            id_scores = {name: self.scored(scorer, name, logits, features) for name, scorer in scorers.items()}
        del logits, features

        ood_part: dict[str, dict[str, Any]] = {}
        ood_scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in scorers}
        for set_name, others in sets.ood.items():
            logits, features = self.outputs(model, others, f"OOD set {set_name}")
            entry: dict[str, Any] = {**describe(others), "group": sets.groups[set_name]}
            for name, scorer in scorers.items():
                values = self.scored(scorer, name, logits, features)
                ood_scores[name][set_name] = values
                entry[name] = ood_figures(id_scores[name], values)
            ood_part[set_name] = entry
            unknown[set_name] = looks_unknown(guard, logits)
            del logits, features
        return {
            "id": plain(id_part),
            "ood": plain(ood_part),
            "ood_mean": plain(mean_over_sets(ood_part)) if ood_part else {},
            "histograms": {name: score_histograms(id_scores[name], ood_scores[name]) for name in scorers},
            "scores_unavailable": unavailable,
            "guard": plain(guard_figures(guard, known, unknown)),
            "outputs": images and gather(model, images, id_scores, ood_scores, id_part, ood_part, self.n_bins),
        }

    def outputs(self, model: Any, images: Any, what: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(logits float32 [N, K], features float32 [N, D] or None) of an image set, in its order."""
        import torch

        device = device_of(model)
        n = len(images)
        logits: np.ndarray | None = None
        features: np.ndarray | None = None
        start = 0
        size = min(self.batch_size, getattr(model, "images_together", None) or self.batch_size)
        with torch.inference_mode():
            for batch in images.batches(batch_size=size, device=device):
                pixels = batch[0] if isinstance(batch, tuple | list) else batch
                outputs = model.outputs(pixels)
                rows = outputs.logits.float().cpu().numpy()
                if logits is None:
                    logits = np.empty((n, rows.shape[1]), np.float32)
                    if outputs.features is not None:
                        features = np.empty((n, outputs.features.shape[1]), np.float32)
                stop = start + len(rows)
                logits[start:stop] = rows
                if features is not None:
                    features[start:stop] = outputs.features.float().cpu().numpy()
                start = stop
                if self.progress is not None:
                    self.progress(f"evaluating {what}", start, n)
        if logits is None or start != n:
            raise QuantlensError(
                f"{what} ({source_name(images)}) says it has {n} images but gave {start}; load it again"
            )
        bad = ~np.isfinite(logits).all(axis=1)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise QuantlensError(
                f"{model.name} ({model.method}, {model.bits}) gives logits that are not finite on {int(bad.sum())} of "
                f"the {n} images of {what} ({source_name(images)}), first on {_image_name(images, first)}; check the "
                "weights for NaN, or use another method or more bits"
            )
        return logits, features

    def scorers(
        self, model: Any, features: np.ndarray | None, fit_images: Any
    ) -> tuple[dict[str, Callable[..., np.ndarray]], dict[str, str]]:
        """Fit every score that can be had on this model; the others with the reason why not."""
        from quantlens.metrics import FitData, make_scorer

        classifier = model.classifier()
        scorers: dict[str, Callable[..., np.ndarray]] = {}
        unavailable: dict[str, str] = {}
        data: Any = None
        learnt = [name for name, info in self.scores.items() if info.needs_fit]
        if learnt and fit_images is not None and features is not None:
            fit_logits, fit_features = self.outputs(model, fit_images, "the fit set")
            labels = None
            if fit_images.labels is not None:
                labels = check_labels(fit_images, int(model.num_classes), str(model.name), "the fit set")
            weight, bias = (None, None) if classifier is None else map(_array, classifier)
            data = FitData(logits=fit_logits, features=fit_features, labels=labels, weight=weight, bias=bias)
        for name, info in self.scores.items():
            reason = None
            if info.needs_features and features is None:
                reason = "the model gives no features"
            elif info.needs_fit and fit_images is None:
                reason = "needs statistics of ID images: give a `fit` set"
            elif info.needs_classifier and classifier is None:
                reason = "needs the weights of the last linear layer, which the model does not show"
            if reason is None:
                try:
                    scorers[name] = make_scorer(name, data if info.needs_fit else None)
                    continue
                except QuantlensError as error:
                    reason = str(error)
            unavailable[name] = reason
        return scorers, unavailable

    @staticmethod
    def scored(
        scorer: Callable[..., np.ndarray], name: str, logits: np.ndarray, features: np.ndarray | None
    ) -> np.ndarray:
        """float64 [N] scores; larger is more in-distribution."""
        values = np.asarray(scorer(logits, features), dtype=np.float64)
        if not np.isfinite(values).all():
            raise QuantlensError(f"the OOD score {name!r} is not finite on these images; leave it out with `scores`")
        return values


# ---- parts of a result -----------------------------------------------------------------------------------------------


def choose_scores(names: Sequence[str] | None) -> dict[str, Any]:
    """name -> ScoreInfo of the scores asked for, in that order (None: all of quantlens' own)."""
    from quantlens.metrics import available_scores

    if names is None:
        return available_scores(own=True)
    known = available_scores()
    for name in names:
        if name not in known:
            raise UnknownNameError("OOD score", str(name), known)
    return {name: known[name] for name in names}


def figures_only(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that a quantization delta is taken of: {"id", "ood", "ood_mean"}, no counts, no tables."""

    def chosen(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {figure: entry[figure] for figure in OOD_FIGURES if figure in entry}

    def by_score(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {score: chosen(value) for score, value in entry.items() if isinstance(value, Mapping)}

    return {
        "id": {figure: result["id"][figure] for figure in ID_FIGURES if figure in result["id"]},
        "ood": {name: by_score(entry) for name, entry in result["ood"].items()},
        "ood_mean": {group: by_score(entry) for group, entry in result["ood_mean"].items()},
    }


# ---- checks ----------------------------------------------------------------------------------------------------------


def measurable(model: Any) -> Any:
    """A model that shows logits and features: as it is, or the FP32 model as a graph without quantizers."""
    if callable(getattr(model, "outputs", None)):
        return model
    if hasattr(model, "preprocess") and hasattr(model, "checkpoint_sha256"):
        from quantlens.qmodel import float_model

        return float_model(model)
    raise QuantlensError(
        f"evaluate takes a model of quantlens.load_model or quantlens.quantize, not {type(model).__name__}; "
        "load_model also takes your own nn.Module"
    )


def _check_same_images(reference: Result, id_part: Mapping[str, Any], ood_part: Mapping[str, Any]) -> None:
    """A reference Result must have been measured on the very images of this evaluation, here as `describe` has them."""
    if reference.method != "fp32":
        raise QuantlensError(
            f"the reference is a result of {reference.method} at {reference.bits}; give the result of the FP32 model"
        )
    if reference.id.get("fingerprint") != id_part.get("fingerprint"):
        raise QuantlensError(
            f"the reference was measured on other ID images ({reference.id.get('source')}) than "
            f"{id_part.get('source')}; measure the FP32 model on the same images"
        )
    for name, part in ood_part.items():
        if reference.ood.get(name, {}).get("fingerprint") != part.get("fingerprint"):
            raise QuantlensError(
                f"the reference was not measured on the images of OOD set {name} ({part.get('source')}); measure the "
                "FP32 model on the same images"
            )


def _check_same_preprocess(reference: Any, model: Any) -> None:
    first, second = (None if m.preprocess is None else m.preprocess.to_dict() for m in (reference, model))
    if first is not None and second is not None and first != second:
        raise QuantlensError(
            f"the FP32 reference {reference.name} takes other images than {model.name} (its preprocessing differs); "
            "give the model that was quantized"
        )


# ---- small things ----------------------------------------------------------------------------------------------------


def device_of(model: Any) -> Any:
    """The device a model is on."""
    device = getattr(model, "device", None)
    if device is not None:
        return device
    tensors = getattr(getattr(model, "graph", None), "tensors", None)
    if callable(tensors):
        return next((t.device for t in tensors().values()), "cpu")
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return "cpu" if first is None else first.device


def plain(value: Any) -> Any:
    """Nested dicts, lists, strings and finite Python numbers; numpy values are unpacked, NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def class_names(images: Any, model: Any) -> Sequence[str] | None:
    """The names of the model's classes, from the images or from the model, where one of them knows all."""
    for holder in (images, model):
        names = getattr(holder, "class_names", None)
        if names is not None and len(names) == int(model.num_classes):
            return list(names)
    return None


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)


def _num_parameters(model: Any) -> int | None:
    own = getattr(model, "num_parameters", None)
    if own is not None:
        return int(own() if callable(own) else own)
    parameters = getattr(model, "parameters", None)
    return sum(p.numel() for p in parameters()) if callable(parameters) else None


def _image_name(images: Any, index: int) -> str:
    names = getattr(images, "names", None)
    if names is None:
        names = getattr(images, "paths", None)
    return f"image {index}" if names is None else str(names[index])


def _tables(result: Result) -> list[Any]:
    """The summary that a terminal shows: percent, with the FP32 figure and the delta where they are known."""
    from rich.table import Table
    from rich.text import Text

    size = "" if result.size_mb is None else f", {result.size_mb:.2f} MB"
    ratio = "" if result.size_ratio is None or result.method == "fp32" else f" ({result.size_ratio:.3f} of FP32)"
    seed = "" if result.method == "fp32" else f", seed {result.seed}"
    method = "" if result.method == "fp32" else f" {result.method}"
    skipped = f", {result.id['skipped']} skipped" if result.id.get("skipped") else ""
    head = Text(f"{result.model}{method} {result.bits}{seed}{size}{ratio}")
    images = Text(f"ID {result.id.get('source')}: {result.id.get('n')} images{skipped}")

    compared = result.fp32 is not None
    first = Table(title="In distribution", title_justify="left")
    first.add_column("figure")
    for name in ("value", "FP32", "delta") if compared else ("value",):
        first.add_column(name, justify="right")
    for figure, title, percent in (
        ("top1", "top-1 %", True),
        ("top5", "top-5 %", True),
        ("nll", "NLL", False),
        ("ece", "ECE %", True),
        ("ece_adaptive", "adaptive ECE %", True),
        ("brier", "Brier", False),
    ):
        if figure in result.id:
            values = [result.id[figure]]
            if compared:
                values += [(result.fp32 or {})["id"].get(figure), (result.delta or {}).get("id", {}).get(figure)]
            first.add_row(title, *(_number(v, percent) for v in values))
    parts: list[Any] = [head, images, first]
    if not result.ood:
        return parts if result.guard is None else [*parts, _guard_table(result.guard)]

    second = Table(title="Out of distribution, AUPR-out % by score", title_justify="left")
    second.add_column("score")
    columns = [(name, result.ood[name]) for name in result.ood]
    columns += [(f"mean {g}", result.ood_mean[g]) for g in ("far", "near") if g in result.ood_mean]
    for name, _ in columns:
        second.add_column(name, justify="right")
    scores = list(result.histograms) or [k for k, v in next(iter(result.ood.values())).items() if isinstance(v, dict)]
    for score in scores:
        second.add_row(score, *(_number(entry.get(score, {}).get("aupr_out"), True) for _, entry in columns))
    if scores:
        second.add_row(
            "chance", *(_number(entry.get(scores[0], {}).get("chance_aupr_out"), True) for _, entry in columns)
        )
    parts.append(second)
    if compared and scores and "msp" in scores:
        third = Table(title="Quantization delta of AUPR-out by MSP, points", title_justify="left")
        deltas = (result.delta or {}).get("ood", {})
        for name in deltas:
            third.add_column(name, justify="right")
        third.add_row(*(_number(deltas[name].get("msp", {}).get("aupr_out"), True) for name in deltas))
        parts.append(third)
    if result.guard is not None:
        parts.append(_guard_table(result.guard))
    if result.scores_unavailable:
        reasons: dict[str, list[str]] = {}
        for name, reason in result.scores_unavailable.items():
            reasons.setdefault(reason, []).append(name)
        parts += [Text(f"left out: {', '.join(names)} ({reason})") for reason, names in reasons.items()]
    return parts


def _guard_table(guard: Mapping[str, Any]) -> Any:
    """What the guard keeps and flags, and how often it is right."""
    from rich.table import Table

    title = f"Guard: {guard['score']} below {guard['threshold']['value']:.3f} looks unknown"
    table = Table(title=title, title_justify="left")
    table.add_column("images")
    for name in ("looks known %", "looks unknown %", "balanced accuracy %"):
        table.add_column(name, justify="right")
    kept = guard["id"]["kept"]
    table.add_row("ID", _number(kept, True), _number(1 - kept, True), "–")
    for name, entry in guard["ood"].items():
        flagged, right = entry["flagged"], entry["balanced_accuracy"]
        table.add_row(name, *(_number(v, True) for v in (1 - flagged, flagged, right)))
    return table


def _number(value: Any, percent: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if percent else f"{value:.3f}"
