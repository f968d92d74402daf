"""What a study will cost before it runs: time by stage, memory of each worker, and disk (`quantlens study --plan`).

Times are those that cells of the same model and method took, where the store of the study has them; otherwise each
model is loaded and timed on a few random images here and now, and a method's calibration is counted in forwards of its
calibration images, as `python -m benchmarks methods` measured them. An estimate holds for machines like this one.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.evaluation.environment import cores
from quantlens.studies.backend import Backend
from quantlens.studies.cells import PlannedCell, StudyImages, plan_study, weights_of
from quantlens.studies.config import ModelSpec, StudyConfig
from quantlens.studies.progress import duration
from quantlens.studies.store import Cell, Store

CALIBRATION_FORWARDS = {
    "minmax": 2.6,
    "percentile": 2.6,
    "repq-vit": 3.6,
    "fq-ptq": 4.0,
    "base-ptq": 15.0,
    "bit-split": 17.0,
    "easyquant": 28.0,
    "ptq4vit": 32.0,
    "vt-ptq": 53.0,
    "aocq": 155.0,
}
"""Seconds of a calibration over seconds of one FP32 forward of its images (docs/methods.md: DeiT-Tiny, W4A4, 32 images,
two cores)."""

SIMULATION = 1.4
"""Seconds of a simulated forward over those of FP32 at the batches of an evaluation (`python -m benchmarks simulation`:
1.24 to 1.6)."""

TRIAL_IMAGES = 8
RESULT_BYTES = 100_000
"""A result in the store, compressed: figures, histograms, per-class accuracies of 1000 classes."""
WALK_BYTES = 1 << 30
"""Most activations that a calibration keeps in memory (`calibration.walk.MEMORY`)."""

INSPECTION = 0.45
"""Seconds of inspecting one part (a site or a block) on one image over those of an FP32 forward (`python -m benchmarks
inspection`: what lies in front of a part is not computed)."""

STAGES = ("loading", "decoding", "FP32 evaluation", "inspection", "calibration", "quantized evaluation")


@dataclass
class ModelCost:
    """Constants of one model, in seconds: `load` with capture, `image` for one FP32 image, `decode` for one image file;
    `quantized` for one simulated image and `calibration` by method label, where stored cells tell. `memory`: bytes of a
    process that has loaded it. `parts`: its sites and blocks that an inspection quantizes alone."""

    label: str
    load: float
    image: float
    decode: float
    classes: int
    features: int
    pixels: int
    memory: int
    source: str
    parts: int = 0
    quantized: float | None = None
    calibration: dict[str, float] = field(default_factory=dict)


@dataclass
class Estimate:
    """Seconds of one worker by stage and model; what the study needs at most."""

    cells: int
    workers: int
    seconds: dict[str, dict[str, float]]
    sources: dict[str, str]
    unknown: list[str]
    disk: int
    memory: int

    @property
    def total(self) -> float:
        """Seconds of one worker for everything."""
        return sum(sum(stages.values()) for stages in self.seconds.values())

    @property
    def wall(self) -> float:
        """Seconds until the study is done: loading, and FP32 of a study's only model, are not divided."""
        alone = 0.0
        for stages in self.seconds.values():
            alone += stages["loading"] + (stages["FP32 evaluation"] if len(self.seconds) == 1 else 0.0)
        return alone + (self.total - alone) / self.workers

    def lines(self) -> list[str]:
        """The estimate for a person."""
        out = []
        for model, stages in self.seconds.items():
            shown = [stage for stage in STAGES if stage != "inspection" or stages[stage]]
            parts = ", ".join(f"{stage} {duration(stages[stage])}" for stage in shown)
            out.append(f"{model}: {duration(sum(stages.values()))} ({parts}); {self.sources[model]}")
        if self.unknown:
            out.append(f"calibration by {', '.join(self.unknown)} is not counted: no cell of it has been run here yet")
        who = "1 worker" if self.workers == 1 else f"{self.workers} workers like this machine's"
        out.append(f"in all about {duration(self.wall)} with {who}")
        out.append(
            f"memory of each worker about {_size(self.memory)}; disk at most {_size(self.disk)}, most of it decoded "
            "images, which later studies read again"
        )
        return out


def estimate(
    config: StudyConfig, directory: str | Path, *, workers: int = 1, backend: Backend | None = None
) -> Estimate:
    """What the unfinished and finished cells of a study cost together; nothing is decoded or written.

    Raises as `run_study` does for what cannot run: unknown names, images that are not there or overlap.
    """
    backend = backend or Backend()
    cells = plan_study(config, backend)
    images = StudyImages.open(config, backend)
    stored = _stored(directory)
    seconds, sources, unknown = {}, {}, Counter[str]()
    memory = disk = 0
    evaluated = len(images.id) + sum(len(s) for s in images.ood.values())
    read = evaluated + (0 if images.fit is None else len(images.fit))
    drawn = sum(len(source) for source in images.calibration.values())
    for spec in config.models:
        own = [cell for cell in cells if cell.model == spec]
        cost = measured(spec, config, images, backend, workers, stored)
        seconds[spec.label] = _stages(own, cost, read, drawn, config, unknown)
        sources[spec.label] = cost.source
        memory = max(memory, cost.memory + _evaluation_bytes(images, cost, config) + _walk_bytes(own))
        disk += (read + drawn) * cost.pixels + len(own) * _cell_bytes(images, cost, config)
    return Estimate(len(cells), workers, seconds, sources, list(unknown), disk, memory)


