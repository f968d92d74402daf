"""What an experiment's results say: effects of factors and arms, and what mediators carry of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlens.errors import QuantlensError
from quantlens.metrics.factors import Effect, Mediation, effects, factorial_effects, mediations
from quantlens.zoo.designs import SCREENING, Cell, Experiment, Run
from quantlens.zoo.experiment.mediators import MEASURED
from quantlens.zoo.experiment.rows import FP32, MEDIATORS, Measurement, measurements, on_the_way

Rows = Mapping[str, Mapping[str, Any]]
"""Key of a measurement -> its row."""
Setting = tuple[str, str, str]
"""Method, precision, and which of a training's weights."""
Array = NDArray[Any]

RELATIVE_LOSS = "relative_loss"
"""An outcome besides the metrics: (top-1 of FP32 - top-1) / (1 - top-1 of FP32)."""


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


def judged(
    experiment: Experiment, run: Run, method: str, bits: str, readout: str, checkpoint: int | None = None
) -> tuple[Measurement, list[Measurement]]:
    """The measurement of FP32 and those of a method at a precision, a calibration seed each. checkpoint: the number of
    a point of the trajectory, -1 being the last weights; None: of the weights `readout` on all images. Raises
    QuantlensError where the experiment measures no such thing."""
    step = None if checkpoint is None else on_the_way(run.recipe)[checkpoint][0]
    mine = [m for m in measurements(experiment, run) if m.step == step and (step or m.readout == readout)]
    wanted = [m for m in mine if (m.method, m.bits) == (method, bits)]
    if not wanted:
        raise QuantlensError(
            f"{run.name} is not measured at {method} {bits} ({readout}): the file asks for no such row"
        )
    return mine[0], wanted


def outcome(
    experiment: Experiment,
    rows: Rows,
    run: Run,
    path: str,
    method: str,
    bits: str,
    readout: str,
    checkpoint: int | None = None,
) -> float:
    """The change of an outcome by quantization, the mean over calibration seeds; of FP32 and of a mediator the value
    itself. Raises QuantlensError where a measurement is missing."""
    first, wanted = judged(experiment, run, method, bits, readout, checkpoint)
    found = [rows.get(m.key(experiment)) for m in (first, *wanted)]
    if None in found:
        raise QuantlensError(f"{run.name} is not measured at {method} {bits} ({readout}); run the experiment first")
    relative = path == RELATIVE_LOSS
    there = [row for row in found if row is not None]
    value = float(np.mean([outcome_of(row, "id.top1" if relative else path) for row in there[1:]]))
    if method in (FP32, MEDIATORS):
        return value
    reference = outcome_of(there[0], "id.top1" if relative else path)
    return (reference - value) / max(1 - reference, 1e-9) if relative else value - reference


def table(
    experiment: Experiment,
    rows: Rows,
    path: str,
    setting: Setting,
    cells: Sequence[Cell] | None = None,
    checkpoint: int | None = None,
) -> Array:
    """:func:`outcome` of every training [seeds, cells]; cells: those of the factorial. Raises QuantlensError where a
    measurement is missing."""
    names = [cell.name for cell in (factorial(experiment) if cells is None else cells)]
    found = {
        (run.seed, run.cell.name): outcome(experiment, rows, run, path, *setting, checkpoint)
        for run in experiment.runs()
        if run.cell.name in names
    }
    return np.array([[found[seed, name] for name in names] for seed in experiment.seeds])


def factorial(experiment: Experiment) -> list[Cell]:
    """The cells that are no arms."""
    return [cell for cell in experiment.cells() if not cell.family]


def signs(experiment: Experiment) -> Array:
    """Levels, -1 or 1 [cells of the factorial, factors]."""
    order = {name: list(levels) for name, levels in experiment.factors.items()}
    return np.array([[2 * order[f].index(v) - 1 for f, v in cell.levels.items()] for cell in factorial(experiment)])


def effects_on(
    experiment: Experiment, rows: Rows, path: str, setting: Setting, *, equal: str | None = None
) -> list[Effect]:
    """What the factors, their interactions, and the arms (against the cells that they are like) do to the change of an
    outcome by quantization; to the outcome itself for FP32. Arms that are not measured yet are left out. equal: a
    metric of FP32 at whose equal values effects are taken. Raises QuantlensError where the factorial is not measured.
    """
    bound = experiment.bound

    def values_of(cells: Sequence[Cell]) -> tuple[Array, Array | None]:
        other = None if equal is None else table(experiment, rows, equal, (FP32, "FP32", setting[2]), cells)
        return table(experiment, rows, path, setting, cells), other

    whole, found = factorial(experiment), list[Effect]()
    if experiment.factors:
        values, other = values_of(whole)
        found = factorial_effects(values, signs(experiment), list(experiment.factors), bound, covariate=other)
    for family in ("arms", SCREENING):
        arms = [
            cell for cell in experiment.cells() if cell.family == family and _there(experiment, rows, cell, setting)
        ]
        names, contrasts = [cell.name for cell in (*whole, *arms)], dict[str, Any]()
        for cell in arms:
            like = next(one.name for one in whole if one.levels == cell.levels)
            contrasts[f"{cell.name} (like {like})"] = [(name == cell.name) - (name == like) for name in names]
        if contrasts:
            values, other = values_of([*whole, *arms])
            found += effects(values, contrasts, bound, covariate=other)
    return found


def _there(experiment: Experiment, rows: Rows, cell: Cell, setting: Setting) -> bool:
    """Whether all trainings of an arm are measured at a setting."""
    if cell.family == SCREENING and setting[:2] not in (*experiment.judged_settings, (FP32, "FP32")):
        return False
    asked = [judged(experiment, run, *setting) for run in experiment.runs() if run.cell.name == cell.name]
    return all(m.key(experiment) in rows for first, wanted in asked for m in (first, *wanted))


def mediations_on(experiment: Experiment, rows: Rows, path: str, setting: Setting) -> list[Mediation]:
    """What each mediator carries of each factor's effect on the change of an outcome by quantization. Raises
    QuantlensError where the factorial or its mediators are not measured."""
    of_mediators = (MEDIATORS, "FP32", setting[2])
    found = {name: table(experiment, rows, f"{MEDIATORS}.{name}", of_mediators) for name in MEASURED}
    moved = {MEASURED[name].title: np.log(v) if MEASURED[name].log else v for name, v in found.items()}
    contrasts = dict(zip(experiment.factors, signs(experiment).T * (2 / len(factorial(experiment))), strict=True))
    return mediations(table(experiment, rows, path, setting), moved, contrasts, experiment.bound)
