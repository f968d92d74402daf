"""Run an experiment on training: `python -m quantlens.zoo.experiment FILE [--list] [--effects] [--limit N]`.

What is missing is trained, quantized and measured, a piece at a time, in any order of calls and on whatever machine:
weights lie in a folder of each training, measurements in one file of JSON lines. A piece is one training, or one
measurement (weights x method x bits x calibration seed); both are known by what they depend on, so that a change of the
file makes what it concerns anew, and nothing else.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.api import quantize
from quantlens.data import ImageSet
from quantlens.errors import QuantlensError, StorageError
from quantlens.evaluation import evaluate
from quantlens.evaluation.result import metrics_only
from quantlens.evaluation.shift import corruptions
from quantlens.files import check_writable, write_whole
from quantlens.methods import registry
from quantlens.metrics import choose_scores
from quantlens.metrics.factors import Effect, effects, factorial_effects
from quantlens.models import Model, load_model
from quantlens.qmodel import Bits
from quantlens.zoo.designs import Experiment, OodImages, Run, load_experiment
from quantlens.zoo.train import step_bar
from quantlens.zoo.training import train, trained
from quantlens.zoo.training_images import chosen

FP32 = "fp32"
KEPT = ("auroc", "aupr_out")
"""Metrics of OOD detection that a measurement keeps."""
DIGITS = 6
"""Decimals that a measurement keeps."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Measurement:
    """What is measured on one of the weights of a training. method: FP32 for the float model."""

    run: Run
    readout: str
    method: str
    bits: str
    calibration_seed: int

    def key(self, experiment: Experiment) -> str:
        """A hash of all that it depends on."""
        common = ("id", "fit", "ood", "shift", "scores")
        told = {
            "recipe": self.run.recipe.to_dict(),
            **experiment.model_dump(mode="json", include=set(common)),
            **self.named(),
        }
        if self.method != FP32:
            told |= {"n": experiment.calibration.n, "version": registry.get(self.method).info.version}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def named(self) -> dict[str, Any]:
        """What a line of the results says that it is of."""
        about = {"run": self.run.name, "cell": self.run.cell.name, "levels": dict(self.run.cell.levels)}
        return about | {
            "seed": self.run.seed,
            "readout": self.readout,
            "method": self.method,
            "bits": self.bits,
            "calibration_seed": self.calibration_seed,
        }


def measurements(experiment: Experiment, run: Run) -> Iterator[Measurement]:
    """All that is measured of a training: for each of its weights FP32, then what is quantized."""
    for readout in experiment.readouts:
        yield Measurement(run, readout, FP32, "FP32", 0)
        for method, bits, seed in product(experiment.methods, experiment.bits, experiment.calibration.seeds):
            yield Measurement(run, readout, method, bits, seed)


# ---- results ---------------------------------------------------------------------------------------------------------


class Results:
    """The file of measurements: a line of JSON for each, {"key", …, "metrics"}; always whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            self.rows = {row["key"]: row for row in map(json.loads, lines)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"results {path} cannot be read ({error}); mend or remove the file") from error
        check_writable(path, what="the results")

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write the file anew."""
        self.rows[row["key"]] = row
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.rows.values())
        write_whole(self.path, text, what="the results")


