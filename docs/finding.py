"""Figures and tables of docs/training-factors.md, from the results in research/training-factors.

`make finding` draws the figures into docs/images and prints the page. Without results it says which command makes them,
and the page is not in the navigation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from quantlens.errors import QuantlensError
from quantlens.plots.style import (
    FAINT,
    MUTED,
    PAPER,
    Figure,
    Look,
    Panel,
    PanelRow,
    composed,
    encodings,
    finished,
    tooltips,
)
from quantlens.zoo.designs import Experiment, load_experiment
from quantlens.zoo.experiment.effects import (
    FP32,
    Rows,
    effects_on,
    factorial,
    mediations_on,
    outcome,
    table as values_of,
)
from quantlens.zoo.experiment.rows import Results, on_the_way

DOCS = Path(__file__).resolve().parent
FOLDER = DOCS.parent / "research" / "training-factors"
IMAGES = DOCS / "images"
COMMAND = "python -m quantlens.zoo.experiment research/training-factors/experiment.yaml --only '!screening.*'"
MISSING = f"There are no results yet: `{COMMAND}` makes them (`--list` says in how many hours)."
OUTCOMES = {
    "id.top1": "top-1",
    "ood_mean.near.msp.auroc": "AUROC, near OOD",
    "ood_mean.far.msp.auroc": "AUROC, far OOD",
}
EXPECTED = {-1: "−", 0: "none", 1: "+"}
READOUT = "weights"


@cache
def finding(folder: Path = FOLDER) -> tuple[Experiment, Rows] | None:
    """The experiment and its results; None where the factorial is not measured, and judged, as a whole."""
    experiment = load_experiment(folder / "experiment.yaml")
    rows = Results(folder / "results.jsonl").rows
    try:
        for setting in experiment.judged_settings:
            mediations_on(experiment, rows, experiment.primary[0], (*setting, READOUT))
        list(courses(experiment, rows))
    except QuantlensError:
        return None
    return experiment, rows


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def estimated(one: Any) -> str:
    """An effect, or what is carried of one, in points, with its interval and verdict."""
    words = f"{points(one.estimate)} ({points(one.low)} to {points(one.high)})"
    return f"**{words}**" if one.verdict == "effect" else f"{words}, {one.verdict}"


def titled(name: str) -> str:
    return name.removeprefix("screening.").replace("_", " ")


# -- tables: heads and rows


def cells(experiment: Experiment, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Every cell: outcomes of FP32 in percent and their changes in points, means and standard deviations over seeds."""
    settings = [(FP32, "FP32"), *experiment.judged_settings]
    head = ["trained", *(f"{OUTCOMES.get(p, p)}, {name(s)}" for p in experiment.primary for s in settings)]
    columns = [values_of(experiment, rows, p, (*s, READOUT)) for p in experiment.primary for s in settings]
    by_cell = 100 * np.stack(columns, axis=2).transpose(1, 2, 0)  # [cells, columns, seeds]
    found = []
    for cell, values in zip(factorial(experiment), by_cell, strict=True):
        told = [f"{v.mean():.1f} ± {v.std(ddof=1):.1f}".replace("-", "−") for v in values]
        found.append([cell.name.replace("-", ", "), *told])
    return head, found


def name(setting: tuple[str, str]) -> str:
    return "FP32" if setting[0] == FP32 else f"change by `{setting[0]}` {setting[1]}"


