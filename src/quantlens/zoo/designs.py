"""Experiments on training as data (YAML): recipes that differ in factors, made with several seeds, and what is measured
on each of them at which precisions. `experiment` runs one; docs/training.md has every key."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from quantlens.errors import QuantlensError
from quantlens.yaml_files import Strict, checked, read_yaml
from quantlens.zoo.recipes import Count, Images, Positive, Recipe, parse_recipe

Changes = dict[str, Any]
SCREENING = "screening"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*$")]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Arm(Strict):
    """A cell outside the factorial: that of the levels `like` with changes. It is compared with that cell."""

    like: dict[Name, Name]
    changes: Changes


class Screening(Strict):
    """Arms that change one thing each of the cell `like`: {name: changes}. They are measured at what is `judged`."""

    like: dict[Name, Name]
    changes: dict[Name, Changes]


class OodImages(Images):
    """An OOD set, or the classes of one that are."""

    group: Literal["near", "far"] = "far"


class CalibrationImages(Strict):
    """How many images each of the seeds draws from `fit`."""

    n: Annotated[int, Field(ge=1)] = 32
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)


class Settings(Strict):
    """Methods, each at all of these precisions."""

    methods: tuple[str, ...] = Field(min_length=1)
    bits: tuple[str, ...] = Field(min_length=1)

    @property
    def settings(self) -> list[tuple[str, str]]:
        """(method, precision) of each."""
        return list(product(self.methods, self.bits))


class Trajectory(Settings):
    """What is measured of every checkpoint and of the last weights, on so many of the ID images (drawn with seed 0)
    and at most as many of each OOD set; without shift, and with the first seed of calibration."""

    images: Count = 1000


class MediatorImages(Strict):
    """images: so many of the ID images, drawn with seed 0. probes: of the Hessian's trace, on every 32 of them."""

    images: Count = 256
    probes: Count = 8


class Costs(Strict):
    """Seconds, from which `--list` takes hours: of a step of the shared recipe, of a measurement on all images, of one
    of the trajectory, and of the mediators."""

    step: Positive
    measurement: Positive
    trajectory: Positive
    mediators: Positive


class Hypothesis(Strict):
    """What is expected of a factor before any run: the sign of its effect (high less low) on the change of an outcome,
    0 for none."""

    factor: str
    outcome: str
    sign: Literal[-1, 0, 1]
    why: str


