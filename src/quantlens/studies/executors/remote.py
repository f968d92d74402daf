"""What runs in a Ray worker: it measures cells and hands them back; it never sees the store."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.plugins import load_all
from quantlens.studies.backend import Backend
from quantlens.studies.cells import PlannedCell, StudyImages
from quantlens.studies.config import StudyConfig
from quantlens.studies.progress import Quiet
from quantlens.studies.specs import reason
from quantlens.studies.work import ModelWork, Outcome, full_disk, is_full_disk, stops, told


@dataclass(frozen=True)
class Loaded:
    """A model is there: what the keys of its cells are made of."""

    checkpoint_sha256: str | None
    preprocess: dict[str, Any]


@dataclass(frozen=True)
class Stop:
    """The study cannot go on; the sentence says why."""

    message: str


class Worker:
    """A worker process of the cluster, which keeps the model it worked on last.

    Images and weights are read from the paths of the study, so those must exist on every node. marks: the
    fingerprints of the images where the driver runs; other images here are refused.
    """

    def __init__(self, config: StudyConfig, backend: Backend, threads: int, marks: Mapping[str, str]) -> None:
        self.config, self.backend, self.threads, self.marks = config, backend, threads, dict(marks)
        self.images: StudyImages | None = None
        self.work: ModelWork | None = None
        self.device = "cpu"

    def start(self) -> Stop | None:
        """List the images on this node."""
        try:
            load_all(self.config.plugins)
            self.backend.set_threads(self.threads)
            self.device = self.backend.device(self.config.device)
            images = StudyImages.open(self.config, self.backend)
            _check_same(images.marks(), self.marks)
        except (QuantlensError, OSError) as error:
            return Stop(_said(error))
        self.images = images
        return None

    def load(self, index: int) -> Loaded | Outcome | Stop:
        """Load a model of the study and read the images; an Outcome is the error of a model that cannot be loaded."""
        try:
            work = self._work(index)
        except Exception as error:
            return Stop(_said(error)) if stops(error) else Outcome(None, told(error), 0.0)
        try:
            work.decode()
        except (QuantlensError, OSError) as error:
            return Stop(_said(error))
        return Loaded(work.checkpoint_sha256, work.preprocess)

    def run(
        self,
        index: int,
        cell: PlannedCell,
        checkpoint_sha256: str | None,
        reference: Mapping[str, Any] | list[Any] | None,
    ) -> Outcome | Stop:
        """Measure a cell. reference: the FP32 result; in a list the reference of the answer of the worker that measures
        it; without one only the FP32 cell and inspections can be measured."""

        def baseline() -> Any:
            return _fp32(reference, self.config.models[index].label)

        loaded = self.load(index)
        if not isinstance(loaded, Loaded):
            return loaded
        if loaded.checkpoint_sha256 != checkpoint_sha256:
            return Stop(
                f"{self.config.models[index].label}: the checkpoint on node {platform.node()} is another one (SHA-256 "
                f"{str(loaded.checkpoint_sha256)[:12]}…, not {str(checkpoint_sha256)[:12]}…); put the same file on "
                "every node"
            )
        assert self.work is not None
        try:
            return self.work.attempt(cell, baseline, late=isinstance(reference, list))
        except (QuantlensError, OSError) as error:
            return Stop(_said(error))

    def _work(self, index: int) -> ModelWork:
        """The model with that number in the study; the one before it is given up."""
        if self.images is None:  # Ray has started this worker again after a crash
            stopped = self.start()
            if stopped is not None:
                raise QuantlensError(stopped.message)
        assert self.images is not None
        spec = self.config.models[index]
        if self.work is None or self.work.label != spec.label:
            if self.work is not None:
                self.work = None
                self.backend.free(more_to_come=False)
            self.work = ModelWork(self.config, self.backend, self.images, self.device, spec, Quiet())
        return self.work


def _fp32(reference: Mapping[str, Any] | list[Any] | None, label: str) -> Any:
    """The FP32 Result, waited for where it is not there yet."""
    from quantlens.evaluation import Result

    assert reference is not None
    if not isinstance(reference, list):
        return Result.from_dict({**reference, "method": "fp32"})
    import ray

    answer = ray.get(reference[0])
    if isinstance(answer, Stop):
        raise QuantlensError(answer.message)
    if answer.result is None:
        raise QuantlensError(f"{label} could not be measured at FP32 ({reason(answer.error)})")
    return Result.from_dict({**answer.result, "method": "fp32"})


def _check_same(here: Mapping[str, str], there: Mapping[str, str]) -> None:
    other = [name for name, mark in there.items() if here.get(name) != mark]
    if other:
        raise QuantlensError(
            f"the images of {other[0]} on node {platform.node()} are not those of the driver's machine; put the same "
            "files under the same path on every node"
        )


def _said(error: BaseException) -> str:
    return full_disk(error) if is_full_disk(error) else str(error)
