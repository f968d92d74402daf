"""The command `python -m quantlens.zoo.experiment`."""

import argparse
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from quantlens.errors import QuantlensError
from quantlens.evaluation.shift import corruptions
from quantlens.methods import registry
from quantlens.metrics import choose_scores
from quantlens.qmodel import Bits
from quantlens.zoo.designs import SCREENING, Experiment, Run, load_experiment
from quantlens.zoo.experiment.check import trained_again
from quantlens.zoo.experiment.effects import effects_on, mediations_on
from quantlens.zoo.experiment.laboratory import Laboratory
from quantlens.zoo.experiment.rows import FP32, MEDIATORS, Measurement, Results, measurements
from quantlens.zoo.recipes import Recipe

FAMILIES = {"": "factorial", "arms": "arms", SCREENING: "screening"}


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
    parser.add_argument(
        "--only", default="*", help="trainings whose names match, such as '*-s0'; '!PATTERN': all others"
    )
    parser.add_argument("--limit", type=int, help="at most so many trainings and measurements")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--list", action="store_true", help="say what is done, what is missing and its hours, and stop")
    parser.add_argument("--effects", action="store_true", help="print the effects on the primary outcomes, and stop")
    parser.add_argument("--equal", help="effects at an equal value of a metric of FP32, such as id.top1")
    parser.add_argument("--mediation", action="store_true", help="print what mediators carry of the effects, and stop")
    parser.add_argument("--check", metavar="NAME", help="train this one again, and compare it with the results")
    parser.add_argument("--within", type=float, default=3.0, help="of --check: so many standard deviations over seeds")
    given = parser.parse_args(arguments)
    try:
        experiment = checked(load_experiment(given.file))
        results = Results(given.results or given.file.parent / "results.jsonl")
        laboratory = Laboratory(experiment, given.out or Path(f"{experiment.name}-runs"), given.device)
        runs = _chosen(experiment, given.check or given.only)
        if given.list:
            _list(laboratory, results, runs)
        elif given.effects:
            _effects(experiment, results, given.equal)
        elif given.mediation:
            _mediation(experiment, results)
        elif given.check:
            _check(laboratory, results, runs, given.within, parser)
        else:
            done = laboratory.run(results, runs, limit=given.limit, tell=lambda text: print(text, flush=True))
            print("all is measured" if done else "more is missing: call again", flush=True)
    except QuantlensError as error:
        parser.exit(2, f"error: {error}\n")


def _chosen(experiment: Experiment, pattern: str) -> list[Run]:
    others = pattern.startswith("!")
    runs = [run for run in experiment.runs() if fnmatchcase(run.name, pattern.removeprefix("!")) != others]
    if not runs:
        raise QuantlensError(f"no training is called {pattern!r}; --list names them")
    return runs


def _list(laboratory: Laboratory, results: Results, runs: Sequence[Run]) -> None:
    for run in runs:
        wanted = [one.key(laboratory.experiment) for one in measurements(laboratory.experiment, run)]
        state = "trained" if laboratory.weights(run).exists() else "not trained"
        print(f"{run.name}: {state}, {sum(key in results.rows for key in wanted)} of {len(wanted)} measured")
    for line in totals(laboratory, results, runs):
        print(line)


def totals(laboratory: Laboratory, results: Results, runs: Sequence[Run]) -> Iterator[str]:
    """Of each family: how many trainings, steps (of a pretraining that several share, once) and measurements it has,
    the hours that they take by the file's `costs`, and the hours of what is missing."""
    experiment, shared = laboratory.experiment, set[str]()
    base = next(experiment.runs()).recipe
    for family, title in FAMILIES.items():
        mine, steps, hours, missing, count = [r for r in runs if r.cell.family == family], 0, 0.0, 0.0, 0
        for run in mine:
            asked = list(measurements(experiment, run))
            left = [one for one in asked if one.key(experiment) not in results.rows]
            first = sum(phase[1] for phase in run.recipe.phases[:-1]) if run.recipe.pretrained not in shared else 0
            shared.add(run.recipe.pretrained)
            mine_steps = first + run.recipe.steps
            training = mine_steps * _work(run.recipe) / _work(base)
            steps, count = steps + mine_steps, count + len(asked)
            hours += _hours(experiment, training, asked)
            missing += _hours(experiment, training if left and not laboratory.weights(run).exists() else 0, left)
        told = f"{title}: {len(mine)} trainings, {steps} steps, {count} measurements"
        if mine:
            hint = "" if experiment.costs is None else f", about {hours:.1f} hours, {missing:.1f} of them missing"
            yield told + hint


def _work(recipe: Recipe) -> float:
    """What a step costs, up to a factor: as the width, not its square, as small matrices are slow for their size."""
    return recipe.batch_size * recipe.model.depth * recipe.model.width * (recipe.size // recipe.model.patch) ** 2


def _hours(experiment: Experiment, steps: float, asked: Sequence[Measurement]) -> float:
    costs = experiment.costs
    if costs is None:
        return 0.0
    way, carried = sum(m.step is not None for m in asked), sum(m.method == MEDIATORS for m in asked)
    seconds = costs.step * steps + costs.trajectory * way + costs.mediators * carried
    return (seconds + costs.measurement * (len(asked) - way - carried)) / 3600


def _effects(experiment: Experiment, results: Results, equal: str | None) -> None:
    print("readout\tmethod\tbits\toutcome\teffect\testimate\tlow\thigh\tp (Holm)\tsize\tverdict")
    settings = [(FP32, "FP32"), *experiment.settings]
    for readout, setting, path in product(experiment.readouts, settings, experiment.primary):
        for one in effects_on(experiment, results.rows, path, (*setting, readout), equal=equal):
            numbers = [f"{value:.4f}" for value in (one.estimate, one.low, one.high, one.p_holm, one.size)]
            print("\t".join([readout, *setting, path, one.name, *numbers, one.verdict]))


def _mediation(experiment: Experiment, results: Results) -> None:
    print("method\tbits\toutcome\tfactor\tmediator\teffect\tat equal\tcarried\tlow\thigh\tp (Holm)\tverdict")
    for setting, path in product(experiment.judged_settings, experiment.primary):
        for one in mediations_on(experiment, results.rows, path, (*setting, experiment.readouts[0])):
            values = (one.total.estimate, one.direct.estimate, one.estimate, one.low, one.high, one.p_holm)
            print("\t".join([*setting, path, one.factor, one.mediator, *(f"{v:.4f}" for v in values), one.verdict]))


def _check(
    laboratory: Laboratory, results: Results, runs: Sequence[Run], within: float, parser: argparse.ArgumentParser
) -> None:
    if len(runs) > 1:
        raise QuantlensError(f"--check is of one training, and {len(runs)} are called so; --list names them")
    outside = 0
    print("method\tbits\toutcome\tin the results\tagain\tspread over seeds\tagrees", flush=True)
    for one in trained_again(laboratory, results.rows, runs[0], within):
        numbers = [f"{value:.4f}" for value in (one.before, one.again, one.spread)]
        print("\t".join([one.method, one.bits, one.outcome, *numbers, "yes" if one.inside else "no"]), flush=True)
        outside += not one.inside
    if outside:
        parser.exit(1, f"{outside} outcomes are more than {within:g} standard deviations over seeds away\n")
    print(f"all are within {within:g} standard deviations over seeds")
