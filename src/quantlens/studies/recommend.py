"""Which setting to take: a bounded search over methods and bits for the smallest and the fastest model within a loss of
top-1, of a detector of mAP.

Every setting is measured on the same images as the FP32 model. Methods are tried from the fastest to the slowest to
calibrate, bits from 8 downwards; where a method leaves the budget, the next one goes on from there. A setting that is
surely outside after a quarter of the images is not measured on the rest.

Intervals are simultaneous: with probability 95 % the true changes of all settings that were measured on all images lie
in theirs, so that picking the best one does not invalidate its own.
"""

import math
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantlens.ambient import isolated
from quantlens.api import quantize
from quantlens.calibration import Calibration
from quantlens.data import as_image_set
from quantlens.data.sources import open_calibration, open_source, parse_spec
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.evaluation import Result, evaluate
from quantlens.evaluation.compare import Wanted, replicate
from quantlens.evaluation.images import refuse_overlap
from quantlens.evaluation.run import measurable
from quantlens.evaluation.tasks import task_of
from quantlens.methods import registry
from quantlens.metrics import METRICS, choose_scores, first_score, summary_of
from quantlens.metrics.bootstrap import Resamples, simultaneous_intervals
from quantlens.models import Model, load_model
from quantlens.plugins import given
from quantlens.studies.reproduce import other_size

METHODS = ("repq-vit", "quantlens-fast", "quantlens-best")
"""From the fastest to the slowest to calibrate."""

WIDTHS = (8, 6, 5, 4, 3, 2)
TASKS = ("classify", "detect")
"""What models can be for. A trial is judged by the first metric of `metrics.summary_of`: top-1, or mAP."""
RUNTIMES = {"openvino-cpu": ("openvino", ".xml"), "onnxruntime-cpu": ("onnxruntime", ".onnx")}
"""Targets that can be timed here: the runtime's package, and the ending of its files."""

LEAST = 30
"""Images that must be left to measure on."""

SHARE = 0.25
"""Share of the images after which a setting may be given up."""

RESAMPLES = 2000


@dataclass(frozen=True)
class Trial:
    """A setting that was tried. change: of top-1, of a detector of mAP (quantized - FP32, a fraction), on n images, and
    its interval; others: of the other metrics that sum the task up (NLL, ECE; mAP@.5, D-ECE), by name; ood: of AUPR-out
    by set. size_mb: of the checkpoint, or of the exported file of a target. milliseconds: of one image in the target's
    runtime. inside: whether its loss is within the budget."""

    method: str
    bits: str
    target: str | None
    n: int
    change: float
    low: float
    high: float
    size_mb: float
    inside: bool
    others: dict[str, float]
    ood: dict[str, float]
    command: str
    milliseconds: float | None = None

    @property
    def nll(self) -> float | None:
        """Change of NLL; None of a detector."""
        return self.others.get("nll")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `others` by their own names."""
        told = asdict(self)
        return told | told.pop("others")


@dataclass(frozen=True)
class Recommendation:
    """What was found, and the trials that it was chosen from, in the order in which they ran.

    metric: "top1" or "map", what max_loss is of; fp32: its value at FP32. smallest, fastest: None where no setting is
    inside the budget or none could be timed; notes say why."""

    model: str
    max_loss: float
    n: int
    metric: str
    fp32: float
    trials: list[Trial]
    smallest: Trial | None
    fastest: Trial | None
    notes: list[str] = field(default_factory=list)

    @property
    def top1(self) -> float | None:
        """Top-1 at FP32; None of a detector."""
        return self.fp32 if self.metric == "top1" else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; fractions, not percent. The value at FP32 stands under the name of the metric, too."""
        chosen = {name: one and one.to_dict() for name, one in (("smallest", self.smallest), ("fastest", self.fastest))}
        trials = [one.to_dict() for one in self.trials]
        return {**asdict(self), self.metric: self.fp32, "trials": trials, **chosen}

    def to_pandas(self) -> Any:
        """A row per trial."""
        from quantlens.evaluation.result import frame

        return frame([one.to_dict() for one in self.trials])


class _TimeIsUp(Exception):
    """Raised out of a method's progress, so that a long one is ended, too."""