# ---- running ---------------------------------------------------------------------------------------------------------


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
        experiment, model = self.experiment, self._opened(one)
        if one.method != FP32:
            rows = np.random.default_rng([one.calibration_seed, 2]).permutation(len(self.fit))[
                : experiment.calibration.n
            ]
            images = self.fit.select(rows).tensor()
            measured: Any = quantize(model, images, one.method, one.bits, seed=one.calibration_seed)
        else:
            measured = model
        result = evaluate(
            measured,
            self.id,
            self.ood,
            fit=self.fit,
            shift=self.shifted or None,
            reference=False,
            scores=experiment.scores,
            groups={name: given.group for name, given in experiment.ood.items()},
            device=self.device,
            batch_size=256,
            cache_dir=self.cache_dir,
        )
        metrics = _rounded(_short(metrics_only(result.to_dict())))
        about = {"checkpoint_sha256": model.checkpoint_sha256, "n": result.id["n"]}
        return {"key": one.key(experiment), **one.named(), **about, "metrics": metrics}

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
        from quantlens.data import load_images

        preprocess = next(self.experiment.runs()).recipe.preprocess
        return load_images(given.whole(self.experiment.base), preprocess, cache_dir=self.cache_dir)

    @cached_property
    def shifted(self) -> dict[str, ImageSet]:
        """The corrupted ID images, made once for all measurements."""
        asked = corruptions(self.experiment.shift)
        made = {f"{name}:{level}": self.id.corrupted(name, level, cache_dir=self.cache_dir) for name, level in asked}
        return made


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
    told = [f"top-1 {100 * row['metrics']['id']['top1']:.1f} %"]
    for group, scores in row["metrics"].get("ood_mean", {}).items():
        told += [f"AUROC {group} {score} {100 * found['auroc']:.1f} %" for score, found in list(scores.items())[:1]]
    return f"{row['run']} {row['readout']} {row['method']} {row['bits']}: {', '.join(told)}"


# ---- effects ---------------------------------------------------------------------------------------------------------


def outcome_of(row: Mapping[str, Any], path: str) -> float:
    """A metric of a row by its path ("id.top1", "ood_mean.near.msp.auroc"). Raises QuantlensError otherwise."""
    value: Any = row["metrics"]
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        raise QuantlensError(
            f"{row['run']} has no metric {path!r}; write a path such as id.top1 or ood_mean.far.msp.auroc"
        )
    return float(value)


RELATIVE_LOSS = "relative_loss"
"""An outcome besides the metrics: (top-1 of FP32 - top-1) / (1 - top-1 of FP32)."""


def table(experiment: Experiment, results: Results, path: str, method: str, bits: str, readout: str) -> np.ndarray:
    """The change of an outcome by quantization [seeds, cells], the mean over calibration seeds, arms last; of FP32 the
    outcome itself. Raises QuantlensError where a measurement is missing."""
    relative, found = path == RELATIVE_LOSS, {}
    for run in experiment.runs():
        mine = [m for m in measurements(experiment, run) if m.readout == readout]
        wanted = [m for m in mine if (m.method, m.bits) == (method, bits)]
        rows = [results.rows.get(m.key(experiment)) for m in (*wanted, *mine[:1])]  # the first is of FP32
        if not wanted or None in rows:
            raise QuantlensError(f"{run.name} is not measured at {method} {bits} ({readout}); run the experiment first")
        *values, reference = (outcome_of(row, "id.top1" if relative else path) for row in rows if row is not None)
        change = float(np.mean(values)) - (0.0 if method == FP32 else reference)
        found[run.seed, run.cell.name] = -change / max(1 - reference, 1e-9) if relative else change
    cells = [cell.name for cell in experiment.cells()]
    return np.array([[found[seed, cell] for cell in cells] for seed in experiment.seeds])


def effects_on(
    experiment: Experiment,
    results: Results,
    path: str,
    method: str,
    bits: str,
    readout: str = "weights",
    *,
    equal: str | None = None,
) -> list[Effect]:
    """What the factors, their interactions, and the arms (against the cells that they are like) do to the change of an
    outcome by quantization; to the outcome itself for FP32. equal: a metric of FP32 at whose equal values effects are
    taken. Raises QuantlensError where a measurement is missing."""
    values, cells = table(experiment, results, path, method, bits, readout), list(experiment.cells())
    other = None if equal is None else table(experiment, results, equal, FP32, "FP32", readout)
    whole = [cell for cell in cells if cell.arm is None]
    order = {name: list(levels) for name, levels in experiment.factors.items()}
    signs = np.array([[2 * order[f].index(level) - 1 for f, level in cell.levels.items()] for cell in whole])
    found, n, bound = [], len(whole), experiment.bound
    if order:
        covariate = None if other is None else other[:, :n]
        found = factorial_effects(values[:, :n], signs, list(order), bound, covariate=covariate)
    names, contrasts = [cell.name for cell in cells], {}
    for cell in cells[n:]:
        like = next(one.name for one in whole if one.levels == cell.levels)
        contrasts[f"{cell.name} (like {like})"] = [(name == cell.name) - (name == like) for name in names]
    return found + (effects(values, contrasts, bound, covariate=other) if contrasts else [])


