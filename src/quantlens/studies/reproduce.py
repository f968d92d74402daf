"""Does a number come out again? Cells of a study, or a result in a file, are measured anew and compared with what was
kept.

Two runs on one processor with the same versions agree to the last digit. Other processors and versions round sums
differently, and what rounding errors make of a quantized model is found out here: the cell is quantized several times
from calibration images that carry noise of a millionth. What was kept agrees where it is within one image, or within
four standard deviations of those runs.
"""

import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any

from quantlens import zoo
from quantlens._moved import ARGUMENTS
from quantlens.ambient import isolated
from quantlens.data.sources import parse_spec
from quantlens.errors import QuantlensError
from quantlens.evaluation.compare import Entry
from quantlens.evaluation.result import metrics_only, numbers
from quantlens.methods import registry
from quantlens.models import huggingface
from quantlens.plugins import given
from quantlens.qmodel import Provenance
from quantlens.studies.backend import Backend, MethodChoice
from quantlens.studies.compare import open_side, split_selection
from quantlens.studies.config import StudyConfig, parse_config
from quantlens.studies.progress import Quiet
from quantlens.studies.results import results
from quantlens.studies.runner import StudyInterrupted, run_study
from quantlens.studies.store import Store

NOISE = 1e-6
"""Relative size of the noise on calibration images, as large as rounding in float32 makes differences."""
DEVIATIONS = 4.0
SETS = {"ood": "OOD", "shift": "shifted"}
"""Parts of a result that hold sets of images beside the ID images, and what a set of each is called."""


@dataclass(frozen=True)
class Metric:
    """One metric as it was kept and as it came out now, and the largest difference that counts as agreement."""

    path: str
    kept: float
    now: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return abs(self.now - self.kept) <= self.tolerance