def factors(experiment: Experiment, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Main effects, and what was expected of them."""
    expected = {(h.factor, h.outcome): EXPECTED[h.sign] for h in experiment.hypotheses}
    found = []
    for factor in experiment.factors:
        for path in experiment.primary:
            told = [_effect(experiment, rows, path, setting, factor) for setting in experiment.judged_settings]
            found.append([factor.replace("_", " "), OUTCOMES.get(path, path), expected.get((factor, path), "–"), *told])
    return ["factor", "outcome", "expected", *_settings(experiment)], found


def _effect(experiment: Experiment, rows: Rows, path: str, setting: tuple[str, str], factor: str) -> str:
    found = effects_on(experiment, rows, path, (*setting, READOUT))
    return estimated(next(one for one in found if one.name.split(" = ")[0] == factor))


def arms(experiment: Experiment, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Every arm that is measured against the cell that it is like."""
    found: dict[str, list[str]] = {}
    for path in experiment.primary:
        for setting in experiment.judged_settings:
            for one in effects_on(experiment, rows, path, (*setting, READOUT)):
                if " (like " in one.name:
                    found.setdefault(titled(one.name), []).append(estimated(one))
    heads = [f"{OUTCOMES.get(p, p)}, {s}" for p in experiment.primary for s in _settings(experiment)]
    return ["arm", *heads], [[arm, *told] for arm, told in found.items()]


def carried(experiment: Experiment, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What mediators carry of each factor's effect on the first of the primary outcomes."""
    found: dict[tuple[str, str], list[str]] = {}
    for setting in experiment.judged_settings:
        for one in mediations_on(experiment, rows, experiment.primary[0], (*setting, READOUT)):
            found.setdefault((one.factor.replace("_", " "), one.mediator), []).append(estimated(one))
    return ["factor", "mediator", *_settings(experiment)], [[*key, *told] for key, told in found.items()]


def _settings(experiment: Experiment) -> list[str]:
    return [f"`{method}` {bits}" for method, bits in experiment.judged_settings]


TABLES: dict[str, Callable[[Experiment, Rows], tuple[list[str], list[list[str]]]]] = {
    "training-cells": cells,
    "training-effects": factors,
    "training-arms": arms,
    "training-mediators": carried,
}


# -- figures


def forest(experiment: Experiment, rows: list[dict[str, Any]], caption: str) -> Panel:
    """Estimates with intervals, a line each, methods side by side; what lies in the bound is shaded."""
    looks = {line: Look(i, i) for i, line in enumerate(_settings(experiment))}
    bound = 100 * experiment.bound
    y = alt.Y("what:N", sort=None, title=None, axis=alt.Axis(labelLimit=260, labelAngle=0))
    offset = alt.YOffset("line:N", scale=alt.Scale(domain=list(looks)))
    x = alt.X("x:Q", title="points")
    used = encodings(looks)
    del used["strokeDash"]
    band = alt.Chart(alt.Data(values=[{"a": -bound, "b": bound}])).mark_rect(color=FAINT).encode(x="a:Q", x2="b:Q")
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=MUTED).encode(x="zero:Q")
    base = alt.Chart().encode(y=y, yOffset=offset, tooltip=tooltips(line="by", said="is"))
    lines = base.mark_rule(strokeWidth=1.5).encode(x=alt.X("low:Q", title="points"), x2="high:Q", color=used["color"])
    dots = base.mark_point(filled=True, opacity=1, size=55, stroke=PAPER, strokeWidth=0.6).encode(x=x, **used)
    count = len({row["what"] for row in rows})
    return Panel(alt.layer(band, zero, lines, dots).properties(height=34 * count + 20), rows, caption)


def interval(line: str, what: str, one: Any) -> dict[str, Any]:
    ends = {"x": 100 * one.estimate, "low": 100 * one.low, "high": 100 * one.high}
    return {"line": line, "what": what, "said": f"{what}: {estimated(one).strip('*')}", **ends}


def effects_figure(experiment: Experiment, rows: Rows) -> list[Panel]:
    """Main effects on every primary outcome."""
    panels = []
    for path in experiment.primary:
        found = []
        for line, setting in zip(_settings(experiment), experiment.judged_settings, strict=True):
            every = effects_on(experiment, rows, path, (*setting, READOUT))[: len(experiment.factors)]
            found += [interval(line, one.name.replace("_", " "), one) for one in every]
        panels.append(forest(experiment, found, f"Effect on the change of {OUTCOMES.get(path, path)}"))
    return panels


def mediators_figure(experiment: Experiment, rows: Rows) -> list[Panel]:
    """What mediators carry, a panel per factor."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line, setting in zip(_settings(experiment), experiment.judged_settings, strict=True):
        for one in mediations_on(experiment, rows, experiment.primary[0], (*setting, READOUT)):
            found.setdefault(one.factor, []).append(interval(line, one.mediator, one))
    first = OUTCOMES.get(experiment.primary[0], experiment.primary[0])
    return [
        forest(experiment, of, f"Carried of the effect of {factor.replace('_', ' ')} on {first}")
        for factor, of in found.items()
    ]


def courses(experiment: Experiment, rows: Rows) -> Iterator[tuple[str, str, str, float, float]]:
    """(factor, level, method, share of the last phase, change of the first primary outcome) at every checkpoint, means
    over all trainings of a level."""
    path, way = experiment.primary[0], experiment.trajectory
    assert way is not None
    runs = [run for run in experiment.runs() if not run.cell.family]
    for method, bits in way.settings:
        for place, (step, _) in enumerate(on_the_way(runs[0].recipe)):
            found = [outcome(experiment, rows, run, path, method, bits, READOUT, place) for run in runs]
            for factor, levels in experiment.factors.items():
                for level in levels:
                    of = [v for v, run in zip(found, runs, strict=True) if run.cell.levels[factor] == level]
                    yield factor, level, f"`{method}` {bits}", step / runs[0].recipe.steps, float(np.mean(of))


def trajectory_figure(experiment: Experiment, rows: Rows) -> list[Panel]:
    """The change on the way, a panel per factor."""
    found: dict[str, list[dict[str, Any]]] = {}
    for factor, level, setting, share, value in courses(experiment, rows):
        said = f"{level}, {setting}, {100 * share:.0f} % of the steps: {points(value)} points"
        row = {"line": f"{level}, {setting}", "x": 100 * share, "y": 100 * value, "said": said}
        found.setdefault(factor, []).append(row)
    first = OUTCOMES.get(experiment.primary[0], experiment.primary[0])
    return [_course(of, f"Change of {first} by {factor.replace('_', ' ')}") for factor, of in found.items()]


def _course(rows: list[dict[str, Any]], caption: str) -> Panel:
    names = list(dict.fromkeys(row["line"] for row in rows))
    looks = {line: Look(i % 2, i // 2) for i, line in enumerate(names)}
    used = encodings(looks)
    base = alt.Chart().encode(
        x=alt.X("x:Q", title="steps of the last phase, %", scale=alt.Scale(domain=[0, 100])),
        y=alt.Y("y:Q", title="points, quantized − FP32", scale=alt.Scale(zero=False)),
        tooltip=tooltips(line="line", said="is"),
    )
    lines = base.mark_line(strokeWidth=1.5).encode(color=used["color"], strokeDash=used["strokeDash"])
    dots = base.mark_point(filled=True, opacity=1, size=40).encode(color=used["color"], shape=used["shape"])
    return Panel(alt.layer(lines, dots).properties(height=230), rows, caption)


FIGURES: dict[str, tuple[str, Callable[[Experiment, Rows], list[Panel]]]] = {
    "training-effects-figure": ("Effects of the factors on what four bits change", effects_figure),
    "training-trajectory-figure": ("What four bits change along the training", trajectory_figure),
    "training-mediators-figure": ("What mediators carry of the effects", mediators_figure),
}


# -- what is made


def image(mark: str) -> str:
    return f"{mark.removesuffix('-figure')}.svg"


def marks(table: Callable[[list[str], list[list[str]]], str]) -> dict[str, Callable[[], str]]:
    """Mark of the page -> what stands there; table: makes Markdown of a head and rows."""

    def filled(of: Callable[[Experiment, Rows], tuple[list[str], list[list[str]]]]) -> Callable[[], str]:
        return lambda: "" if (found := finding()) is None else table(*of(*found))

    def shown(mark: str) -> Callable[[], str]:
        return lambda: "" if finding() is None else f"![{FIGURES[mark][0]}](images/{image(mark)})\n"

    status = {"training-status": lambda: MISSING if finding() is None else ""}
    return status | {mark: filled(of) for mark, of in TABLES.items()} | {mark: shown(mark) for mark in FIGURES}


def draw(folder: Path = FOLDER, images: Path = IMAGES) -> Sequence[Path]:
    """Draw all figures; none without results."""
    found = finding(folder)
    if found is None:
        return []
    drawn = {m: Figure(finished(composed([PanelRow("", make(*found))]))) for m, (_, make) in FIGURES.items()}
    return [figure.save(images / image(mark)) for mark, figure in drawn.items()]


if __name__ == "__main__":
    made = draw()
    if not made:
        print(MISSING)
    else:
        from generate import filled

        print(filled((DOCS / "training-factors.md").read_text(encoding="utf-8")))
        print("drawn: " + ", ".join(map(str, made)), file=sys.stderr)
