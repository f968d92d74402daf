"""Measure one model: in-distribution metrics, out-of-distribution scores, and what quantization took from both.

The model sees each image once. Logits (float32 [N, K]) and features (float32 [N, D]) of the ID images are kept as numpy
arrays; of an OOD set only the scores (float64 [N]) stay once it has been measured.
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlens.ambient import isolated
from quantlens.data.shared import without_content
from quantlens.errors import QuantlensError, QuantlensWarning
from quantlens.evaluation.environment import environment
from quantlens.evaluation.images import EvaluationImages, ImageProgress, describe
from quantlens.evaluation.open_models import measurable
from quantlens.evaluation.outputs import Outputs, about_of, of_images
from quantlens.evaluation.result import Result, check_same_images, check_same_task, metrics_only, plain
from quantlens.evaluation.shift import Shifted
from quantlens.evaluation.tasks import ONE_LABEL, check_labels, embedding, feature_hits, id_metrics, same_axes, task_of
from quantlens.evaluation.zero_shot import TextEmbeddings, ZeroShot
from quantlens.export.guards import guard_metrics, looks_unknown
from quantlens.metrics import (
    FitData,
    ScoreInfo,
    Scorer,
    choose_scores,
    cosines,
    make_scorer,
    mean_over_sets,
    ood_metrics,
    score_histograms,
    similarity,
    temperature,
    temperature_metrics,
)
from quantlens.models.loading import class_names


@isolated
def evaluate(
    model: Any,
    id: Any = None,
    ood: Mapping[str, Any] | None = None,
    *,
    fit: Any = None,
    shift: Mapping[str, Any] | None = None,
    reference: Any = None,
    task: str | None = None,
    text_embeddings: Any = None,
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

    model: also a name or file (`open_models`), and what quantlens did not make (`open_foreign`); logits need no images.
    id, ood (name -> images), fit: anything that `data.as_image_set` accepts (a SOURCE string, an ImageSet, a float
        tensor [N, 3, H, W] already normalised, a pair (images, labels), of a detector (images, Boxes), or batches).
        fit: ID images, not among those evaluated, for scores, k-NN and linear probe; without it these are unavailable.
    shift: other images of the classes by name; under "corrupt" which corruptions of the ID images ("fog:3", "all:1,5").
    reference: the FP32 model, or its Result on the same images; by default a quantized model's own `.reference`, False
        leaves it out. scores: names of OOD scores (None: the usual ones). groups: OOD set -> "far" or "near".
    task: of `metrics.TASKS`; None: the model's own. text_embeddings: for "zero-shot", see `zero_shot.TextEmbeddings`.
    batch_size: images per forward pass, at most. device: by default where the model is. n_bins: of the calibration
        error. progress: called with (what, images done, in all). skip_bad: leave out what cannot be read. cache_dir: of
        decoded images; None is the user's, False none. keep: True keeps what the model gave on every image in the
        Result's `outputs`; "scores" does without the logits.
    Raises QuantlensError for labels, scores or a task that do not fit, logits that are not finite, sets that overlap.
    """
    started = time.perf_counter()
    _check_keep(keep)
    model, texts = measurable(model, device, reference=reference, images=id), TextEmbeddings.of(text_embeddings)
    task = task_of(model, task, texts is not None)
    run = _run_of(task)(batch_size, progress, n_bins, choose_scores(scores, task), task, texts)
    model = run.classifying(model)
    if isinstance(reference, str | Path) or (reference is None and model.method != "fp32"):
        reference = model.reference
    read = {"cache_dir": cache_dir, "skip_bad": skip_bad, "pixels": _looks(reference)}
    sets = EvaluationImages.open(model, id, ood, fit, groups, progress, task, shift=shift, **read)
    _check_reference(reference, sets, task)
    result = Result(
        **run.measure(model, sets, keep),
        **_facts(model),
        fit=None if sets.fit is None else {"source": sets.fit.source, "n": len(sets.fit)},
        text_embeddings=None if texts is None else texts.describe(),
        seconds=_seconds(model, started),
        extra={"foreign": plain(model.foreign)} if hasattr(model, "foreign") else {},
    )
    if reference is not None and reference is not False:
        run.compare(result, model, reference, sets, device)
    _compare_outputs(result, run)
    return result


def _run_of(task: str) -> type["Run"]:
    if task != "detect":
        return Run
    from quantlens.evaluation.detection import DetectionRun

    return DetectionRun


def _check_keep(keep: Any) -> None:
    if keep not in (True, False, "scores"):
        raise QuantlensError(f"outputs to keep are {keep!r}; write true, false, or scores (everything but the logits)")


