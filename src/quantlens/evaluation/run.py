"""Measure one model: in-distribution metrics, out-of-distribution scores, and what quantization took from both.

The model sees each image once. Logits (float32 [N, K]) and features (float32 [N, D]) of the ID images are kept as numpy
arrays; of an OOD set only the scores (float64 [N]) stay once it has been measured.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlens.ambient import isolated
from quantlens.data.shared import without_content
from quantlens.errors import QuantlensError
from quantlens.evaluation.environment import environment
from quantlens.evaluation.images import EvaluationImages, ImageProgress, describe
from quantlens.evaluation.open_models import measurable
from quantlens.evaluation.outputs import Outputs, about_of, of_images
from quantlens.evaluation.result import Result, check_same_images, metrics_only, plain
from quantlens.export.export import guard_metrics, looks_unknown
from quantlens.metrics import (
    FitData,
    ScoreInfo,
    Scorer,
    choose_scores,
    classification_metrics,
    make_scorer,
    mean_over_sets,
    ood_metrics,
    score_histograms,
)
from quantlens.models import class_names


@isolated
def evaluate(
    model: Any,
    id: Any = None,
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

    model: of `load_model` or `quantize`, a name or file as `open_models` takes them, or what quantlens did not make, as
        it is (`open_foreign`): another tool's .onnx or .xml, a module quantized by torchao, a callable, or a file of
        logits (.npz, .csv), which needs no images.

    id, ood (name -> images), fit: anything that `data.as_image_set` accepts (a SOURCE string, an ImageSet, a float
        tensor [N, 3, H, W] already normalised, a pair (images, labels), or batches of either). fit: ID images, not
        among those evaluated, for scores that need statistics; without it these are named in `scores_unavailable`.
    reference: the FP32 model, or its Result on the same images; by default a quantized model's own `.reference`, False
        leaves it out. scores: names of OOD scores (None: quantlens' own). groups: OOD set -> "far" (default) or "near".
    batch_size: images per forward pass, at most. device: by default where the model is. n_bins: of the calibration
        error. progress: called with (what, images done, images in all). skip_bad: leave out images that cannot be
        read. cache_dir: of decoded images; None is the user's, False none. keep: True keeps what the model gave on
        every image in the Result's `outputs`; "scores" does without the logits.
    Raises QuantlensError for labels that do not match, logits that are not finite, sets that overlap, unknown names.
    """
    started = time.perf_counter()
    if keep not in (True, False, "scores"):
        raise QuantlensError(f"outputs to keep are {keep!r}; write true, false, or scores (everything but the logits)")
    model = measurable(model, device, reference=reference)
    if isinstance(reference, str | Path):
        reference = model.reference
    run = _Run(batch_size, progress, n_bins, choose_scores(scores))
    if reference is None and model.method != "fp32":
        reference = model.reference
    pixels = reference is not None and not isinstance(reference, Result | bool) and not hasattr(reference, "recorded")
    reading = {"pixels": pixels, "cache_dir": cache_dir, "skip_bad": skip_bad}
    sets = EvaluationImages.open(model, id, ood, fit, groups, progress, **reading)
    if isinstance(reference, Result):
        check_same_images(reference, describe(sets.id), {name: describe(images) for name, images in sets.ood.items()})
    measured = run.measure(model, sets, keep)
    result = Result(
        **_facts(model),
        fit=None if sets.fit is None else {"source": sets.fit.source, "n": len(sets.fit)},
        seconds={"evaluation": time.perf_counter() - started},
        **measured,
    )
    if hasattr(model, "foreign"):
        result.extra["foreign"] = plain(model.foreign)
    calibrating = getattr(getattr(model, "provenance", None), "seconds", None)
    if calibrating is not None:
        result.seconds["calibration"] = float(calibrating)
    if isinstance(reference, Result):
        result.fp32 = metrics_only(vars(reference))
    elif reference is not None and reference is not False:
        reference = measurable(reference, device)
        _check_same_preprocess(reference, model)
        result.fp32 = metrics_only(run.measure(reference, sets))
    return result


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
class _Run:
    """The settings of one evaluation, and the passes over the images that it makes."""

    batch_size: int
    progress: ImageProgress | None
    n_bins: int
    scores: dict[str, ScoreInfo]

    def measure(self, model: Any, sets: EvaluationImages, keep: bool | str = False) -> dict[str, Any]:
        """{"id", "ood", "ood_mean", "histograms", "scores_unavailable", "guard", "outputs"} of a result."""
        logits, features = self.forward(model, sets.id, "the ID set")
        names = class_names(sets.id, model)
        metrics = classification_metrics(logits, sets.id.labels, n_bins=self.n_bins, class_names=names)
        id_part = {**describe(sets.id), "num_classes": model.num_classes, **metrics}
        images = of_images(logits, sets.id.labels, keep) if keep else None
        guard = getattr(model, "guard", None)
        known, unknown = looks_unknown(guard, logits), {}
        scorers, unavailable = self.fit(model, features is not None, sets.fit) if sets.ood else ({}, {})
        id_scores = _scored(scorers, logits, features)
        del logits, features
        ood_part: dict[str, dict[str, Any]] = {}
        ood_scores = {}
        for name, others in sets.ood.items():
            logits, features = self.forward(model, others, f"OOD set {name}")
            found = _scored(scorers, logits, features)
            ood_scores[name] = found
            by_score = {score: ood_metrics(id_scores[score], values) for score, values in found.items()}
            ood_part[name] = {**describe(others), "group": sets.groups[name], **by_score}
            unknown[name] = looks_unknown(guard, logits)
            del logits, features
        outputs = None
        if images is not None:
            sets_scored = ood_scores if id_scores else {}
            about = about_of(model, id_part, {name: ood_part[name] for name in sets_scored}, self.n_bins)
            outputs = Outputs(**images, id_scores=id_scores, ood_scores=sets_scored, about=about)
        return {
            "id": plain(id_part),
            "ood": plain(ood_part),
            "ood_mean": plain(mean_over_sets(ood_part)),
            "histograms": {
                score: score_histograms(values, {name: found[score] for name, found in ood_scores.items()})
                for score, values in id_scores.items()
            },
            "scores_unavailable": unavailable,
            "guard": plain(guard_metrics(guard, known, unknown)),
            "outputs": outputs,
        }

    def fit(self, model: Any, features: bool, images: Any) -> tuple[dict[str, Scorer], dict[str, str]]:
        """Every score that can be had on this model, fitted on its own outputs, and the others with the reason why not.
        features: whether the model gives any; images: those that scores are fitted on, or None."""
        classifier = model.classifier()
        data = None
        if features and images is not None and any(info.needs_fit for info in self.scores.values()):
            outputs = self.forward(model, images, "the fit set")
            labels = None if images.labels is None else images.check_labels(model.num_classes)
            data = FitData(*outputs, labels, *(t.detach().float().cpu().numpy() for t in classifier or ()))
        there = {"features": features, "fit": images is not None, "classifier": classifier is not None}
        lacking = {name: info.lacks(**there) for name, info in self.scores.items()}
        scorers = {name: make_scorer(name, data) for name, reason in lacking.items() if not reason}
        return scorers, {name: reason for name, reason in lacking.items() if reason}

    def forward(self, model: Any, images: Any, what: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(logits float32 [N, K], features float32 [N, D] or None) of an image set, in its order."""
        recorded = getattr(model, "recorded", None)
        found, features = self.run(model, images, what) if recorded is None else recorded(images, what)
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if bad.size:
            raise QuantlensError(
                f"{model.name} ({model.method}, {model.bits}) gives logits that are not finite on {bad.size} of the "
                f"{len(found)} images of {what} ({images.source}), first on {images.names[bad[0]]}; check the weights "
                "for NaN, or use another method or more bits"
            )
        return found, features

    def run(self, model: Any, images: Any, what: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The same of a model that has to see the images."""
        logits, features, done = [], [], 0
        size = min(self.batch_size, getattr(model, "images_together", None) or self.batch_size)
        with torch.inference_mode():
            for pixels, _ in images.batches(batch_size=size, device=getattr(model, "device", "cpu")):
                outputs = model.outputs(pixels)
                logits.append(outputs.logits.float().cpu().numpy())
                if outputs.features is not None:
                    features.append(outputs.features.float().cpu().numpy())
                done += len(pixels)
                if self.progress is not None:
                    self.progress(f"evaluating {what}", done, len(images))
        return np.concatenate(logits), np.concatenate(features) if features else None


def _scored(scorers: Mapping[str, Scorer], logits: np.ndarray, features: np.ndarray | None) -> dict[str, np.ndarray]:
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
