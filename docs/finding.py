"""Figures and tables of docs/training-factors.md, from the results in research/training-factors.

`make finding` draws the figures into docs/images and prints the page. Without results it says which command makes them,
and the page is not in the navigation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from quantlens.errors import QuantlensError
from quantlens.metrics.factors import Effect, Mediation
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
Setting = tuple[str, str]
"""Method and precision."""
Course = tuple[str, str, float, float]
"""Factor, level and setting in words, share of the steps of the last phase, change."""
Table = tuple[list[str], list[list[str]]]
EXPECTED = {-1: "−", 0: "none", 1: "+"}
READOUT = "weights"


@dataclass(frozen=True)
class Finding:
    """An experiment with its results and what they say: effects by outcome and setting, what mediators carry of those
    on the first outcome, and the way there."""

    experiment: Experiment
    rows: Rows
    effects: dict[tuple[str, Setting], list[Effect]]
    mediations: dict[Setting, list[Mediation]]
    courses: list[Course]

    @property
    def names(self) -> list[str]:
        """Of the settings, in words."""
        return [f"{method} {bits}" for method, bits in self.experiment.judged_settings]


@cache
def finding(folder: Path = FOLDER) -> Finding | None:
    """What is in a folder; None where the factorial is not measured as a whole."""
    experiment = load_experiment(folder / "experiment.yaml")
    rows, judged = Results(folder / "results.jsonl").rows, experiment.judged_settings
    try:
        effects = {
            (path, setting): effects_on(experiment, rows, path, (*setting, READOUT))
            for path, setting in product(experiment.primary, judged)
        }
        carried = {one: mediations_on(experiment, rows, experiment.primary[0], (*one, READOUT)) for one in judged}
        return Finding(experiment, rows, effects, carried, list(courses(experiment, rows)))
    except QuantlensError:
        return None


def courses(experiment: Experiment, rows: Rows) -> Iterator[Course]:
    """The change of the first outcome at every checkpoint, means over all trainings of a level."""
    path, way = experiment.primary[0], experiment.trajectory
    assert way is not None
    runs = [run for run in experiment.runs() if not run.cell.family]
    for method, bits in way.settings:
        for place, (step, _) in enumerate(on_the_way(runs[0].recipe)):
            found = [outcome(experiment, rows, run, path, method, bits, READOUT, place) for run in runs]
            for factor, levels in experiment.factors.items():
                for level in levels:
                    of = [v for v, run in zip(found, runs, strict=True) if run.cell.levels[factor] == level]
                    yield factor, f"{level}, {method} {bits}", step / runs[0].recipe.steps, float(np.mean(of))


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def estimated(one: Any) -> str:
    """An effect, or what is carried of one, in points, with its interval and verdict."""
    words = f"{points(one.estimate)} ({points(one.low)} to {points(one.high)})"
    return f"**{words}**" if one.verdict == "effect" else f"{words}, {one.verdict}"


def in_words(name: str) -> str:
    return name.removeprefix("screening.").replace("_", " ")


def called(path: str) -> str:
    return OUTCOMES.get(path, path)


# -- tables: heads and rows


def cells(found: Finding) -> Table:
    """Every outcome and cell: FP32 in percent and its changes in points, means and standard deviations over seeds."""
    experiment, settings = found.experiment, [(FP32, "FP32"), *found.experiment.judged_settings]
    lines = []
    for path in experiment.primary:
        columns = [values_of(experiment, found.rows, path, (*setting, READOUT)) for setting in settings]
        by_cell = 100 * np.stack(columns, axis=2).transpose(1, 2, 0)  # [cells, columns, seeds]
        for cell, values in zip(factorial(experiment), by_cell, strict=True):
            told = [f"{v.mean():.1f} ± {v.std(ddof=1):.1f}".replace("-", "−") for v in values]
            lines.append([called(path), cell.name.replace("-", ", "), *told])
    return ["outcome", "trained", "FP32", *(f"change by {one}" for one in found.names)], lines


def factors(found: Finding) -> Table:
    """Main effects, and what was expected of them."""
    experiment, lines = found.experiment, []
    expected = {(h.factor, h.outcome): EXPECTED[h.sign] for h in experiment.hypotheses}
    for place, factor in enumerate(experiment.factors):
        for path in experiment.primary:
            told = [estimated(found.effects[path, setting][place]) for setting in experiment.judged_settings]
            lines.append([in_words(factor), called(path), expected.get((factor, path), "–"), *told])
    return ["factor", "outcome", "expected", *found.names], lines


def arms(found: Finding) -> Table:
    """Every arm that is measured against the cell that it is like."""
    lines: dict[tuple[str, str], list[str]] = {}
    for (path, _), every in found.effects.items():
        for one in every:
            if " (like " in one.name:
                lines.setdefault((in_words(one.name), called(path)), []).append(estimated(one))
    return ["arm", "outcome", *found.names], [[*key, *told] for key, told in lines.items()]


def carried(found: Finding) -> Table:
    """What mediators carry of each factor's effect on the first of the primary outcomes."""
    lines: dict[tuple[str, str], list[str]] = {}
    for one in (one for every in found.mediations.values() for one in every):
        lines.setdefault((in_words(one.factor), one.mediator), []).append(estimated(one))
    return ["factor", "mediator", *found.names], [[*key, *told] for key, told in lines.items()]