def measured(
    spec: ModelSpec,
    config: StudyConfig,
    images: StudyImages,
    backend: Backend,
    workers: int,
    stored: Iterable[Cell] = (),
) -> ModelCost:
    """Load a model, time a few random images on it, and take the seconds of stored cells where there are some."""
    import psutil
    import torch

    from quantlens.evaluation.run import device_of, measurable

    threads = torch.get_num_threads()
    backend.set_threads(max(1, cores() // workers))
    try:
        started = time.perf_counter()
        loaded = backend.load_model(spec.name, weights_of(spec), backend.device(config.device), spec.options)
        model = measurable(loaded)
        pixels = torch.zeros(TRIAL_IMAGES, *model.preprocess.input_size, device=device_of(model))
        with torch.inference_mode():
            found = model.outputs(pixels)
            load = time.perf_counter() - started
            times = [_seconds(lambda: model.outputs(pixels).logits.cpu()) for _ in range(3)]
    finally:
        backend.set_threads(threads)
    cost = ModelCost(
        label=spec.label,
        load=load,
        image=statistics.median(times) / TRIAL_IMAGES,
        decode=_decoding(images.id, loaded.preprocess, backend),
        classes=int(found.logits.shape[1]),
        features=0 if found.features is None else int(found.features.shape[1]),
        pixels=int(np.prod(model.preprocess.input_size)),
        memory=psutil.Process().memory_info().rss,
        source=f"timed now on {TRIAL_IMAGES} images",
        parts=_parts(model),
    )
    _learn(cost, spec, stored)
    backend.free(more_to_come=False)
    return cost


def _learn(cost: ModelCost, spec: ModelSpec, stored: Iterable[Cell]) -> None:
    """Put the seconds of stored cells of this architecture in the place of what was timed."""
    fp32, quantized = [], []
    calibration: dict[str, list[float]] = {}
    for cell in stored:
        result = cell.result or {}
        if cell.spec.get("architecture") != spec.name or "evaluation" not in result.get("seconds", {}):
            continue
        count = result["id"]["n"] + sum(entry["n"] for entry in result["ood"].values())
        count += (result.get("fit") or {}).get("n", 0)
        each = result["seconds"]["evaluation"] / max(1, count)
        if cell.spec["method_name"] == "fp32":
            fp32.append(each)
            continue
        quantized.append(each)
        n = max(1, (cell.spec.get("calibration") or {}).get("n", 1))
        calibration.setdefault(cell.spec["method_name"], []).append(result["seconds"].get("calibration", 0.0) / n)
    if fp32:
        cost.image = statistics.median(fp32)
        cost.source = f"from {len(fp32) + len(quantized)} cells of the store"
    if quantized:
        cost.quantized = statistics.median(quantized)
    cost.calibration = {name: statistics.median(values) for name, values in calibration.items()}


def _stages(
    cells: list[PlannedCell], cost: ModelCost, read: int, drawn: int, config: StudyConfig, unknown: Counter[str]
) -> dict[str, float]:
    """Seconds of one worker by stage, for the cells of one model. `read`: images of an evaluation, `drawn`: calibration
    images of all seeds."""
    n = 0 if config.calibration is None else config.calibration.n
    calibration, quantized = 0.0, 0
    for cell in cells:
        if cell.method is None or cell.inspects:
            continue
        quantized += 1
        forwards = CALIBRATION_FORWARDS.get(cell.method.name)
        each = cost.calibration.get(cell.method.name, None if forwards is None else forwards * cost.image)
        if each is None:
            unknown[cell.method.name] += 1
        else:
            calibration += each * n
    simulated = SIMULATION * cost.image if cost.quantized is None else cost.quantized
    inspected = 0 if config.inspect is None else config.inspect.images
    looked = INSPECTION * cost.parts * cost.image * inspected
    times = (cost.load, cost.decode * (read + drawn), cost.image * read, looked, calibration)
    return dict(zip(STAGES, (*times, simulated * read * quantized), strict=True))


def _parts(model: Any) -> int:
    """How many parts of a model an inspection quantizes alone."""
    graph = getattr(model, "graph", None)
    if graph is None:
        return 0
    from quantlens.methods.base import matmul_operand_edges

    return len({edge.site for edge in matmul_operand_edges(graph)}) + len(graph.sites.blocks)


def _decoding(source: Any, preprocess: Any, backend: Backend) -> float:
    """Seconds to decode one image of a source."""
    few = source.select(range(min(TRIAL_IMAGES, len(source))))
    return _seconds(lambda: backend.load_images(few, preprocess, cache_dir=False, skip_bad=True, progress=None)) / len(
        few
    )


def _evaluation_bytes(images: StudyImages, cost: ModelCost, config: StudyConfig) -> int:
    """Memory that an evaluation adds: logits and features of the largest set, and the working copies of the scores
    (measured; docs/scaling.md)."""
    largest = max(len(images.id), *(len(s) for s in images.ood.values()), 0)
    kept = 2 if config.outputs is True else 0
    return largest * (cost.classes * (3 * 4 + kept) + 3 * 4 * cost.features)


def _walk_bytes(cells: list[PlannedCell]) -> int:
    return WALK_BYTES if any(cell.method is not None for cell in cells) else 0  # an inspection calibrates too


def _cell_bytes(images: StudyImages, cost: ModelCost, config: StudyConfig) -> int:
    """Disk that a cell takes: its result, and its per-image outputs before compression."""
    if config.outputs is False:
        return RESULT_BYTES
    scored = len(images.id) + sum(len(s) for s in images.ood.values())
    scores = 12 if config.scores is None else len(config.scores)
    logits = 2 * cost.classes if config.outputs is True else 0
    return RESULT_BYTES + len(images.id) * (36 + logits) + scored * 4 * scores


def _stored(directory: str | Path) -> list[Cell]:
    with Store(directory) as store:
        return [cell for cell in store.cells(everything=True) if cell.done] if store.exists() else []


def _seconds(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"