class Experiment(Settings):
    """recipe: what all recipes share. factors: name -> two levels (the low one first) -> changes of the recipe. seeds:
    of training. readouts: which of a training's weights are measured. fit: of OOD scores and calibration; of an image
    set a share is drawn with seed 0. shift: corruptions of `id`. bound: the smallest effect of interest, as a fraction.
    primary: the outcomes that are judged, as paths in a result; judged: at which methods and precisions (all)."""

    name: str
    recipe: Changes
    factors: dict[Name, dict[Name, Changes]] = Field(default={})
    arms: dict[Name, Arm] = Field(default={})
    screening: Screening | None = None
    seeds: tuple[Seed, ...] = Field(min_length=1)
    readouts: tuple[Literal["weights", "ema", "average"], ...] = Field(default=("weights",), min_length=1)
    calibration: CalibrationImages = CalibrationImages()
    trajectory: Trajectory | None = None
    mediators: MediatorImages | None = None
    costs: Costs | None = None
    id: Images
    fit: Images
    ood: dict[Name, OodImages] = Field(default={})
    shift: tuple[str, ...] = ()
    scores: tuple[str, ...] = ("msp", "energy", "rmahalanobis")
    bound: Annotated[float, Field(gt=0)] = 0.03
    primary: tuple[str, ...] = ("id.top1", "ood_mean.near.msp.auroc", "ood_mean.far.msp.auroc")
    judged: Settings | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    _base: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="after")
    def _fits(self) -> "Experiment":
        for factor, levels in self.factors.items():
            if len(levels) != 2:
                raise ValueError(f"factor {factor} has {len(levels)} levels; give it two, the low one first")
        names = [level for levels in self.factors.values() for level in levels]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two levels are called {twice!r}; give each level a name of its own")
        for name, arm in self.all_arms.items():
            if arm.like.keys() != self.factors.keys():
                raise ValueError(f"arm {name} is like a level of {list(arm.like)}; give one of each factor")
            lacking = next((f for f, level in arm.like.items() if level not in self.factors[f]), None)
            if lacking is not None:
                known = ", ".join(self.factors[lacking])
                raise ValueError(f"arm {name}: {lacking} has no level {arm.like[lacking]!r}; they are {known}")
        wrong = next((h.factor for h in self.hypotheses if h.factor not in (*self.factors, *self.all_arms)), None)
        if wrong is not None:
            raise ValueError(f"a hypothesis is of {wrong!r}, which is no factor and no arm")
        for part in (self.judged, self.trajectory):
            if part is not None and not ({*part.methods} <= {*self.methods} and {*part.bits} <= {*self.bits}):
                raise ValueError("what is judged and what is measured on the way must be among methods and bits")
        return self

    @property
    def base(self) -> Path:
        """What paths are relative to."""
        return self._base

    @property
    def all_arms(self) -> dict[str, Arm]:
        """The arms, and those of the screening, "screening.NAME"."""
        if self.screening is None:
            return self.arms
        like, changes = self.screening.like, self.screening.changes
        return self.arms | {f"{SCREENING}.{name}": Arm(like=like, changes=one) for name, one in changes.items()}

    @property
    def judged_settings(self) -> list[tuple[str, str]]:
        """(method, precision) of all that is judged."""
        return (self.judged or self).settings

    def cells(self) -> "Iterator[Cell]":
        """The cells of the factorial, then the arms, then the screening."""
        for levels in product(*self.factors.values()):
            setting = dict(zip(self.factors, levels, strict=True))
            yield Cell("-".join(levels) or "base", setting, [self.factors[f][level] for f, level in setting.items()])
        for name, arm in self.all_arms.items():
            changes = [self.factors[factor][level] for factor, level in arm.like.items()]
            yield Cell(name, arm.like, [*changes, arm.changes], arm=name)

    def runs(self) -> "Iterator[Run]":
        """Every training, seed after seed, so that what is done first is whole blocks."""
        for seed in self.seeds:
            for cell in self.cells():
                yield Run(cell, seed, self.recipe_of(cell, seed))

    def recipe_of(self, cell: "Cell", seed: int) -> Recipe:
        """The recipe of a cell with a seed. Raises QuantlensError where the changes make none."""
        told = self.recipe
        for changes in cell.changes:
            told = merged(told, changes)
        where = f"experiment {self.name}, cell {cell.name}"
        return parse_recipe({**told, "name": cell.name, "seed": seed}, base=self._base, where=where)


@dataclass(frozen=True)
class Cell:
    """One setting of the factors {factor: level}, or an arm."""

    name: str
    levels: Mapping[str, str]
    changes: list[Changes]
    arm: str | None = None

    @property
    def family(self) -> str:
        """ "" for the factorial, "arms", or SCREENING."""
        if self.arm is None:
            return ""
        return SCREENING if self.arm.startswith(f"{SCREENING}.") else "arms"


@dataclass(frozen=True)
class Run:
    """One training."""

    cell: Cell
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.cell.name}-s{self.seed}"


def merged(told: Mapping[str, Any], changes: Mapping[str, Any]) -> Changes:
    """Plain data with changes: mappings key by key, all else in place of what was there."""
    found = dict(told)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found


def load_experiment(path: str | os.PathLike[str]) -> Experiment:
    """Read an experiment (YAML); all its recipes are checked. Raises QuantlensError."""
    path = Path(path)
    where = f"experiment {path}"
    data = read_yaml(path, where)
    if not isinstance(data, dict):
        raise QuantlensError(f"{where} must hold keys such as `recipe:` and `factors:`, not {type(data).__name__}")
    found = checked(Experiment, {"name": path.stem, **data}, base=None, where=where)
    found._base = path.parent
    names = [run.name for run in found.runs()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise QuantlensError(
            f"{where}: two trainings are called {twice}; give levels, arms and seeds names of their own"
        )
    return found
