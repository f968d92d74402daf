"""What a study consists of: its cells, the images they share, and the key that says when two cells are the same."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any

from quantlens.data import open_source, with_corruption
from quantlens.errors import QuantlensError
from quantlens.evaluation.images import fingerprint, groups_of, refuse_overlap, source_name
from quantlens.evaluation.shift import shifted_sets
from quantlens.plugins import load_all
from quantlens.studies.backend import Backend, MethodChoice
from quantlens.studies.config import ModelSpec, StudyConfig
from quantlens.studies.store import INSPECTION, OF_THE_MODEL, to_json

CELL_FORMAT = 1
"""Part of every key: raised when the metrics of unchanged inputs change (another definition of a metric, say)."""

LENS_FORMAT = 2
"""Part of the keys of cells with attention: raised when its metrics change on unchanged inputs."""

INSPECTION_FORMAT = 1
"""Part of the keys of inspections: raised when their metrics change on unchanged inputs."""

SHIFT_FORMAT = 1
"""Part of the keys of cells with shifted images: raised when corruptions or the metrics of shift change."""

KEPT_BYTES = 16 << 30
"""Shifted images of a study are kept on disk up to this size; beyond it every cell makes them again."""

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
    foreign: str | None = None
    """the file of another tool that is measured"""

    @property
    def quantizes(self) -> bool:
        """Whether a method is applied, from calibration images."""
        return self.method is not None and self.foreign is None and not self.inspects

    @property
    def kind(self) -> str:
        return "inspection" if self.inspects else self.method_label

    @property
    def needs_fp32(self) -> bool:
        """Whether it is compared with the FP32 cell of its model, and so comes after it."""
        return self.method is not None and not self.inspects

    def about(self) -> dict[str, Any]:
        """What it is, for a reader of the store."""
        return {
            "model": self.model.label,
            "architecture": self.model.name,
            "weights": self.model.weights,
            "model_options": self.model.options,
            "method": self.method_label,
            "method_name": "fp32" if self.method is None else self.method.name,
            "method_version": None if self.method is None else self.method.version,
            "bits": self.bits,
            "seed": self.seed,
            "options": {} if self.method is None else self.method.options,
            **({"inspects": True} if self.inspects else {}),
        }

    def __str__(self) -> str:
        return label(self.about())


def label(spec: Mapping[str, Any]) -> str:
    """A cell in words."""
    if spec.get("inspects"):
        return f"{spec['model']} inspection {spec['bits']}"
    if spec["method_name"] == "fp32":
        return f"{spec['model']} FP32"
    return f"{spec['model']} {spec['method']} {spec['bits']} seed {spec['seed']}"


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
        for one in model.foreign:
            choice = backend.foreign(one.file)
            cells.append(PlannedCell(model, choice, one.title, one.bits or "unknown", 0, foreign=one.file))
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
    shift: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def named(self) -> dict[str, Any]:
        """Every source by what it is for."""
        sources = {"the ID set": self.id, "the fit set": self.fit, "the inspected images": self.inspected}
        sources |= {f"OOD set {name}": source for name, source in self.ood.items()}
        sources |= {f"shifted set {name}": source for name, source in self.shift.items()}
        sources |= {f"the calibration images of seed {seed}": source for seed, source in self.calibration.items()}
        return {name: source for name, source in sources.items() if source is not None}

    @cached_property
    def marks(self) -> dict[str, str]:
        """The fingerprints of all these sources (that reads directories, so it is done once)."""
        return {name: str(fingerprint(source)) for name, source in self.named.items()}

    def mark(self, source: Any) -> str | None:
        """The fingerprint of one of these sources; None of None."""
        return next((self.marks[name] for name, one in self.named.items() if one is source), None)

    def keeps_shift(self, config: StudyConfig, preprocess: Mapping[str, Any]) -> bool:
        """Whether the shifted images are kept for all cells and models, decoded and corrupted, in the cache."""
        size = sum(map(len, self.shift.values())) * prod(preprocess["input_size"])
        return config.cache is not False and size <= KEPT_BYTES

    @staticmethod
    def open(config: StudyConfig) -> "StudyImages":
        """Open every source; calibration and fit images must not be among those evaluated."""
        evaluated = {"the ID set": open_source(config.id)}
        ood = {name: open_source(spec.source) for name, spec in config.ood.items()}
        evaluated |= {f"OOD set {name}": source for name, source in ood.items()}
        shifted = shifted_sets(config.shift, partial(with_corruption, config.id))
        shift = {name: open_source(source) for name, source in shifted.items()}
        evaluated |= {f"shifted set {name}": source for name, source in shift.items() if name in config.shift}
        fit = None if config.fit is None else open_source(config.fit)
        calibration: dict[int, Any] = {}
        learnt = {} if fit is None else {"the fit set": fit}
        if config.calibration is not None and any(bits != FP32 for bits in config.bits):
            given = config.calibration
            learnt["the calibration images"] = _enough(given.source, given.n, "calibration", "n")
            calibration = {seed: open_source(given.drawn(seed)) for seed in config.seeds}
        for what, source in learnt.items():
            for name, other in evaluated.items():
                refuse_overlap(source, what, other, name)
        groups = groups_of(ood, {name: spec.group for name, spec in config.ood.items() if spec.group is not None})
        inspected = None
        if config.inspect is not None:
            drawn = config.inspected()
            _enough(drawn.source, drawn.n, "inspect", "images")
            inspected = open_source(drawn.drawn(config.inspect.seed))
        return StudyImages(evaluated["the ID set"], ood, fit, calibration, groups, inspected, shift)


def _enough(spec: str, count: int, what: str, key: str) -> Any:
    """The Source, if it has as many images as `what` asks for under the key `key`."""
    pool = open_source(spec)
    if len(pool) < count:
        raise QuantlensError(
            f"{what} asks for {count} images, but {spec} has {len(pool)}; lower `{key}` or give a larger source"
        )
    return pool


def spec_of(cell: PlannedCell, config: StudyConfig, images: StudyImages) -> dict[str, Any]:
    """What a cell is, for a reader of the store: with the labels and sources that this study uses. The checkpoint and
    the preprocessing are None until the model has been loaded (`store.OF_THE_MODEL`)."""

    def listed(source: Any, name: str = "") -> Any:
        if source is None:
            return None
        return {"source": name or source_name(source), "fingerprint": images.mark(source), "n": len(source)}

    common = {**cell.about(), **dict.fromkeys(OF_THE_MODEL)}
    if cell.inspects:
        return common | {"images": listed(images.inspected), "format": INSPECTION_FORMAT}
    drawn = "" if config.calibration is None else config.calibration.drawn(cell.seed)
    return common | {
        "calibration": None if not cell.quantizes else listed(images.calibration.get(cell.seed), drawn),
        "id": listed(images.id),
        "ood": {name: {**listed(s), "group": images.groups[name]} for name, s in images.ood.items()},
        "fit": listed(images.fit),
        "scores": None if config.scores is None else list(config.scores),
        "format": CELL_FORMAT,
        **({} if config.attention is None else {"attention": config.attention.model_dump()}),
        **({"shift": {name: listed(one) for name, one in images.shift.items()}} if images.shift else {}),
    }


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
            "preprocess": preprocess,
            **_determinants(cell, config, images),
        }
    )
    return INSPECTION + key if cell.inspects else key


def _determinants(cell: PlannedCell, config: StudyConfig, images: StudyImages) -> dict[str, Any]:
    method = cell.method
    common = {
        "method": None if method is None else [method.name, method.version, method.spelled()],
        "bits": cell.bits,
        "seed": cell.seed,
    }
    if cell.inspects:
        return common | {"inspection": INSPECTION_FORMAT, "images": images.mark(images.inspected)}
    if config.attention is not None:
        common["attention"] = [LENS_FORMAT, *config.attention.model_dump().values()]
    if images.shift:
        marks = [[name, images.mark(images.shift[name])] for name in sorted(images.shift)]
        common["shift"] = [SHIFT_FORMAT, marks]
    if cell.bits.startswith("MP"):
        from quantlens.allocation.allocation import VERSION

        common["allocation"] = VERSION
    return common | {
        "calibration": None if not cell.quantizes else images.mark(images.calibration[cell.seed]),
        "id": images.mark(images.id),
        # The result names each set and averages far and near apart, so names and groups belong to the cell.
        "ood": [[name, images.mark(images.ood[name]), images.groups[name]] for name in sorted(images.ood)],
        "fit": images.mark(images.fit),
        "scores": None if config.scores is None else sorted(config.scores),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def weights_of(model: ModelSpec) -> str | None:
    """The `weights` argument of `load_model`: a study measures trained models, so nothing said means "pretrained";
    "random" is the untrained model."""
    return model.weights or "pretrained"
