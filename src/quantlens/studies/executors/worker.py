"""What a worker does, wherever it runs: load models, measure cells and hand them back. It never sees the store."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantlens.errors import QuantlensError
from quantlens.evaluation.environment import choose_device
from quantlens.plugins import load_all
from quantlens.studies.backend import Backend
from quantlens.studies.cells import PlannedCell, StudyImages
from quantlens.studies.config import StudyConfig
from quantlens.studies.measuring import ModelWork, Outcome, is_full_disk, stops, told
from quantlens.studies.progress import Quiet


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
        self.config, self.backend, self.threads, self.marks = config, backend, threads, marks or {}
        self.images, self.shown = images, shown or Quiet()
        self.work: ModelWork | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method returns, or the `Stop` of what would stop every other cell, too."""
        try:
            return getattr(self, method)(*arguments)
        except (QuantlensError, OSError) as error:
            full = f"the disk is full ({error}); free some space and run the same command again"
            return Stop(full if is_full_disk(error) else str(error))

    def start(self) -> None:
        """List the images on this node."""
        load_all(self.config.plugins)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.images is None:
            self.images = StudyImages.open(self.config)
            for name, mark in self.marks.items():
                if self.images.marks.get(name) != mark:
                    raise QuantlensError(
                        f"the images of {name} on node {platform.node()} are not those of the driver's machine; put "
                        "the same files under the same path on every node"
                    )

    def load(self, index: int) -> tuple[str | None, dict[str, Any]] | Outcome:
        """Load the model with that number in the study: its checkpoint and preprocessing, which the keys of its cells
        are made of; an Outcome is the error of one that cannot be loaded."""
        assert self.images is not None
        spec, device = self.config.models[index], choose_device(self.config.device)
        try:
            if self.work is None or self.work.label != spec.label:
                if self.work is not None:
                    self.work = None
                    self.backend.free(at_once=True)
                self.shown.working(f"loading {spec.label}")
                self.work = ModelWork(self.config, self.backend, self.images, device, spec, self.shown)
        except Exception as error:
            if stops(error):
                raise
            return Outcome(None, told(error), 0.0)
        return self.work.checkpoint_sha256, self.work.preprocess

    def run(self, index: int, cell: PlannedCell, checkpoint_sha256: str | None) -> Outcome:
        """Measure a cell of a model; the driver compares it with FP32. checkpoint_sha256: as the driver knows it."""
        loaded = self.load(index)
        if isinstance(loaded, Outcome):
            return loaded
        if loaded[0] != checkpoint_sha256:
            raise QuantlensError(
                f"{self.config.models[index].label}: the checkpoint on node {platform.node()} is another one (SHA-256 "
                f"{str(loaded[0])[:12]}…, not {str(checkpoint_sha256)[:12]}…); put the same file on every node"
            )
        assert self.work is not None
        self.shown.working(str(cell))
        self.work.decode()
        return self.work.attempt(cell)