def _check_reference(reference: Any, sets: EvaluationImages, task: str) -> None:
    """Raise QuantlensError where a Result is of other images or another task, before anything is run."""
    if isinstance(reference, Result):
        check_same_images(reference, describe(sets.id), {name: describe(images) for name, images in sets.ood.items()})
        check_same_task(reference, task)


def _looks(reference: Any) -> bool:
    """Whether an FP32 model has to see the images: neither a Result nor a file of logits does."""
    return not isinstance(reference, Result | bool | None) and not hasattr(reference, "recorded")


def _compare_outputs(result: Result, run: "Run") -> None:
    """Add how near the features (or the boxes) of a quantized model are to those of the FP32 model on the same images,
    where both were run."""
    if run.task == "detect":
        from quantlens.evaluation.detection import compare_detections

        compare_detections(result, run.found)
    if run.task != "features" or result.method == "fp32":
        return
    if len(run.embeddings) < 2:
        reason = "is taken to the FP32 model's features: give the FP32 model as `reference`, not its Result"
        result.metrics_unavailable |= dict.fromkeys(("cosine", "cosine_p5", "cka"), reason)
        return
    found = plain(similarity(*run.embeddings))
    if not run.same_axes:
        reason = (
            f"says nothing: {result.method} folded the last LayerNorm into the classifier or rotated what it reads, "
            "and this older checkpoint does not say how; quantize the model again"
        )
        result.metrics_unavailable |= dict.fromkeys(("cosine", "cosine_p5"), reason)
        found = {"cka": found["cka"]}
    result.id |= found
    if result.outputs is not None and run.same_axes:
        result.outputs.hits["cosine"] = cosines(*run.embeddings)


def _seconds(model: Any, started: float) -> dict[str, float]:
    """How long the evaluation took, and the method."""
    found = {"evaluation": time.perf_counter() - started}
    calibrating = getattr(getattr(model, "provenance", None), "seconds", None)
    return found if calibrating is None else {**found, "calibration": float(calibrating)}


def _facts(model: Any) -> dict[str, Any]:
    """What a result says of the model itself."""
    return {
        "model": model.name,
        "checkpoint_sha256": model.checkpoint_sha256,
        "method": model.method,
        "bits": model.bits,
        "seed": model.seed,
        "size_mb": model.size_mb,
        "size_ratio": model.size_ratio,
        "num_parameters": model.num_parameters,
        "options": plain(model.options),
        "calibration": plain(without_content(model.calibration)),
        "preprocess": None if model.preprocess is None else plain(model.preprocess.to_dict()),
        "environment": environment(getattr(model, "device", "cpu")),
    }


