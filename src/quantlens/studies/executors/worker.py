"""What a worker does, wherever it runs: load models, measure cells and hand them back. It never sees the store."""

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
from quantlens.studies.measuring import ModelWork, Outcome, full_disk, is_full_disk, stops, told
from quantlens.studies.progress import Quiet


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
    """A worker, which keeps the model it worked on last.

    Images and weights are read from the paths of the study, so those must exist on every node. threads: of torch; None
    leaves them. images: the study's, where they have been listed in this process; otherwise they are listed here, and
    must have the fingerprints `marks` of those of the driver.
    """

    def __init__(
        self,
        config: StudyConfig,
        backend: Backend,
        threads: int | None = None,
        marks: Mapping[str, str] | None = None,
        images: StudyImages | None = None,
        shown: Quiet | None = None,
    ) -> None:
        self.config, self.backend, self.threads, self.marks = config, backend, threads, dict(marks or {})
        self.images, self.shown = images, shown or Quiet()
        self.work: ModelWork | None = None
        self.device = "cpu"

    def start(self) -> Stop | None:
        """List the images on this node."""
        try:
            load_all(self.config.plugins)
            if self.threads is not None:
                self.backend.set_threads(self.threads)
            self.device = self.backend.device(self.config.device)
            if self.images is None:
                images = StudyImages.open(self.config, self.backend)
                _check_same(images.marks(), self.marks)
                self.images = images
        except (QuantlensError, OSError) as error:
            return Stop(_said(error))
        return None

    def load(self, index: int) -> Loaded | Outcome | Stop:
        """Load the model with that number in the study; an Outcome is the error of one that cannot be loaded."""
        try:
            work = self._work(index)
        except Exception as error:
            return Stop(_said(error)) if stops(error) else Outcome(None, told(error), 0.0)
        return Loaded(work.checkpoint_sha256, work.preprocess)

    def run(self, index: int, cell: PlannedCell, checkpoint_sha256: str | None) -> Outcome | Stop:
        """Measure a cell of a model; the driver compares it with FP32. checkpoint_sha256: as the driver knows it."""
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
        self.shown.working(str(cell))
        try:
            self.work.decode()
            return self.work.attempt(cell)
        except (QuantlensError, OSError) as error:
            return Stop(_said(error))

    def _work(self, index: int) -> ModelWork:
        """The model with that number in the study; the one before it is given up."""
        assert self.images is not None
        spec = self.config.models[index]
        if self.work is None or self.work.label != spec.label:
            if self.work is not None:
                self.work = None
                self.backend.free(at_once=True)
            self.shown.working(f"loading {spec.label}")
            self.work = ModelWork(self.config, self.backend, self.images, self.device, spec, self.shown)
        return self.work


def _check_same(here: Mapping[str, str], there: Mapping[str, str]) -> None:
    other = [name for name, mark in there.items() if here.get(name) != mark]
    if other:
        raise QuantlensError(
            f"the images of {other[0]} on node {platform.node()} are not those of the driver's machine; put the same "
            "files under the same path on every node"
        )


def _said(error: BaseException) -> str:
    return full_disk(error) if is_full_disk(error) else str(error)
