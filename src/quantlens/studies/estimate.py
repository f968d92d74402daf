"""What a study will cost before it runs (`quantlens study --plan`): of every model and method one cell is measured on a
few images, here and now, and scaled to the images and cells of the study. It holds for machines like this one."""

import re
import time
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from quantlens.ambient import isolated
from quantlens.data import load_images
from quantlens.evaluation.environment import choose_device, cores
from quantlens.studies.backend import Backend
from quantlens.studies.cells import PlannedCell, StudyImages, cell_key, plan_study
from quantlens.studies.config import ModelSpec, StudyConfig
from quantlens.studies.measuring import ModelWork, Outcome, reason
from quantlens.studies.progress import Quiet, display, duration
from quantlens.studies.store import Store, packed

CALIBRATED, EVALUATED, MADE = 8, 32, 2
"""Images that a pilot is calibrated and evaluated on, and of each shifted set that are made."""

BYTES_OF_A_LOGIT = 14
"""Memory that an evaluation takes for each image and class, working copies of the scores included (docs/scaling.md)."""


@dataclass
class ModelCost:
    """Seconds of one worker for one model: to load it and decode its images, and for the cells of each kind (FP32,
    inspection, a method) that are not finished: (cells, seconds of one)."""

    loading: float
    decoding: float
    kinds: dict[str, tuple[int, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.loading + self.decoding + sum(count * each for count, each in self.kinds.values())


@dataclass
class Estimate:
    """models: by label. finished: cells that are in the store. disk, memory: bytes, of all and of each worker."""

    cells: int
    workers: int
    models: dict[str, ModelCost] = field(default_factory=dict)
    finished: int = 0
    disk: int = 0
    memory: int = 0

    @property
    def wall(self) -> float:
        """Seconds until the study is done: every worker loads, the rest is divided."""
        loading = sum(cost.loading for cost in self.models.values())
        return loading + (sum(cost.seconds for cost in self.models.values()) - loading) / self.workers

    def lines(self) -> list[str]:
        """The estimate for a person."""
        out = []
        for label, cost in self.models.items():
            parts = [f"loading {duration(cost.loading)}", f"decoding {duration(cost.decoding)}"]
            parts += [f"{count} × {kind} {duration(count * each)}" for kind, (count, each) in cost.kinds.items()]
            out.append(f"{label}: {duration(cost.seconds)} ({', '.join(parts)})")
            out += [f"{label}: {kind} failed in the pilot: {why}" for kind, why in cost.failed.items()]
        if self.finished:
            out.append(f"{self.finished} of {self.cells} cells are finished and not counted")
        who = "1 worker" if self.workers == 1 else f"{self.workers} workers like this machine's"
        out.append(f"in all about {duration(self.wall)} with {who}, scaled from cells of {EVALUATED} images")
        out.append(
            f"memory of each worker about {_size(self.memory)}; disk at most {_size(self.disk)}, most of it decoded "
            "images, which later studies read again"
        )
        return out


@isolated
def estimate(
    config: StudyConfig,
    directory: str | Path,
    *,
    workers: int = 1,
    backend: Backend | None = None,
    progress: bool | Quiet = True,
) -> Estimate:
    """What the cells of a study that are not finished in `directory` cost. A pilot of every model and method runs;
    nothing is stored. Raises as `run_study` does for what cannot run."""
    backend, shown = backend or Backend(), display(progress)
    cells = plan_study(config, backend)
    pilots = _Pilots(config, StudyImages.open(config), backend, shown, Estimate(len(cells), workers))
    torch.set_num_threads(max(1, cores() // workers))
    for spec in config.models:
        pilots.run(spec, [cell for cell in cells if cell.model == spec], directory)
    return pilots.found


class _Pilots:
    """Measures a cell of every kind on few images, and adds what all of them cost to `found`."""

    def __init__(
        self, config: StudyConfig, images: StudyImages, backend: Backend, shown: Quiet, found: Estimate
    ) -> None:
        self.config, self.images, self.backend, self.shown, self.found = config, images, backend, shown, found
        self.few = _few(images)
        self.small = config.model_copy(update={"cache": False, "skip_bad": True})
        if config.attention is not None:
            attention = config.attention.model_copy(update={"images": len(self.few.id)})
            self.small = self.small.model_copy(update={"attention": attention})
        self.evaluated = sum(map(len, (images.id, *images.ood.values(), images.fit or (), *images.shift.values())))
        self.decoded = self.evaluated + sum(map(len, images.calibration.values()))
        self.made: set[str] = set()
        """preprocessings whose shifted images will be in the cache"""

    def run(self, spec: ModelSpec, cells: list[PlannedCell], directory: str | Path) -> None:
        """The pilots of one model."""
        started = time.perf_counter()
        device = choose_device(self.config.device)
        work = ModelWork(self.small, self.backend, self.few, device, spec, Quiet())
        loaded = time.perf_counter()
        work.evaluated()
        decoding = time.perf_counter() - loaded
        first = work.attempt(cells[0])  # captures the model
        unshifted = self.decoded - sum(map(len, self.images.shift.values()))
        cost = ModelCost(time.perf_counter() - started - decoding, decoding / len(self.few.id) * unshifted)
        self.found.models[spec.label] = cost
        keys = [cell_key(c, self.config, self.images, str(work.checkpoint_sha256), work.preprocess) for c in cells]
        with Store(directory) as store:
            finished = store.statuses(keys) if store.path.is_file() else {}
        left = [cell for cell, key in zip(cells, keys, strict=True) if key not in finished]
        self.found.finished += len(cells) - len(left)
        cost.decoding += self._making(work, sum(not cell.inspects for cell in left))
        for kind in dict.fromkeys(cell.kind for cell in left):
            self._kind(work, cost, kind.replace("fp32", "FP32"), [cell for cell in left if cell.kind == kind])
        if self.config.cache:
            kept = self.images.keeps_shift(self.config, work.preprocess)
            decoded = self.decoded - (0 if kept else sum(map(len, self.images.shift.values())))
            self.found.disk += decoded * prod(work.model.preprocess.input_size)
        largest = max(map(len, (self.images.id, *self.images.ood.values())))
        logits = 0 if first.result is None else BYTES_OF_A_LOGIT * largest * int(first.result["id"]["num_classes"])
        self.found.memory = max(self.found.memory, psutil.Process().memory_info().rss + logits)
        del work
        self.backend.free(at_once=True)

    def _making(self, work: ModelWork, cells: int) -> float:
        """Seconds in which the shifted images of a model are made, from two of each set: once for all models that see
        the same pictures, or without a cache for every cell."""
        key, kept = str(work.model.preprocess.image_key()), self.images.keeps_shift(self.config, work.preprocess)
        if not cells or (kept and key in self.made):
            return 0.0
        self.made.add(key)
        seconds = 0.0
        for source in self.images.shift.values():
            few, started = source.select(range(min(MADE, len(source)))), time.perf_counter()
            load_images(few, work.model.preprocess, cache_dir=False, skip_bad=True)
            seconds += (time.perf_counter() - started) / len(few) * len(source)
        return seconds * (1 if kept else cells)

    def _kind(self, work: ModelWork, cost: ModelCost, kind: str, cells: list[PlannedCell]) -> None:
        """The pilot of FP32, of the inspection, or of a method at its lowest precision."""
        pilot = min(cells, key=lambda cell: int((re.findall(r"\d+", cell.bits) or [0])[0]))
        self.shown.message(f"pilot: {pilot} on {len(self.few.id)} images")
        outcome = work.attempt(pilot)
        if outcome.result is None:
            cost.failed[kind] = reason(outcome.error)
            return
        cost.kinds[kind] = len(cells), self._scaled(pilot, outcome)
        kept = len(outcome.outputs or b"") * len(self.images.id) // len(self.few.id)
        self.found.disk += len(cells) * (len(packed(outcome.result) or "") + kept)

    def _scaled(self, cell: PlannedCell, outcome: Outcome) -> float:
        """Seconds of a cell like the pilot on all images of the study."""
        assert outcome.result is not None
        images, few = self.images, self.few
        if cell.inspects:
            return outcome.seconds * len(images.inspected) / len(few.inspected)
        spent = outcome.result["seconds"]
        seconds = spent["evaluation"] / len(few.id) * self.evaluated
        if cell.quantizes:
            seconds += spent["calibration"] * len(images.calibration[cell.seed]) / len(few.calibration[cell.seed])
        if self.config.attention is not None:
            seconds += spent["attention"] / len(few.id) * self.config.attention.images * (1 + len(images.ood))
        return float(seconds)


def _few(images: StudyImages) -> StudyImages:
    """The images of a pilot: the first of the ID set, of the calibration images and of those inspected."""

    def first(source: Any, count: int) -> Any:
        return None if source is None else source.select(range(min(count, len(source))))

    calibration = {seed: first(source, CALIBRATED) for seed, source in images.calibration.items()}
    return StudyImages(first(images.id, EVALUATED), {}, None, calibration, {}, first(images.inspected, CALIBRATED))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"