# ---- running a model -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The settings of one evaluation, and the passes over the images that it makes."""

    batch_size: int
    progress: ImageProgress | None
    n_bins: int
    scores: dict[str, ScoreInfo]
    task: str
    texts: TextEmbeddings | None = None
    embeddings: list[np.ndarray] = field(default_factory=list)
    """of the ID images, by every model measured; for the task "features" """
    found: list[Any] = field(default_factory=list)
    """the same of detections; for the task "detect" """
    same_axes: bool = True
    """whether the embeddings are comparable one by one"""
    said: dict[str, np.ndarray | None] = field(default_factory=dict)
    """an exported file's own scores [N] of the images that were measured last, by what these are"""

    def classifying(self, model: Any) -> Any:
        """A model as a classifier of the texts, where there are any."""
        return model if self.texts is None else ZeroShot(model, self.texts)

    def compare(self, result: Result, model: Any, reference: Any, sets: EvaluationImages, device: str | None) -> None:
        """Take the metrics of the FP32 model that a model was made from, or of its Result, into the model's."""
        if isinstance(reference, Result):
            result.compare(reference)
        else:
            result.take_fp32(self.fp32(model, reference, sets, device))

    def fp32(self, model: Any, reference: Any, sets: EvaluationImages, device: str | None) -> dict[str, Any]:
        """The metrics of the FP32 model that a model was made from."""
        reference = measurable(reference, device)
        _check_same_preprocess(reference, model)
        self.same_axes = same_axes(model, reference)
        moved = [name for name, info in self.scores.items() if info.needs_features]
        if not self.same_axes and self.task != "features" and moved and sets.ood and sets.fit is not None:
            warnings.warn(
                f"{model.method} folded the last LayerNorm into the classifier or rotated what it reads, and this "
                f"older checkpoint does not say how: {', '.join(moved)} see features on other axes than FP32, so that "
                "their change is not quantization's alone; quantize the model again",
                QuantlensWarning,
                stacklevel=3,
            )
        return metrics_only(self.measure(self.classifying(reference), sets))

    def measure(self, model: Any, sets: EvaluationImages, keep: bool | str = False) -> dict[str, Any]:
        """{"task", "id", "ood", "ood_mean", "histograms", "scores_unavailable", "metrics_unavailable", "guard",
        "outputs"} of a result, and what `Shifted` has of one."""
        logits, features = self.forward(model, sets.id, "the ID set")
        data = self.fit_data(model, features is not None, sets)
        metrics, images, lacking = self.of_ids(model, sets, logits, features, data, keep)
        id_part = {**describe(sets.id), **metrics}
        guard = getattr(model, "guard", None) if self.task in ONE_LABEL else None
        known, unknown = looks_unknown(guard, logits, self.said.get("the ID set")), {}
        scorers, unavailable = self.fit(model, features is not None, data) if sets.ood else ({}, {})
        id_scores = _scored(scorers, logits, features)
        del logits, features
        shifted = Shifted(id_scores)
        for name, others in sets.shifted(model):
            logits, features = self.forward(model, others, f"shifted set {name}")
            shifted.add(name, describe(others), logits, others.labels, _scored(scorers, logits, features), self.n_bins)
            del logits, features
        ood_part: dict[str, dict[str, Any]] = {}
        ood_scores = {}
        for name, others in sets.ood.items():
            logits, features = self.forward(model, others, f"OOD set {name}")
            found = _scored(scorers, logits, features)
            ood_scores[name] = found
            shifted.against(name, found, sets.groups[name])
            by_score = {score: ood_metrics(id_scores[score], values) for score, values in found.items()}
            ood_part[name] = {**describe(others), "group": sets.groups[name], **by_score}
            unknown[name] = looks_unknown(guard, logits, self.said.get(f"OOD set {name}"))
            del logits, features
        outputs = None
        if keep:
            sets_scored = ood_scores if id_scores else {}
            about = about_of(model, id_part, {name: ood_part[name] for name in sets_scored}, self.n_bins, self.task)
            names = getattr(sets.id, "names", None)
            outputs = Outputs(**images, names=names, id_scores=id_scores, ood_scores=sets_scored, about=about)
        return {
            "task": self.task,
            "id": plain(id_part),
            "ood": plain(ood_part),
            "ood_mean": plain(mean_over_sets(ood_part)),
            "histograms": {
                score: score_histograms(values, {name: found[score] for name, found in ood_scores.items()})
                for score, values in id_scores.items()
            },
            "scores_unavailable": unavailable,
            "metrics_unavailable": lacking,
            "guard": plain(guard_metrics(guard, known, unknown)),
            "outputs": shifted.within(outputs),
            **shifted.parts(),
        }

    def of_ids(
        self, model: Any, sets: EvaluationImages, logits: Any, features: Any, data: FitData | None, keep: bool | str
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        """The metrics of the ID images, the fields of `Outputs` (empty where nothing is kept), and the metrics that
        cannot be had, with the reason."""
        labels: Any = check_labels(sets.id, self.task, model.num_classes)
        if self.task != "features":
            names = class_names(sets.id, model)
            metrics = id_metrics(self.task, logits, labels, n_bins=self.n_bins, names=names)
            if data is not None and data.logits is not None and data.labels is not None:
                metrics |= temperature_metrics(logits, labels, temperature(data.logits, data.labels), self.n_bins)
            return metrics, of_images(logits, labels, keep, names) if keep else {}, {}
        self.embeddings.append(features)
        hits, lacking = feature_hits(features, labels, data)
        metrics = {"num_features": features.shape[1], **{name: float(hit.mean()) for name, hit in hits.items()}}
        return metrics, {"labels": np.full(len(features), -1) if labels is None else labels, "hits": hits}, lacking

    def fit_data(self, model: Any, features: bool, sets: EvaluationImages) -> FitData | None:
        """What the model gives on the fit images, for what is fitted on them; None where nothing is, or without any.
        features: whether it gives features."""
        images, infos = sets.fit, self.scores.values() if sets.ood else ()
        wanted = self.task == "features" or any(i.needs_fit and (features or not i.needs_features) for i in infos)
        if images is None or not (wanted or (self.task in ONE_LABEL and images.labels is not None)):
            return None
        logits, found = self.forward(model, images, "the fit set")
        if self.task in ONE_LABEL:
            labels = None if images.labels is None else check_labels(images, self.task, model.num_classes)
            return FitData(logits, found, labels, *_classifier(model))
        if self.task == "multilabel" or images.labels is None:
            return FitData(None, found)
        checked = check_labels(images, self.task, model.num_classes)
        return FitData(None, found, None if checked is None else checked.reshape(len(checked)).astype(np.int64))

    def fit(self, model: Any, features: bool, data: FitData | None) -> tuple[dict[str, Scorer], dict[str, str]]:
        """Every score that can be had on this model, fitted on its own outputs, and the others with the reason why not.
        features: whether the model gives any; data: of `fit_data`."""
        classifier = _classifier(model)
        there = {"features": features, "fit": data is not None, "classifier": bool(classifier)}
        there["labels"] = data is None or data.labels is not None
        there["classes"] = there["labels"] or (data is not None and data.logits is not None)
        lacking = {name: info.lacks(**there) for name, info in self.scores.items()}
        data = FitData(None, None, None, *classifier) if data is None and classifier else data
        scorers = {name: make_scorer(name, data) for name, reason in lacking.items() if not reason}
        return scorers, {name: reason for name, reason in lacking.items() if reason}

    def forward(self, model: Any, images: Any, what: str) -> tuple[Any, np.ndarray | None]:
        """(logits float32 [N, K], features float32 [N, D] or None) of an image set, in its order; (None, features) of a
        model without a classifier."""
        recorded = getattr(model, "recorded", None)
        whole, features = self.run(model, images, what) if recorded is None else recorded(images, what, self.task)
        bad = np.flatnonzero(~np.isfinite(whole).all(axis=1))
        if bad.size:
            given = "features" if self.task == "features" else "logits"
            raise QuantlensError(
                f"{model.name} ({model.method}, {model.bits}) gives {given} that are not finite on {bad.size} of the "
                f"{len(whole)} images of {what} ({images.source}), first on {images.names[bad[0]]}; check the weights "
                "for NaN, or use another method or more bits"
            )
        return (None, whole) if self.task == "features" else (whole, features)

    @torch.inference_mode()
    def run(self, model: Any, images: Any, what: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The same of a model that has to see the images."""
        kept: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        said: list[np.ndarray] = []
        for place, pixels in self.batches(model, images, what):
            outputs = model.outputs(pixels)
            found = embedding(model, outputs) if self.task == "features" else outputs.logits
            more = None if self.task == "features" else outputs.features
            if not place.start:
                kept = _rows(found, len(images)), _rows(more, len(images))
            for rows, values in zip(kept, (found, more), strict=True):
                if rows is not None and values is not None:
                    rows[place] = values.float().cpu().numpy()
            if getattr(outputs, "score", None) is not None:
                said.append(outputs.score.numpy())
        logits, features = kept
        self.said[what] = np.concatenate(said) if said else None
        return logits, features  # type: ignore[return-value]

    def batches(self, model: Any, images: Any, what: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which images, they themselves [B, C, H, W] where the model is), batch after batch; each is told of when the
        next is asked for."""
        done, size = 0, min(self.batch_size, getattr(model, "images_together", None) or self.batch_size)
        for pixels, _ in images.batches(batch_size=size, device=getattr(model, "device", "cpu")):
            yield slice(done, done + len(pixels)), pixels
            done += len(pixels)
            if self.progress is not None:
                self.progress(f"evaluating {what}", done, len(images))


def _classifier(model: Any) -> tuple[np.ndarray, ...]:
    """Weight [K, D] and bias [K] of a model's linear classifier; () where it shows none."""
    return tuple(t.detach().float().cpu().numpy() for t in model.classifier() or ())


def _rows(values: Any, count: int) -> np.ndarray | None:
    """Room for the rows [count, D] of all batches, of the first batch's width: a batch itself is not kept, as features
    are often a view of every token."""
    return None if values is None else np.empty((count, *values.shape[1:]), np.float32)


def _scored(scorers: Mapping[str, Scorer], logits: Any, features: np.ndarray | None) -> dict[str, np.ndarray]:
    """Every score [N] float64 of images, larger = more in-distribution, from logits [N, K] and features [N, D]."""
    found = {name: np.asarray(scorer(logits, features), dtype=np.float64) for name, scorer in scorers.items()}
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise QuantlensError(f"the OOD score {name!r} is not finite on these images; leave it out with `scores`")
    return found


def _check_same_preprocess(reference: Any, model: Any) -> None:
    first, second = (None if m.preprocess is None else m.preprocess.to_dict() for m in (reference, model))
    if first is not None and second is not None and first != second:
        raise QuantlensError(
            f"the FP32 reference {reference.name} takes other images than {model.name} (its preprocessing differs); "
            "give the model that was quantized"
        )