# ---- the command -----------------------------------------------------------------------------------------------------


def checked(experiment: Experiment) -> Experiment:
    """The same, after a look at names that other packages know. Raises QuantlensError."""
    for method in experiment.methods:
        registry.get(method)
    for bits in experiment.bits:
        if str(Bits.parse(bits)) != bits or bits == "FP32":
            raise QuantlensError(f"bits {bits!r}: write two widths such as W4A4; FP32 is always measured")
    choose_scores(experiment.scores, "classify")
    corruptions(experiment.shift)
    return experiment


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m quantlens.zoo.experiment`."""
    parser = argparse.ArgumentParser(prog="python -m quantlens.zoo.experiment", description="an experiment on training")
    parser.add_argument("file", type=Path, help="the experiment (.yaml)")
    parser.add_argument("--out", type=Path, help="folder for weights (default: NAME-runs in the working directory)")
    parser.add_argument(
        "--results", type=Path, help="file of measurements (default: results.jsonl beside the experiment)"
    )
    parser.add_argument("--only", default="*", help="trainings whose names match, such as '*-s0'")
    parser.add_argument("--limit", type=int, help="at most so many trainings and measurements")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing, and stop")
    parser.add_argument("--effects", action="store_true", help="print the effects on the primary outcomes, and stop")
    parser.add_argument("--equal", help="effects at an equal value of a metric of FP32, such as id.top1")
    given = parser.parse_args(arguments)
    try:
        experiment = checked(load_experiment(given.file))
        results = Results(given.results or given.file.parent / "results.jsonl")
        laboratory = Laboratory(experiment, given.out or Path(f"{experiment.name}-runs"), given.device)
        runs = [run for run in experiment.runs() if fnmatchcase(run.name, given.only)]
        if not runs:
            raise QuantlensError(f"no training is called {given.only!r}; --list names them")
        if given.list:
            _list(laboratory, results, runs)
        elif given.effects:
            _effects(experiment, results, given.equal)
        else:
            done = laboratory.run(results, runs, limit=given.limit, tell=lambda text: print(text, flush=True))
            print("all is measured" if done else "more is missing: call again", flush=True)
    except QuantlensError as error:
        parser.exit(2, f"error: {error}\n")


def _list(laboratory: Laboratory, results: Results, runs: Sequence[Run]) -> None:
    for run in runs:
        wanted = [one.key(laboratory.experiment) for one in measurements(laboratory.experiment, run)]
        state = "trained" if laboratory.weights(run).exists() else "not trained"
        print(f"{run.name}: {state}, {sum(key in results.rows for key in wanted)} of {len(wanted)} measured")


def _effects(experiment: Experiment, results: Results, equal: str | None) -> None:
    print("readout\tmethod\tbits\toutcome\teffect\testimate\tlow\thigh\tp (Holm)\tsize\tverdict")
    settings = [(FP32, "FP32"), *product(experiment.methods, experiment.bits)]
    for readout, (method, bits), path in product(experiment.readouts, settings, experiment.primary):
        for one in effects_on(experiment, results, path, method, bits, readout, equal=equal):
            numbers = [f"{value:.4f}" for value in (one.estimate, one.low, one.high, one.p_holm, one.size)]
            print("\t".join([readout, method, bits, path, one.name, *numbers, one.verdict]))


if __name__ == "__main__":
    main()
