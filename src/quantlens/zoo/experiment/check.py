"""One training again, and whether it gives the numbers that are in the results."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlens.metrics.factors import spread
from quantlens.zoo.designs import Run
from quantlens.zoo.experiment.effects import Rows, judged, outcome, table
from quantlens.zoo.experiment.laboratory import Laboratory
from quantlens.zoo.experiment.rows import FP32
from quantlens.zoo.train import step_bar
from quantlens.zoo.training import train

READOUT = "weights"


@dataclass(frozen=True)
class Agreement:
    """An outcome of a training as it is in the results and as it came out again: of FP32 the value, of a method the
    change by quantization. spread: the standard deviation of one training over seeds. inside: whether the difference is
    at most so many of them as was asked."""

    outcome: str
    method: str
    bits: str
    before: float
    again: float
    spread: float
    inside: bool


def trained_again(laboratory: Laboratory, rows: Rows, run: Run, within: float) -> Iterator[Agreement]:
    """Train one of an experiment's trainings again, from nothing and in a temporary folder, measure its last weights at
    what is judged, and compare all primary outcomes with `rows`. Raises QuantlensError where these do not have them, or
    not those of the whole factorial, of which the spread is."""
    experiment = laboratory.experiment
    settings = [(FP32, "FP32"), *experiment.judged_settings]
    asked = [(path, *setting) for setting in settings for path in experiment.primary]
    before = [outcome(experiment, rows, run, *one, READOUT) for one in asked]
    spreads = [spread(table(experiment, rows, path, (method, bits, READOUT))) for path, method, bits in asked]
    with tempfile.TemporaryDirectory() as folder:
        again = Laboratory(experiment, Path(folder), laboratory.device, laboratory.cache_dir)
        found = _measured(again, run, settings)
    for (path, method, bits), was, sigma in zip(asked, before, spreads, strict=True):
        now = outcome(experiment, found, run, path, method, bits, READOUT)
        yield Agreement(path, method, bits, was, now, sigma, abs(now - was) <= within * sigma + 1e-6)


def _measured(again: Laboratory, run: Run, settings: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Rows, by their keys, of a training that is done first."""
    with step_bar(run.name) as bar:
        train(run.recipe, again.weights(run).parent, device=again.device, cache_dir=again.cache_dir, report=bar)
    asked = [m for method, bits in settings for m in judged(again.experiment, run, method, bits, READOUT)[1]]
    return {row["key"]: row for row in map(again.measure, asked)}