TABLES: dict[str, Callable[[Finding], Table]] = {
    "training-cells": cells,
    "training-effects": factors,
    "training-arms": arms,
    "training-mediators": carried,
}


# -- figures


def forest(found: Finding, rows: list[dict[str, Any]], caption: str) -> Panel:
    """Estimates with intervals, a line each, methods side by side; what lies in the bound is shaded."""
    looks = {line: Look(i, i) for i, line in enumerate(found.names)}
    bound = 100 * found.experiment.bound
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


def effects_figure(found: Finding) -> list[Panel]:
    """Main effects on every primary outcome."""
    experiment, panels = found.experiment, []
    for path in experiment.primary:
        rows = [
            interval(line, in_words(one.name), one)
            for line, setting in zip(found.names, experiment.judged_settings, strict=True)
            for one in found.effects[path, setting][: len(experiment.factors)]
        ]
        panels.append(forest(found, rows, f"Effect on the change of {called(path)}"))
    return panels


def mediators_figure(found: Finding) -> list[Panel]:
    """What mediators carry, a panel per factor."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line, every in zip(found.names, found.mediations.values(), strict=True):
        for one in every:
            rows.setdefault(in_words(one.factor), []).append(interval(line, one.mediator, one))
    first = called(found.experiment.primary[0])
    return [forest(found, of, f"Carried of the effect of {factor} on {first}") for factor, of in rows.items()]


def trajectory_figure(found: Finding) -> list[Panel]:
    """The change on the way, a panel per factor."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for factor, line, share, value in found.courses:
        said = f"{line}, {100 * share:.0f} % of the steps: {points(value)} points"
        rows.setdefault(factor, []).append({"line": line, "x": 100 * share, "y": 100 * value, "said": said})
    first = called(found.experiment.primary[0])
    return [_course(of, f"Change of {first} by {in_words(factor)}") for factor, of in rows.items()]


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


FIGURES: dict[str, tuple[str, Callable[[Finding], list[Panel]]]] = {
    "training-effects-figure": ("Effects of the factors on what four and three bits change", effects_figure),
    "training-trajectory-figure": ("What four and three bits change along the training", trajectory_figure),
    "training-mediators-figure": ("What mediators carry of the effects", mediators_figure),
}


# -- what is made


def image(mark: str) -> str:
    return f"{mark.removesuffix('-figure')}.svg"


def marks(table: Callable[[list[str], list[list[str]]], str]) -> dict[str, Callable[[], str]]:
    """Mark of the page -> what stands there; table: makes Markdown of a head and rows."""

    def filled(of: Callable[[Finding], Table]) -> Callable[[], str]:
        return lambda: "" if (found := finding()) is None else table(*of(found))

    def shown(mark: str) -> Callable[[], str]:
        return lambda: "" if finding() is None else f"![{FIGURES[mark][0]}](images/{image(mark)})\n"

    status = {"training-status": lambda: MISSING if finding() is None else ""}
    return status | {mark: filled(of) for mark, of in TABLES.items()} | {mark: shown(mark) for mark in FIGURES}


def draw(folder: Path = FOLDER, images: Path = IMAGES) -> Sequence[Path]:
    """Draw all figures; none without results."""
    found = finding(folder)
    if found is None:
        return []
    drawn = {m: Figure(finished(composed([PanelRow("", make(found))]))) for m, (_, make) in FIGURES.items()}
    return [figure.save(images / image(mark)) for mark, figure in drawn.items()]


if __name__ == "__main__":
    made = draw()
    if not made:
        print(MISSING)
    else:
        from generate import filled

        print(filled((DOCS / "training-factors.md").read_text(encoding="utf-8")))
        print("drawn: " + ", ".join(map(str, made)), file=sys.stderr)
