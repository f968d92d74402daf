"""Measure one model: in-distribution metrics, out-of-distribution scores, and what quantization took from both.

The model sees each image once. Logits (float32 [N, K]) and features (float32 [N, D]) of the ID images are kept as numpy
arrays; of an OOD set only the scores (float64 [N]) stay once it has been measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlens.ambient import isolated
from quantlens.errors import QuantlensError
from quantlens.evaluation.images import EvaluationImages, ImageProgress, check_labels, describe, source_name
from quantlens.evaluation.outputs import check_keep, gather, of_images
from quantlens.evaluation.result import Result, check_same_images, plain
from quantlens.evaluation.scoring import SetScores, choose_scores, fit_scores


@isolated
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
    """Measure a model of `load_model` or `quantize` on labelled ID images and on OOD sets.

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
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise QuantlensError(f"batch_size is {batch_size!r}; give a whole number of at least 1")
    model = _on_device(measurable(model), device)
    run = _Run(batch_size, progress, n_bins, choose_scores(scores))
    keep = check_keep(keep)
    sets = EvaluationImages.open(model, id, ood, fit, groups, cache_dir=cache_dir, skip_bad=skip_bad, progress=progress)
    if reference is None and str(model.method) != "fp32":
        reference = getattr(model, "reference", None)
    if isinstance(reference, Result):
        check_same_images(reference, describe(sets.id), {name: describe(images) for name, images in sets.ood.items()})
    measured = run.measure(model, sets, keep)
    result = _result(model, sets, time.perf_counter() - started, measured)
    if isinstance(reference, Result):
        result.set_reference(reference.to_dict())
    elif reference is not None and reference is not False:
        reference = _on_device(measurable(reference), device)
        _check_same_preprocess(reference, model)
        result.set_reference(run.measure(reference, sets))
    return result


def _result(model: Any, sets: EvaluationImages, seconds: float, measured: Mapping[str, Any]) -> Result:
    """What the model is, with what was measured on it."""
    from quantlens.evaluation.environment import environment

    calibration = getattr(model, "calibration", None) if str(model.method) != "fp32" else None
    taken = {"evaluation": seconds}
    calibrating = getattr(getattr(model, "plan", None), "info", {}).get("seconds")
    if isinstance(calibrating, int | float):
        taken["calibration"] = float(calibrating)
    return Result(
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
        seconds=taken,
        **measured,
    )


# ---- running a model -------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """The settings of one evaluation, and the passes over the images that it makes."""

    batch_size: int
    progress: ImageProgress | None
    n_bins: int
    scores: dict[str, Any]

    def measure(self, model: Any, sets: EvaluationImages, keep: bool | str = False) -> dict[str, Any]:
        """{"id", "ood", "ood_mean", "histograms", "scores_unavailable", "guard", "outputs"} of a result."""
        from quantlens.export.threshold import guard_figures, looks_unknown
        from quantlens.metrics import mean_over_sets, score_histograms

        logits, features = self.forward(model, sets.id, "the ID set")
        id_part = self._id_part(model, sets, logits)
        images = of_images(logits, sets.labels, keep) if keep else None
        guard = getattr(model, "guard", None)
        known, unknown = looks_unknown(guard, logits), {}
        scores, unavailable = SetScores({}), dict[str, str]()
        if sets.ood:
            scores, unavailable = self.fit(model, features, sets.fit)
            scores.add_id(logits, features)
        del logits, features

        ood_part: dict[str, dict[str, Any]] = {}
        for name, others in sets.ood.items():
            logits, features = self.forward(model, others, f"OOD set {name}")
            ood_part[name] = {
                **describe(others),
                "group": sets.groups[name],
                **scores.add(name, logits, features),
            }
            unknown[name] = looks_unknown(guard, logits)
            del logits, features
        return {
            "id": plain(id_part),
            "ood": plain(ood_part),
            "ood_mean": plain(mean_over_sets(ood_part)) if ood_part else {},
            "histograms": {name: score_histograms(values, scores.ood[name]) for name, values in scores.id.items()},
            "scores_unavailable": unavailable,
            "guard": plain(guard_figures(guard, known, unknown)),
            "outputs": images and gather(model, images, scores.id, scores.ood, id_part, ood_part, self.n_bins),
        }

    def _id_part(self, model: Any, sets: EvaluationImages, logits: np.ndarray) -> dict[str, Any]:
        from quantlens.metrics import classification_metrics

        if logits.shape[1] != int(model.num_classes):
            raise QuantlensError(
                f"{model.name} gives {logits.shape[1]} logits but says it has {model.num_classes} classes; "
                "load it with the right number of classes"
            )
        names = class_names(sets.id, model)
        metrics = classification_metrics(logits, sets.labels, n_bins=self.n_bins, class_names=names)
        return {**describe(sets.id), "num_classes": int(model.num_classes), **metrics}

    def fit(self, model: Any, features: np.ndarray | None, fit_images: Any) -> tuple[SetScores, dict[str, str]]:
        """Fit every score that can be had on this model, on its own outputs; the others with the reason why not."""
        from quantlens.metrics import FitData

        classifier = model.classifier()
        data = None
        if fit_images is not None and features is not None and any(info.needs_fit for info in self.scores.values()):
            fit_logits, fit_features = self.forward(model, fit_images, "the fit set")
            labels = None
            if fit_images.labels is not None:
                labels = check_labels(fit_images, int(model.num_classes), str(model.name), "the fit set")
            weight, bias = (None, None) if classifier is None else map(_array, classifier)
            data = FitData(logits=fit_logits, features=fit_features, labels=labels, weight=weight, bias=bias)
        there = {"features": features is not None, "fit": fit_images is not None, "classifier": classifier is not None}
        scorers, unavailable = fit_scores(self.scores, data, **there)
        return SetScores(scorers), unavailable

    def forward(self, model: Any, images: Any, what: str) -> tuple[np.ndarray, np.ndarray | None]:
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
        _check_finite(logits, model, images, what)
        return logits, features


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


def _check_finite(logits: np.ndarray, model: Any, images: Any, what: str) -> None:
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise QuantlensError(
            f"{model.name} ({model.method}, {model.bits}) gives logits that are not finite on {int(bad.sum())} of "
            f"the {len(bad)} images of {what} ({source_name(images)}), first on {_image_name(images, first)}; check "
            "the weights for NaN, or use another method or more bits"
        )


def _check_same_preprocess(reference: Any, model: Any) -> None:
    first, second = (None if m.preprocess is None else m.preprocess.to_dict() for m in (reference, model))
    if first is not None and second is not None and first != second:
        raise QuantlensError(
            f"the FP32 reference {reference.name} takes other images than {model.name} (its preprocessing differs); "
            "give the model that was quantized"
        )


# ---- small things ----------------------------------------------------------------------------------------------------


def _on_device(model: Any, device: str | None) -> Any:
    if device is not None:
        from quantlens.evaluation.environment import choose_device

        model.to(choose_device(device))
    return model


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
