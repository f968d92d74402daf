"""What a study consists of: its cells, the images they share, and the key that says when two cells are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.studies.backend import Backend, MethodChoice
from quantlens.studies.config import ModelSpec, StudyConfig
from quantlens.studies.images import fingerprint, groups_of, refuse_overlap
from quantlens.studies.store import to_json

CELL_FORMAT = 1
"""Part of every key: raised when the figures of unchanged inputs change (another definition of a metric, say)."""

LENS_FORMAT = 1
"""Part of the keys of cells with attention: raised when its figures change on unchanged inputs."""

FP32 = "FP32"

Slot = tuple[str, str, str, int]
"""Model label, method label, bits, seed."""


@dataclass(frozen=True)
class PlannedCell:
    """One cell before it runs. The FP32 cell of a model stands for all methods and seeds."""

    model: ModelSpec
    method: MethodChoice | None
    method_label: str
    bits: str
    seed: int

    @property
    def slot(self) -> Slot:
        """Its place in the grid; no two cells of a study share one, as labels differ."""
        return (self.model.label, self.method_label, self.bits, self.seed)

    @property
    def kind(self) -> str:
        return "fp32" if self.method is None else self.method_label

    def __str__(self) -> str:
        if self.method is None:
            return f"{self.model.label} FP32"
        return f"{self.model.label} {self.method_label} {self.bits} seed {self.seed}"


def plan_study(config: StudyConfig, backend: Backend | None = None) -> list[PlannedCell]:
    """The cells of a study in the order in which they run; nothing is loaded. FP32 is always measured, once per model,
    as every quantization delta is taken from it. Raises for methods and options that do not exist."""
    backend = backend or Backend()
    methods = [(backend.method(spec.name, spec.options), spec.label) for spec in config.methods]
    quantized = [bits for bits in config.bits if bits != FP32]
    cells: list[PlannedCell] = []
    for model in config.models:
        cells.append(PlannedCell(model, None, "fp32", FP32, 0))
        cells += [
            PlannedCell(model, choice, label, bits, seed)
            for choice, label in methods
            for bits in quantized
            for seed in config.seeds
        ]
    return cells


@dataclass(frozen=True)
class StudyImages:
    """The Sources of a study, listed and checked against each other; no image has been read."""

    id: Any
    ood: dict[str, Any]
    fit: Any
    calibration: dict[int, Any]
    groups: dict[str, str]

    def __post_init__(self) -> None:
        every = [self.id, *self.ood.values(), *self.calibration.values(), *([] if self.fit is None else [self.fit])]
        object.__setattr__(self, "_marks", {id(source): fingerprint(source) for source in every})

    def mark(self, source: Any) -> str:
        """The fingerprint of one of these sources (it reads a directory, so it is taken once)."""
        return str(self._marks[id(source)])  # type: ignore[attr-defined]

    def marks(self) -> dict[str, str]:
        """The fingerprints of all these sources by what they are for, to compare those of two machines."""
        named = {"the ID set": self.id, **{f"OOD set {name}": source for name, source in self.ood.items()}}
        named |= {f"the calibration images of seed {seed}": source for seed, source in self.calibration.items()}
        if self.fit is not None:
            named["the fit set"] = self.fit
        return {name: self.mark(source) for name, source in named.items()}

    @staticmethod
    def open(config: StudyConfig, backend: Backend) -> StudyImages:
        """Open every source; calibration and fit images must not be among those evaluated."""
        id_source = backend.open_source(config.id)
        ood = {name: backend.open_source(spec.source) for name, spec in config.ood.items()}
        fit = None if config.fit is None else backend.open_source(config.fit)
        calibration: dict[int, Any] = {}
        learnt = [] if fit is None else [(fit, "the fit set")]
        if config.calibration is not None and any(bits != FP32 for bits in config.bits):
            pool = backend.open_source(config.calibration.source)
            if len(pool) < config.calibration.n:
                raise QuantlensError(
                    f"calibration asks for {config.calibration.n} images, but {config.calibration.source} has "
                    f"{len(pool)}; lower `n` or give a larger source"
                )
            learnt.append((pool, "the calibration images"))
            calibration = {seed: backend.open_source(config.calibration.drawn(seed)) for seed in config.seeds}
        for source, what in learnt:
            refuse_overlap(source, what, id_source, "the ID set")
            for name, other in ood.items():
                refuse_overlap(source, what, other, f"OOD set {name}")
        given = {name: spec.group for name, spec in config.ood.items() if spec.group is not None}
        return StudyImages(id_source, ood, fit, calibration, groups_of(ood, given))


def identity(cell: PlannedCell, config: StudyConfig, images: StudyImages) -> str:
    """A hash of all that determines a cell as far as it is known before its model is loaded."""
    model = {"name": cell.model.name, "weights": cell.model.weights, "options": cell.model.options}
    return _hash({"identity": CELL_FORMAT, "model": model, **_determinants(cell, config, images)})


def cell_key(
    cell: PlannedCell, config: StudyConfig, images: StudyImages, checkpoint_sha256: str, preprocess: Mapping[str, Any]
) -> str:
    """SHA-256 of the canonical JSON of everything that determines a cell's figures. The architecture's name, the
    checkpoint's own hash and the images' fingerprints are in it; paths, labels and the study's name are not."""
    return _hash(
        {
            "cell": CELL_FORMAT,
            "model": {"name": cell.model.name, "checkpoint": checkpoint_sha256, "options": cell.model.options},
            "preprocess": dict(preprocess),
            **_determinants(cell, config, images),
        }
    )


def _determinants(cell: PlannedCell, config: StudyConfig, images: StudyImages) -> dict[str, Any]:
    method = cell.method
    looks = {} if config.attention is None else {"attention": [LENS_FORMAT, *config.attention.model_dump().values()]}
    mixed = {}
    if cell.bits.startswith("MP"):
        from quantlens.allocation.allocation import VERSION

        mixed = {"allocation": VERSION}
    return {
        **looks,
        **mixed,
        "method": None if method is None else [method.name, method.version, method.options],
        "bits": cell.bits,
        "seed": cell.seed,
        "calibration": None if method is None else images.mark(images.calibration[cell.seed]),
        "id": images.mark(images.id),
        # The result names each set and averages far and near apart, so names and groups belong to the cell.
        "ood": [[name, images.mark(images.ood[name]), images.groups[name]] for name in sorted(images.ood)],
        "fit": None if images.fit is None else images.mark(images.fit),
        "scores": None if config.scores is None else sorted(config.scores),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def weights_of(model: ModelSpec) -> str | None:
    """The `weights` argument of `load_model`: a study measures trained models, so nothing said means "pretrained";
    "random" is the untrained model."""
    return None if model.weights == "random" else model.weights or "pretrained"
