"""What an experiment measures, and the file of its results."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantlens.errors import StorageError
from quantlens.files import check_writable, write_whole
from quantlens.methods import registry
from quantlens.zoo.designs import SCREENING, Experiment, Run
from quantlens.zoo.recipes import Recipe
from quantlens.zoo.training import WEIGHTS, checkpoint_name

FP32 = "fp32"
MEDIATORS = "mediators"
"""In the place of a method: the float model, and what :mod:`.mediators` measures of it."""
SQNR_OF = ("minmax", "W4A4")
"""Whose noise at the logits is a mediator."""


@dataclass(frozen=True)
class Measurement:
    """What is measured on one of the weights of a training. method: FP32 for the float model, MEDIATORS. step: of a
    point of the trajectory, after so many steps; else None."""

    run: Run
    readout: str
    method: str
    bits: str
    calibration_seed: int
    step: int | None = None

    def key(self, experiment: Experiment) -> str:
        """A hash of all that it depends on."""
        common = {"id", "fit"} | ({"mediators"} if self.method == MEDIATORS else {"ood", "scores"})
        common |= {"shift"} if self.step is None and self.method != MEDIATORS else set()
        told: dict[str, Any] = {
            "recipe": self.run.recipe.to_dict(),
            **experiment.model_dump(mode="json", include=common),
            **self.named(),
        }
        if self.step is not None and experiment.trajectory is not None:
            told["images"] = experiment.trajectory.images
        if self.method != FP32:
            method = SQNR_OF[0] if self.method == MEDIATORS else self.method
            told |= {"n": experiment.calibration.n, "version": registry.get(method).info.version}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def named(self) -> dict[str, Any]:
        """What a line of the results says that it is of."""
        about: dict[str, Any] = {"run": self.run.name, "cell": self.run.cell.name, "levels": dict(self.run.cell.levels)}
        about |= {"seed": self.run.seed, "readout": self.readout, "method": self.method, "bits": self.bits}
        about |= {"calibration_seed": self.calibration_seed}
        return about if self.step is None else about | {"step": self.step}


def measurements(experiment: Experiment, run: Run) -> Iterator[Measurement]:
    """All that is measured of a training: for each of its weights FP32, then what is quantized, then the mediators; at
    last its trajectory. Of the screening what is judged, and nothing else."""
    screening = run.cell.family == SCREENING
    settings, seeds = experiment.judged_settings if screening else experiment.settings, experiment.calibration.seeds
    for readout in experiment.readouts:
        yield Measurement(run, readout, FP32, "FP32", 0)
        for method, bits in settings:
            yield from (Measurement(run, readout, method, bits, seed) for seed in seeds)
        if experiment.mediators is not None and not screening:
            yield Measurement(run, readout, MEDIATORS, "FP32", 0)
    if experiment.trajectory is None or screening:
        return
    for step, name in on_the_way(run.recipe):
        yield Measurement(run, name, FP32, "FP32", 0, step)
        for method, bits in experiment.trajectory.settings:
            yield Measurement(run, name, method, bits, seeds[0], step)


def on_the_way(recipe: Recipe) -> list[tuple[int, str]]:
    """Steps and the names of their weights: the checkpoints, and the last."""
    return [*((step, checkpoint_name(step)) for step in recipe.checkpoint_steps), (recipe.steps, WEIGHTS)]


class Results:
    """The file of measurements: a line of JSON for each, {"key", …, "metrics"}; always whole. Several processes may add
    to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            return {row["key"]: row for row in map(json.loads, lines)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"results {self.path} cannot be read ({error}); mend or remove the file") from error

    def add(self, row: dict[str, Any]) -> None:
        """Add a row to what the file has now, and write it anew. Raises StorageError."""
        with FileLock(self.path.with_name(self.path.name + ".lock")):
            self.rows = self.rows | self._read() | {row["key"]: row}
            text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.rows.values())
            write_whole(self.path, text, what="the results")

    def check(self) -> None:
        """Raises StorageError where rows could not be added."""
        check_writable(self.path, what="the results")