@isolated
def recommend(
    model: Any,
    id: Any,
    *,
    max_loss: float = 0.01,
    ood: Mapping[str, Any] | None = None,
    calibration: Any = None,
    target: str | None = "auto",
    methods: Sequence[str] = METHODS,
    minutes: float = 15.0,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Recommendation:
    """The smallest and the fastest setting whose loss of top-1, of a detector of mAP, is at most ``max_loss`` (0.01:
    one point).

    model: as for :func:`quantlens.quantize`, or the name of one. id: images with labels or boxes as for
    :func:`quantlens.evaluate`, as ood. calibration: as for ``quantize``; None takes 32 images that ``seed`` draws from
    the SOURCE ``id``, on which nothing is then measured. target: a runtime in which exported files are timed
    (``openvino-cpu``, ``onnxruntime-cpu``), "auto" for the one that suits this processor, None for no files. methods:
    in the order in which they are tried. minutes: after which nothing more is tried. progress: called with (what, done,
    in all).

    Raises QuantlensError for names that are unknown, and for images without labels; where a method or a runtime refuses
    a setting, a note says so, and the error is raised where nothing could be tried.
    """
    for method in methods:
        registry.get(method)
    if not methods:
        raise QuantlensError("no method is named; give at least one (`quantlens methods`)")
    if not isinstance(max_loss, int | float) or not 0 <= max_loss < 1:
        raise QuantlensError(
            f"max_loss is {max_loss!r}; give a fraction such as 0.01 (--max-loss 1pt), one point of top-1 or mAP"
        )
    if not isinstance(model, Model):
        model = load_model(model)
    search = _Search(model, max_loss, seed, time.monotonic() + 60 * minutes, progress or (lambda *_: None))
    search.open(id, ood or {}, calibration)
    try:
        search.files(methods, target)
        search.sizes(methods)
    except _TimeIsUp:
        search.notes.append(f"the search was ended after {minutes:g} minutes; more of them may find more")
    return search.found()


class _Stage(NamedTuple):
    """Images that settings are measured on, the FP32 result there, and its metric on every resample [R]."""

    id: Any
    ood: Mapping[str, Any]
    fp32: Result
    drawn: np.ndarray


class _Search:
    """The state of one search: images, the FP32 result, trials."""

    def __init__(self, model: Model, max_loss: float, seed: int, deadline: float, progress: Any):
        self.model, self.max_loss, self.seed, self.deadline = model, max_loss, seed, deadline
        self.progress = progress
        self.trials: list[Trial] = []
        self.drawn: dict[int, np.ndarray] = {}
        self.refusals: list[QuantlensError] = []
        self.notes: list[str] = []
        self.resamples = Resamples(RESAMPLES, seed % 2**64)

    def open(self, id: Any, ood: Mapping[str, Any], calibration: Any) -> None:
        """Open the images, and measure the FP32 model on them."""
        task = task_of(measurable(self.model))
        if task not in TASKS:
            raise UnsupportedError(
                f"recommend chooses by top-1 or mAP, and {self.model.name} is a model for {task!r}; try settings in a "
                "study, which measures them by what the model is for"
            )
        self.metric, *self.others = summary_of(task)
        preprocess = self.model.preprocess
        self.calibration_source = calibration if isinstance(calibration, str) else id if calibration is None else None
        if apart := calibration is None:
            if not isinstance(id, str):
                raise QuantlensError("give calibration images, too; only those of a SOURCE text can be set aside")
            if parse_spec(id).sample is not None:
                raise QuantlensError(
                    f"{id} draws a sample, of which none can be set aside; give calibration images, too"
                )
            calibration, source = open_calibration(id, seed=self.seed), open_source(id)
            aside = set(calibration.names)
            id = source.select([i for i, name in enumerate(source.names) if name not in aside])
        elif isinstance(calibration, str):
            calibration = open_calibration(calibration, seed=self.seed)
            if isinstance(id, str):
                id = open_source(id)
                refuse_overlap(calibration, "the calibration images", id, "the ID set")
        if hasattr(id, "__len__") and hasattr(id, "names") and len(id) < LEAST:
            told = f"left to measure on ({len(calibration)} are for calibration)" if apart else "given to measure on"
            more = ", or calibration images from elsewhere" * apart
            raise QuantlensError(
                f"{len(id)} images are {told}, and nothing can be said of fewer than {LEAST}: give more{more}"
            )
        self.calibration = Calibration.of(calibration, preprocess, device=self.model.device, seed=self.seed)
        images = as_image_set(id, preprocess, "the ID set", progress=partial(self.progress, "decoding images"))
        oods = {name: as_image_set(images, preprocess, name) for name, images in ood.items()}
        self.settings: dict[str, Any] = {"keep": "scores", "scores": [first_score(choose_scores(None, task))]}
        self.settings["progress"] = self.progress
        self.whole = self._stage(images, oods)
        if self.whole.fp32.id[self.metric] <= self.max_loss:
            text = METRICS[self.metric].text(self.whole.fp32.id[self.metric])
            self.notes.append(
                f"{METRICS[self.metric].title} at FP32 is {text} %, no more than may be lost, so that every setting is "
                "inside: look whether weights and classes are those of these images"
            )
        mixed = np.random.default_rng(self.seed % 2**64).permutation(len(images))
        few = images.select(mixed[: math.ceil(SHARE * len(mixed))])
        nothing = few.boxes is not None and bool(few.boxes.crowd.all())
        self.stages = [self.whole] if nothing else [self._stage(few, {}), self.whole]
        self.settings["progress"] = self.told

    def _stage(self, id: Any, ood: Mapping[str, Any]) -> _Stage:
        fp32 = evaluate(self.model, id, ood, **self.settings)
        return _Stage(id, ood, fp32, self._drawn(fp32))

    def _drawn(self, result: Result) -> np.ndarray:
        """The metric that settings are judged by on every resample [R]."""
        assert result.outputs is not None
        return replicate(result.outputs, Wanted((), (), (self.metric,)), self.resamples)[f"id.{self.metric}"]

    def told(self, what: str, done: int, total: int) -> None:
        """Progress of a stage; ends the search when its time is up."""
        if time.monotonic() > self.deadline:
            raise _TimeIsUp
        self.progress(what, done, total)

    # -- the two searches ---------------------------------------------------------------------------------------------
    def sizes(self, methods: Sequence[str]) -> None:
        """Checkpoints, by falling width of the weights: each method goes on where the last one left the budget."""
        widths = list(WIDTHS)
        for method in methods:
            while widths and any(self.attempt(method, f"W{widths[0]}A{a}") for a in dict.fromkeys((widths[0], 8))):
                widths.pop(0)

    def files(self, methods: Sequence[str], target: str | None) -> None:
        """Exported files of a target by the first method that stays inside, timed beside the FP32 model's."""
        name = self._target(target)
        if name is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            inside: dict[int, Path] = {}
            for bits in ("W8A8", "W7A8"):
                for method in methods:
                    file = Path(folder, f"{bits}-{method}{RUNTIMES[name][1]}")
                    if self.attempt(method, bits, name, file):
                        inside[len(self.trials) - 1] = file
                        break
            if inside:
                self._time(name, inside, Path(folder))

    def _time(self, target: str, inside: Mapping[int, Path], folder: Path) -> None:
        from quantlens.export.bench import bench, contender
        from quantlens.export.export import export

        float_file = export(self.model, folder / f"fp32{RUNTIMES[target][1]}")
        files = [contender(file, str(i)) for i, file in [(-1, float_file), *inside.items()]]
        size = self.model.preprocess.input_size
        timed = bench(files, input_size=size, memory=False, progress=partial(self.told, "timing"))
        for timing in timed[1:]:
            i = int(timing["label"])
            self.trials[i] = replace(self.trials[i], milliseconds=timing["median_ms"])
        self.notes.append(f"FP32 takes {timed[0]['median_ms']:.1f} ms an image in the same runtime, on one thread")

    def _target(self, target: str | None) -> str | None:
        """The target to time, or None with a note that says why."""
        from importlib.util import find_spec

        from quantlens.export.exported import saturates

        if target not in ("auto", None, *RUNTIMES):
            raise UnknownNameError("target that can be timed", str(target), ["auto", *RUNTIMES])
        order = list(RUNTIMES)[:: -1 if saturates() else 1] if target == "auto" else [target]
        for name in order:
            if name is not None and find_spec(RUNTIMES[name][0]) and find_spec("onnx"):
                return name
        if target is not None:
            self.notes.append("nothing was timed: no runtime is installed (`pip install 'quantlens[deploy]'`)")
        return None

    # -- one setting --------------------------------------------------------------------------------------------------
    def attempt(self, method: str, bits: str, target: str | None = None, path: Path | None = None) -> bool:
        """Try a setting, simulated or as a file of a target in its runtime; whether it is inside the budget. What a
        method or a runtime refuses is noted."""
        setting = f"{method} {bits} for {target}" if target else f"{method} {bits}"
        told = partial(self.told, setting)
        try:
            made = quantize(self.model, self.calibration, method, bits, self.seed, target=target, progress=told)
            return self._trial(made if path is None else self._exported(made, path), method, bits, target)
        except QuantlensError as error:
            self.refusals.append(error)
            self.notes.append(f"{setting} was left out: {error}")
            return False

    def _exported(self, made: Any, path: Path) -> Any:
        from quantlens.export.export import export
        from quantlens.export.exported import Artefact

        return Artefact(export(made, path))

    def _trial(self, made: Any, method: str, bits: str, target: str | None) -> bool:
        """Measure a setting on few of the images, and on all of them where it may be inside; whether it is."""
        for stage in self.stages:
            result = evaluate(made, stage.id, stage.ood, reference=stage.fp32, **self.settings)
            change = result.change or {}
            lost, drawn, n = change["id"][self.metric], self._drawn(result) - stage.drawn, len(stage.id)
            ((low, high),) = simultaneous_intervals(np.array([lost]), drawn[:, None], n).tolist()
            if high < -self.max_loss:
                break
        if stage is self.whole:
            self.drawn[len(self.trials)] = drawn
        inside = stage is self.whole and lost >= -self.max_loss - 1e-12
        others = {name: change["id"][name] for name in self.others if name in change["id"]}
        ood = {name: next(iter(part.values()))["aupr_out"] for name, part in change.get("ood", {}).items()}
        measured = (n, lost, low, high, float(made.size_mb), inside, others, ood)
        self.trials.append(Trial(method, bits, target, *measured, self._command(method, bits, target)))
        return inside

    def _command(self, method: str, bits: str, target: str | None) -> str:
        """The command that makes a setting again; of a module that only Python has, the call."""
        from quantlens import zoo

        if self.model.checkpoint == "memory":
            more = f", target={target!r}" if target else ""
            return f"ql.quantize(model, calibration, {method!r}, {bits!r}, seed={self.seed}{more})"
        words = ["quantlens", "quantize", self.model.name]
        if self.model.checkpoint == "random" or (self.model.weights_path and self.model.name not in zoo.available()):
            words += ["--weights", self.model.weights_path or "random"]
        if (side := other_size(self.model.name, self.model.preprocess.input_size)) is not None:
            words += ["--input-size", str(side)]
        words += ["--letterbox"] * (getattr(self.model.detection_head, "resize", None) == "letterbox")
        words += ["--calibration", self.calibration_source or "SOURCE", "--n", str(len(self.calibration))]
        words += ["--method", method, "--bits", bits, "--seed", str(self.seed)]
        words += [word for plugin in given() for word in ("--plugin", plugin)]
        if target is None:
            return shlex.join(words)
        made = f"{Path(self.model.name.removeprefix('hf:')).name}-{bits.lower()}"
        export = ["quantlens", "export", f"{made}.safetensors", "--out", f"{made}{RUNTIMES[target][1]}"]
        return f"{shlex.join([*words, '--target', target, '--out', f'{made}.safetensors'])} && {shlex.join(export)}"

    def found(self) -> Recommendation:
        """The answer: intervals of all settings that were measured on all images, together."""
        if not self.trials and self.refusals:
            raise self.refusals[0]
        n, fp32, title = len(self.whole.id), self.whole.fp32.id[self.metric], METRICS[self.metric].title
        if self.drawn:
            changes = np.array([self.trials[i].change for i in self.drawn])
            intervals = simultaneous_intervals(changes, np.stack(list(self.drawn.values()), axis=1), n)
            for i, (low, high) in zip(self.drawn, intervals.tolist(), strict=True):
                self.trials[i] = replace(self.trials[i], low=low, high=high)
        inside = [trial for trial in self.trials if trial.inside]
        timed = [trial for trial in inside if trial.milliseconds is not None]
        smallest = min(inside, key=lambda trial: (trial.size_mb, -trial.change), default=None)
        fastest = min(timed, key=lambda trial: trial.milliseconds or 0.0, default=None)
        if not self.trials:
            self.notes.append("nothing was tried in that time")
        elif not inside:
            self.notes.append(f"every setting that was tried loses more than {100 * self.max_loss:g} points of {title}")
        if any(one is not None and one.low < -self.max_loss for one in (smallest, fastest)):
            self.notes.append(
                "an interval reaches below the loss that is allowed: measure on more images before you trust it"
            )
        facts = (self.model.name, self.max_loss, n, self.metric, fp32)
        return Recommendation(*facts, self.trials, smallest, fastest, self.notes)