@dataclass(frozen=True)
class Reproduced:
    """One cell that was measured again. differs: what is not as it was (images, checkpoint, versions), in words."""

    title: str
    metrics: list[Metric]
    differs: list[str]

    @property
    def identical(self) -> bool:
        """Whether every metric is the same to the last digit."""
        return all(metric.now == metric.kept for metric in self.metrics)

    @property
    def agrees(self) -> bool:
        """Whether every metric agrees."""
        return all(metric.agrees for metric in self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; fractions, not percent."""
        rows = [{**asdict(metric), "agrees": metric.agrees} for metric in self.metrics]
        return {"title": self.title, "agrees": self.agrees, "differs": self.differs, "metrics": rows}


def command_of(directory: str | Path, **chosen: Any) -> str:
    """The command that makes cells of a study again."""
    selection = ",".join(f"{key}={value}" for key, value in chosen.items())
    return shlex.join(["quantlens", "reproduce", f"{directory}:{selection}"])


def _own_weights(model: str, checkpoint: str | None) -> bool:
    """Whether a name alone gives the weights that it had."""
    beside = model.startswith(huggingface.PREFIX) and checkpoint in huggingface.FILES
    return beside or checkpoint in (None, "pretrained") or model in zoo.available()


def other_size(model: str, size: Sequence[int]) -> int | None:
    """The side of a model's images, where it is square and its name alone may give another one."""
    import timm

    config = None if model.startswith(huggingface.PREFIX) else timm.get_pretrained_cfg(model, allow_unregistered=True)
    known = model in zoo.available() or (config is not None and tuple(config.input_size) == tuple(size))
    return None if known or size[-1] != size[-2] else int(size[-1])


def quantize_command(about: Provenance, file: str, size: Sequence[int]) -> str:
    """The command that makes a checkpoint of a model for images of a size [C, H, W] again. Raises QuantlensError, with
    the reason, where none can."""
    source = str((about.calibration or {}).get("source"))
    if about.checkpoint == "memory":
        raise QuantlensError("the float model was a module that only Python had")
    if about.widths is not None:
        raise QuantlensError("its widths by module are an allocation's, whose file it does not hold")
    try:
        parse_spec(source)
    except QuantlensError as error:
        raise QuantlensError(f"its calibration images are no SOURCE ({source})") from error
    method = registry.get(about.method)
    usual, words = method.options({}), ["quantlens", "quantize", about.model]
    if not _own_weights(about.model, about.checkpoint):
        words += ["--weights", str(about.checkpoint)]
    if (side := other_size(about.model, size)) is not None:
        words += ["--input-size", str(side)]
    if about.detection_head is not None and about.detection_head.resize == "letterbox":
        words += ["--letterbox"]
    words += [] if about.task == "classify" else ["--task", about.task]
    words += ["--calibration", source, "--method", about.method, "--bits", about.bits, "--seed", str(about.seed)]
    for name, value in about.options.items():
        if name in usual and value != usual[name]:
            shared = name in ARGUMENTS
            words += [f"--{name.replace('_', '-')}", str(value)] if shared else ["--option", f"{name}={value}"]
    words += [word for plugin in given() for word in ("--plugin", plugin)]
    return shlex.join([*words, "--out", file])


def reproduce_command(result: Mapping[str, Any], file: str, checkpoint: str | None) -> str:
    """The command that measures a result again, which a file holds. checkpoint: of the float model's weights. Raises
    QuantlensError, with the reason, where none can."""
    traits = (str(result["model"]), str(result["method"]), str(result["bits"]), int(result["seed"]))
    if checkpoint == "memory":
        raise QuantlensError("the float model was a module that only Python had")
    _study_of(Entry(*traits, result, None))
    known = _own_weights(str(result["model"]), checkpoint)
    return shlex.join(["quantlens", "reproduce", file, *([] if known else ["--weights", str(checkpoint)])])


@isolated
def reproduce(
    row: str | Path, *, weights: str | None = None, draws: int = 4, progress: bool | Quiet = True
) -> list[Reproduced]:
    """Measure again what a row says, and say of each of its cells whether it agrees.

    row: ``DIR`` or ``DIR:model=…,method=…,bits=…,seed=…``, cells of a study, or a file of ``evaluate --json``.
    weights: of the model, instead of what the study says; a result does not know its own. draws: noisy runs of a cell
    that differs by more than one image. Raises QuantlensError for what cannot be made again.
    """
    place, _ = split_selection(str(row))
    if not Path(place).exists():
        raise QuantlensError(
            f"there is no file or folder {place}; give the --out directory of a study, or a result's file"
        )
    config = _config(Path(place)) if Path(place).is_dir() else None
    found = []
    for entry in open_side(row).entries:
        study = _study_of(entry) if config is None else _part(config, entry)
        if weights is not None:
            model = study.models[0].model_copy(update={"weights": weights})
            study = study.model_copy(update={"models": (model,)})
        found.append(_again(entry, study, draws, progress))
    return found


def _config(directory: Path) -> StudyConfig:
    with Store(directory) as store:
        study = store.study()
    if not study:
        raise QuantlensError(f"the store in {directory} does not say what study it is of; run `quantlens study` again")
    return parse_config(study["config"])


def _part(config: StudyConfig, entry: Entry) -> StudyConfig:
    """The study of one cell. Raises QuantlensError where the store's current study does not have it."""
    models = tuple(
        model.model_copy(update={"foreign": tuple(f for f in model.foreign if f.title == entry.method)})
        for model in config.models
        if model.label == entry.model
    )
    methods = tuple(method for method in config.methods if entry.baseline or method.label == entry.method)
    foreign = any(model.foreign for model in models)
    if not models or not (methods or entry.baseline or foreign):
        raise QuantlensError(f"{entry} is no cell of the study that the store was last used for; run its own again")
    bare = {
        "models": models,
        "methods": methods,
        "bits": ("FP32" if foreign else entry.bits,),
        "attention": None,
        "inspect": None,
    }
    return config.model_copy(update={**bare, "outputs": False} | ({} if entry.baseline else {"seeds": (entry.seed,)}))


def _study_of(entry: Entry) -> StudyConfig:
    """The study that measures what a result says of itself."""
    result = entry.result
    if result is None:
        raise QuantlensError(f"{entry}: per-image outputs do not say how they were made; give the result, or the study")
    sets = {name: {"source": part["source"], "group": part["group"]} for name, part in result["ood"].items()}
    task, prepared = result.get("task", "classify"), result.get("preprocess") or {}
    size = prepared.get("input_size")
    if result.get("text_embeddings"):
        raise QuantlensError(f"{entry} was measured against text embeddings, which a study does not take")
    options = {"task": task, "input_size": size and other_size(entry.model, size)}
    if task == "detect" and prepared.get("crop_mode") == "border":
        options["letterbox"] = True
    options = {key: value for key, value in options.items() if value not in (None, "classify")}
    model = {"name": entry.model, "options": options}
    study: dict[str, Any] = {"models": [model], "id": result["id"]["source"], "ood": sets, "bits": [entry.bits]}
    study |= {"fit": (result.get("fit") or {}).get("source"), "outputs": False}
    study["shift"] = {name: part["source"] for name, part in (result.get("shift") or {}).items()}
    if entry.method.startswith("foreign:"):
        raise QuantlensError(f"{entry} was measured from a file that a result does not have; evaluate that file again")
    if not entry.baseline:
        calibration = result.get("calibration") or {}
        plain = re.fullmatch(r"(.*)\?n=(\d+)&seed=(\d+)", str(calibration.get("source")))
        if plain is None or int(plain[3]) != entry.seed:
            raise QuantlensError(
                f"{entry} was calibrated on {calibration.get('source')}, which no study draws; only images that the "
                "seed draws from a SOURCE can be drawn again"
            )
        given = result.get("options") or {}
        own = {name: value for name, value in given.items() if name not in ARGUMENTS}
        shared = {name: value for name, value in given.items() if name in ARGUMENTS}
        study |= {"methods": [{"name": entry.method, "options": own, **shared}], "seeds": [entry.seed]}
        study |= {"calibration": {"source": plain[1], "n": int(plain[2])}}
    return parse_config(study)


class _Noisy(Backend):
    """Quantizes from calibration images with noise of a millionth."""

    def __init__(self, draw: int) -> None:
        self.draw = draw

    def quantize(self, model: Any, calibration: Any, choice: MethodChoice, bits: str, seed: int, progress: Any) -> Any:
        import torch

        images = calibration.tensor()
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(self.draw))
        return super().quantize(model, images * (1 + NOISE * noise), choice, bits, seed, progress)


