"""What a study consists of: its cells, the images they share, and the key that says when two cells are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.evaluation.images import fingerprint, groups_of, refuse_overlap
from quantlens.plugins import load_all
from quantlens.studies.backend import Backend, MethodChoice
from quantlens.studies.config import ModelSpec, StudyConfig
from quantlens.studies.store import INSPECTION, to_json

CELL_FORMAT = 1
"""Part of every key: raised when the metrics of unchanged inputs change (another definition of a metric, say)."""

LENS_FORMAT = 2
"""Part of the keys of cells with attention: raised when its metrics change on unchanged inputs."""

INSPECTION_FORMAT = 1
"""Part of the keys of inspections: raised when their metrics change on unchanged inputs."""

FP32 = "FP32"


@dataclass(frozen=True)
class PlannedCell:
    """One cell before it runs. The FP32 cell of a model stands for all methods and seeds. An inspection is a cell that
    measures no images: it finds which layer of its model hurts."""

    model: ModelSpec
    method: MethodChoice | None
    method_label: str
    bits: str
    seed: int
    inspects: bool = False

    @property
    def kind(self) -> str:
        if self.inspects:
            return "inspection"
        return "fp32" if self.method is None else self.method_label

    @property
    def needs_fp32(self) -> bool:
        """Whether it is compared with the FP32 cell of its model, and so comes after it."""
        return self.method is not None and not self.inspects

    def __str__(self) -> str:
        if self.inspects:
            return f"{self.model.label} inspection {self.bits}"
        if self.method is None:
            return f"{self.model.label} FP32"
        return f"{self.model.label} {self.method_label} {self.bits} seed {self.seed}"


def plan_study(config: StudyConfig, backend: Backend | None = None) -> list[PlannedCell]:
    """The cells of a study in the order in which they run; nothing is loaded. FP32 is always measured, once per model,
    as every quantization delta is taken from it; the inspection of a model, where the study asks for it, comes next.
    Raises for methods and options that do not exist."""
    backend = backend or Backend()
    load_all(config.plugins)
    methods = [(backend.method(spec.name, spec.settings()), spec.label) for spec in config.methods]
    quantized = [bits for bits in config.bits if bits != FP32]
    asked = config.inspect
    inspected = None if asked is None else backend.method(asked.method.name, asked.method.settings())
    cells: list[PlannedCell] = []
    for model in config.models:
        cells.append(PlannedCell(model, None, "fp32", FP32, 0))
        if asked is not None:
            cells.append(PlannedCell(model, inspected, asked.method.label, asked.bits, asked.seed, inspects=True))
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
    inspected: Any = None

    def __post_init__(self) -> None:
        asked = [source for source in (self.fit, self.inspected) if source is not None]
        every = [self.id, *self.ood.values(), *self.calibration.values(), *asked]
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
        if self.inspected is not None:
            named["the inspected images"] = self.inspected
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
            pool = _enough(backend, config.calibration.source, config.calibration.n, "calibration", "n")
            learnt.append((pool, "the calibration images"))
            calibration = {seed: backend.open_source(config.calibration.drawn(seed)) for seed in config.seeds}
        for source, what in learnt:
            refuse_overlap(source, what, id_source, "the ID set")
            for name, other in ood.items():
                refuse_overlap(source, what, other, f"OOD set {name}")
        given = {name: spec.group for name, spec in config.ood.items() if spec.group is not None}
        inspected = None
        if config.inspect is not None:
            bare = config.inspect.source or (config.calibration.source if config.calibration else "")
            _enough(backend, bare, config.inspect.images, "inspect", "images")
            inspected = backend.open_source(config.inspected())
        return StudyImages(id_source, ood, fit, calibration, groups_of(ood, given), inspected)


def _enough(backend: Backend, spec: str, count: int, what: str, key: str) -> Any:
    """The Source, if it has as many images as `what` asks for under the key `key`."""
    pool = backend.open_source(spec)
    if len(pool) < count:
        raise QuantlensError(
            f"{what} asks for {count} images, but {spec} has {len(pool)}; lower `{key}` or give a larger source"
        )
    return pool


def identity(cell: PlannedCell, config: StudyConfig, images: StudyImages) -> str:
    """A hash of all that determines a cell as far as it is known before its model is loaded."""
    model = {"name": cell.model.name, "weights": cell.model.weights, "options": cell.model.options}
    return _hash({"identity": CELL_FORMAT, "model": model, **_determinants(cell, config, images)})


def cell_key(
    cell: PlannedCell, config: StudyConfig, images: StudyImages, checkpoint_sha256: str, preprocess: Mapping[str, Any]
) -> str:
    """SHA-256 of the canonical JSON of everything that determines a cell's metrics (after `INSPECTION` for an
    inspection, which `Store.cells` leaves out). The architecture's name, the
    checkpoint's own hash and the images' fingerprints are in it; paths, labels and the study's name are not."""
    key = _hash(
        {
            "cell": CELL_FORMAT,
            "model": {"name": cell.model.name, "checkpoint": checkpoint_sha256, "options": cell.model.options},
            "preprocess": dict(preprocess),
            **_determinants(cell, config, images),
        }
    )
    return INSPECTION + key if cell.inspects else key


def _determinants(cell: PlannedCell, config: StudyConfig, images: StudyImages) -> dict[str, Any]:
    method = cell.method
    if cell.inspects:
        assert method is not None
        chosen = [method.name, method.version, method.spelled()]
        mark = images.mark(images.inspected)
        return {"inspection": INSPECTION_FORMAT, "method": chosen, "bits": cell.bits, "seed": cell.seed, "images": mark}
    looks = {} if config.attention is None else {"attention": [LENS_FORMAT, *config.attention.model_dump().values()]}
    mixed = {}
    if cell.bits.startswith("MP"):
        from quantlens.allocation.allocation import VERSION

        mixed = {"allocation": VERSION}
    return {
        **looks,
        **mixed,
        "method": None if method is None else [method.name, method.version, method.spelled()],
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
