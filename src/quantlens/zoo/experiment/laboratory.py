"""What an experiment needs is trained and measured, a piece at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.api import quantize
from quantlens.data import ImageSet, load_images
from quantlens.errors import QuantlensError
from quantlens.evaluation import evaluate
from quantlens.evaluation.result import Result, metrics_only
from quantlens.evaluation.shift import corruptions
from quantlens.models import Model, load_model
from quantlens.qmodel import QuantizedModel
from quantlens.zoo.designs import Experiment, OodImages, Run
from quantlens.zoo.experiment.mediators import mediators
from quantlens.zoo.experiment.rows import FP32, MEDIATORS, SQNR_OF, Measurement, Results, measurements
from quantlens.zoo.train import step_bar
from quantlens.zoo.training import train, trained
from quantlens.zoo.training_images import chosen

KEPT = ("auroc", "aupr_out")
"""Metrics of OOD detection that a measurement keeps."""
DIGITS = 6
"""Decimals that a measurement keeps."""

Tell = Callable[[str], None]


@dataclass
class Laboratory:
    """An experiment, where its weights lie (`out`), and the images that it measures on, which are read once."""

    experiment: Experiment
    out: Path
    device: str = "cpu"
    cache_dir: Any = None
    _model: tuple[Path | None, Model | None] = field(default=(None, None), repr=False)

    def weights(self, run: Run, readout: str = "weights") -> Path:
        return self.out / run.name / f"{readout}.safetensors"

    def run(
        self, results: Results, runs: Sequence[Run], *, limit: int | None = None, tell: Tell = lambda text: None
    ) -> bool:
        """Do what is missing of these trainings, at most `limit` pieces, and say whether nothing is missing. Raises
        QuantlensError."""
        left = float("inf") if limit is None else limit
        results.check()
        for run in runs:
            missing = [m for m in measurements(self.experiment, run) if m.key(self.experiment) not in results.rows]
            if missing and not self.weights(run).exists():
                if left < 1:
                    return False
                left -= 1
                with step_bar(run.name) as bar:
                    settings: dict[str, Any] = {"device": self.device, "cache_dir": self.cache_dir, "report": bar}
                    train(run.recipe, self.out / run.name, pretrained=self.out / "pretrained", **settings)
            for one in missing:
                if left < 1:
                    return False
                left -= 1
                row = self.measure(one)
                results.add(row)
                tell(_line(row))
        return True

    def measure(self, one: Measurement) -> dict[str, Any]:
        """A row of the results."""
        model = self._opened(one)
        about = {"key": one.key(self.experiment), **one.named(), "checkpoint_sha256": model.checkpoint_sha256}
        if one.method == MEDIATORS:
            asked, quantized = self.experiment.mediators, self._quantized(model, *SQNR_OF, one.calibration_seed)
            assert asked is not None
            images = _drawn(self.id, asked.images).tensor()
            prefix = 1 + one.run.recipe.model.registers
            found = mediators(quantized, model.module, images, prefix=prefix, probes=asked.probes)
            return {**about, "n": len(images), "metrics": {MEDIATORS: _rounded(found)}}
        measured: Any = model
        if one.method != FP32:
            measured = self._quantized(model, one.method, one.bits, one.calibration_seed)
        result = self._evaluated(measured, one.step is None)
        metrics = _rounded(_short(metrics_only(result.to_dict())))
        return {**about, "n": result.id["n"], "metrics": metrics}

    def _quantized(self, model: Model, method: str, bits: str, seed: int) -> QuantizedModel:
        rows = np.random.default_rng([seed, 2]).permutation(len(self.fit))[: self.experiment.calibration.n]
        return quantize(model, self.fit.select(rows).tensor(), method, bits, seed=seed)

    def _evaluated(self, measured: Any, whole: bool) -> Result:
        """On all images; on those of the trajectory where it is not `whole`."""
        experiment = self.experiment
        id, ood = (self.id, self.ood) if whole else self._on_the_way
        return evaluate(
            measured,
            id,
            ood,
            fit=self.fit,
            shift=(self.shifted or None) if whole else None,
            reference=False,
            scores=experiment.scores,
            groups={name: given.group for name, given in experiment.ood.items()},
            device=self.device,
            batch_size=256,
            cache_dir=self.cache_dir,
        )

    def _opened(self, one: Measurement) -> Model:
        path = self.weights(one.run, one.readout)
        if self._model[0] != path:
            if not path.exists():
                raise QuantlensError(
                    f"{path} is missing: the recipe has no such average; add it to `averages`, or leave it"
                )
            module, recipe, classes = trained(path)
            if recipe.to_dict() != one.run.recipe.to_dict():
                raise QuantlensError(f"{path} is of another recipe: the file was changed; move {path.parent} away")
            settings: dict[str, Any] = {"preprocess": recipe.preprocess, "class_names": classes, "device": self.device}
            self._model = path, load_model(module, name=recipe.name, **settings)
        assert self._model[1] is not None
        return self._model[1]

    def _images(self, given: Any) -> ImageSet:
        preprocess = next(self.experiment.runs()).recipe.preprocess
        return chosen(given, given.whole(self.experiment.base), preprocess, 0, self.cache_dir)

    @cached_property
    def id(self) -> ImageSet:
        return self._images(self.experiment.id)

    @cached_property
    def fit(self) -> ImageSet:
        return self._images(self.experiment.fit)

    @cached_property
    def ood(self) -> dict[str, ImageSet]:
        return {name: self._ood(given) for name, given in self.experiment.ood.items()}

    def _ood(self, given: OodImages) -> ImageSet:
        if given.classes is not None or given.share < 1:
            return self._images(given)
        preprocess = next(self.experiment.runs()).recipe.preprocess
        return load_images(given.whole(self.experiment.base), preprocess, cache_dir=self.cache_dir)

    @cached_property
    def _on_the_way(self) -> tuple[ImageSet, dict[str, ImageSet]]:
        """The ID and OOD images of the trajectory."""
        assert self.experiment.trajectory is not None
        most = self.experiment.trajectory.images
        return _drawn(self.id, most), {name: _drawn(images, most) for name, images in self.ood.items()}

    @cached_property
    def shifted(self) -> dict[str, ImageSet]:
        """The corrupted ID images, made once for all measurements."""
        asked = corruptions(self.experiment.shift)
        made = {f"{name}:{level}": self.id.corrupted(name, level, cache_dir=self.cache_dir) for name, level in asked}
        return made


def _drawn(images: ImageSet, most: int) -> ImageSet:
    """At most so many of the images, drawn with seed 0."""
    return images.select(np.sort(np.random.default_rng([0, 3]).permutation(len(images))[:most]))


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without those that nobody asked for."""
    for part in ("ood", "ood_mean", "full_spectrum", "full_spectrum_mean"):
        for name, scores in metrics.get(part, {}).items():
            metrics[part][name] = {s: {k: v for k, v in of.items() if k in KEPT} for s, of in scores.items()}
    metrics.pop("full_spectrum", None)
    return metrics


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, DIGITS) if isinstance(value, float) else value


def _line(row: Mapping[str, Any]) -> str:
    after = f"after {row['step']} steps" if "step" in row else row["readout"]
    name = " ".join([row["run"], after, row["method"], row["bits"]])
    if MEDIATORS in row["metrics"]:
        return f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row["metrics"][MEDIATORS].items())
    told = [f"top-1 {100 * row['metrics']['id']['top1']:.1f} %"]
    for group, scores in row["metrics"].get("ood_mean", {}).items():
        told += [f"AUROC {group} {score} {100 * found['auroc']:.1f} %" for score, found in list(scores.items())[:1]]
    return f"{name}: {', '.join(told)}"