def _again(entry: Entry, study: StudyConfig, draws: int, progress: bool | Quiet) -> Reproduced:
    assert entry.result is not None
    now = _measured(study, Backend(), progress)
    kept, measured = _numbers(entry.result), _numbers(now)
    least = {path: _one_image(entry.result, path) for path in kept}
    rows = [Metric(path, kept[path], measured[path], least[path]) for path in kept if path in measured]
    others, differs = _differences(entry.result, now)
    if others:
        raise QuantlensError(f"{entry} cannot be compared: {'; '.join(others)}")
    if not all(row.agrees for row in rows) and not entry.baseline:
        noisy = [measured, *(_numbers(_measured(study, _Noisy(draw), progress)) for draw in range(draws))]
        spread = {row.path: stdev([one[row.path] for one in noisy]) for row in rows}
        rows = [replace(row, tolerance=max(row.tolerance, DEVIATIONS * spread[row.path])) for row in rows]
    return Reproduced(str(entry), rows, differs)


def _measured(study: StudyConfig, backend: Backend, progress: bool | Quiet) -> dict[str, Any]:
    """The result of the one cell of a study that is asked for. Raises QuantlensError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = run_study(study, folder, progress=progress, backend=backend)
        except StudyInterrupted:
            raise KeyboardInterrupt("stopped by Ctrl-C; nothing was kept") from None
        if summary.failed:
            raise QuantlensError(f"{summary.failed[-1][0]} could not be made again: {summary.failed[-1][1]}")
        return dict(results(folder).cells[-1].result)


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {path: value for path, value in numbers(metrics_only(result)) if path.partition(".")[0] in ("id", *SETS)}


def _one_image(result: Mapping[str, Any], path: str) -> float:
    """What one image can change in a rate; rounding alone in other metrics."""
    part, name, *_ = path.split(".")
    if path.rpartition(".")[2] in ("nll", "brier", "ece", "ece_adaptive"):
        return 1e-4
    sizes = [int(result["id"]["n"]), *([int(result[part][name]["n"])] if part in SETS else [])]
    return 1 / max(1, min(sizes))


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(why the two are of different things, versions and the like that differ), in words."""
    others = []
    if kept.get("checkpoint_sha256") != now.get("checkpoint_sha256"):
        others.append("the checkpoint is another one")
    named = {"the ID set": (kept["id"], now["id"])}
    for part, what in SETS.items():
        sets = now.get(part) or {}
        named |= {f"the {what} set {name}": (one, sets.get(name) or {}) for name, one in (kept.get(part) or {}).items()}
    for name, (before, today) in named.items():
        if before["fingerprint"] != today.get("fingerprint"):
            others.append(f"{name} is not the one that was measured ({before['n']} images then, {today.get('n')} now)")
    then, today = kept.get("environment") or {}, now.get("environment") or {}
    return others, [f"{key}: {then[key]} then, {today.get(key)} now" for key in then if then[key] != today.get(key)]
