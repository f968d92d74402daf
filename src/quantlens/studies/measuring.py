"""What a worker does, wherever it runs: load models, decode their images once, measure cells and hand them back. It
never sees the store."""

import errno
import platform
import re
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from threadpoolctl import threadpool_limits

from quantlens.data import load_images
from quantlens.errors import QuantlensError, QuantlensWarning, StorageError
from quantlens.evaluation.environment import choose_device
from quantlens.evaluation.images import source_name
from quantlens.evaluation.outputs import pack
from quantlens.plugins import load_all
from quantlens.studies.backend import Backend
from quantlens.studies.cells import PlannedCell, StudyImages, weights_of
from quantlens.studies.config import ModelSpec, StudyConfig
from quantlens.studies.progress import Quiet


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: its result (not compared and labelled yet) or the traceback, the seconds it took, and the
    file of its per-image outputs, where the study keeps them."""

    result: dict[str, Any] | None
    error: str | None
    seconds: float
    outputs: bytes | None = None


class Heard(NamedTuple):
    """What a worker answers, and the texts of its warnings."""

    answer: Any
    warnings: list[str]


class ModelWork:
    """A loaded model and the images it is measured on, each set decoded when the first cell needs it.

    model: as `Backend.load_model` returns it. shown: told what goes on inside a cell.
    """

    def __init__(
        self, config: StudyConfig, backend: Backend, images: StudyImages, device: str, spec: ModelSpec, shown: Quiet
    ) -> None:
        self.config, self.backend, self.images, self.shown = config, backend, images, shown
        self.label = spec.label
        self.model = backend.load_model(spec.name, weights_of(spec), device, spec.options)
        self.checkpoint_sha256: str | None = self.model.checkpoint_sha256
        self.preprocess: dict[str, Any] = self.model.preprocess.to_dict()
        self._loaded: dict[str, Any] = {}
        self.keeps_shift = images.keeps_shift(config, self.preprocess)

    def load(self, what: str) -> Any:
        """The decoded images of a source, by its name in `StudyImages.named`."""
        if what not in self._loaded:
            self._loaded[what] = load_images(
                self.images.named[what],
                self.model.preprocess,
                cache_dir=None if self.config.cache is True else self.config.cache,
                skip_bad=self.config.skip_bad,
                keep_corrupted=self.keeps_shift,
                progress=lambda done, total: self.shown.step(f"decoding {what}", done, total),
            )
        return self._loaded[what]

    def evaluated(self) -> tuple[Any, dict[str, Any], Any]:
        """The ID set, the OOD sets and the fit set; what reading them raises, every cell would raise."""
        ood = {name: self.load(f"OOD set {name}") for name in self.images.ood}
        if self.keeps_shift:
            for done, name in enumerate(self.images.shift):
                self.shown.step("making shifted images", done, len(self.images.shift))
                self.load(f"shifted set {name}")
        return self.load("the ID set"), ood, None if self.images.fit is None else self.load("the fit set")

    def shifted(self) -> dict[str, Any]:
        """What opens each shifted set. Where they are not kept, each is made again by every cell, as all of them
        together would fill the memory."""

        def opened(what: str) -> Any:
            images = self.load(what)
            if not self.keeps_shift:
                del self._loaded[what]
            return images

        return {name: partial(opened, f"shifted set {name}") for name in self.images.shift}

    def calibration(self, seed: int) -> Any:
        """The decoded calibration images of a seed."""
        assert self.config.calibration is not None
        images, wanted = self.load(f"the calibration images of seed {seed}"), self.config.calibration.n
        if len(images) < wanted and not self.config.skip_bad:
            raise QuantlensError(
                f"{source_name(images)} gave {len(images)} calibration images, not {wanted}; give a larger source"
            )
        return images

    def measure(self, cell: PlannedCell) -> tuple[dict[str, Any], bytes | None]:
        """The result dict of a cell, not compared with FP32 yet, and its per-image outputs packed."""
        config, step = self.config, self.shown.step
        if cell.inspects and cell.method is not None:
            images = self.load("the inspected images")
            return {
                "inspection": self.backend.inspect(self.model, images, cell.method, cell.bits, cell.seed, step)
            }, None
        started = time.perf_counter()
        measured = self.model
        if cell.foreign is not None:
            measured = self.backend.open_foreign(cell.foreign, self.model, cell.bits)
        elif cell.method is not None:
            images = self.calibration(cell.seed)
            measured = self.backend.quantize(
                self.model, images, cell.method, cell.bits, cell.seed, lambda n, total: step("calibrating", n, total)
            )
        seconds = time.perf_counter() - started
        # NumPy's sums (ViM, Mahalanobis) differ in the last bit with its threads, and those with the executor
        id, ood, fit = self.evaluated()
        with threadpool_limits(limits=1, user_api="blas"):
            result = self.backend.evaluate(
                measured,
                id,
                ood,
                fit=fit,
                **({"shift": self.shifted()} if self.images.shift else {}),
                reference=False,
                scores=config.scores,
                groups=self.images.groups,
                batch_size=config.batch_size,
                progress=step,
                keep=config.outputs,
            )
        outputs = None if result.outputs is None else pack(result.outputs)
        data: dict[str, Any] = result.to_dict()
        if cell.quantizes:
            data["seconds"] = {**data["seconds"], "calibration": seconds}
        if config.attention is not None:
            started = time.perf_counter()
            data |= self.backend.attention(measured, self.model, id, ood, config.attention, step)
            data["seconds"] = {**data["seconds"], "attention": time.perf_counter() - started}
        return data, outputs

    def attempt(self, cell: PlannedCell) -> Outcome:
        """Measure a cell; what it raises is its outcome, unless it would stop every other cell too (see `stops`)."""
        started = time.perf_counter()
        try:
            result, outputs = self.measure(cell)
            outcome = Outcome(result, None, time.perf_counter() - started, outputs)
        except Exception as problem:
            if stops(problem):
                raise
            outcome = Outcome(None, told(problem), time.perf_counter() - started)
        self.backend.free()
        return outcome


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

    def call(self, method: str, *arguments: Any) -> Heard:
        """What a method returns, or the `Stop` of what would stop every other cell, too; with its warnings, which the
        driver tells: of several workers each would say the same."""
        said: list[str] = []
        with warnings.catch_warnings():
            usual = warnings.showwarning

            def hear(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
                if issubclass(category, QuantlensWarning):
                    said.append(str(message))
                else:
                    usual(message, category, *place, **more)

            warnings.showwarning = hear  # type: ignore[assignment]
            try:
                return Heard(getattr(self, method)(*arguments), said)
            except (QuantlensError, OSError) as error:
                full = f"the disk is full ({error}); free some space and run the same command again"
                return Heard(Stop(full if is_full_disk(error) else str(error)), said)

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
        self.work.evaluated()
        return self.work.attempt(cell)


def stops(problem: BaseException) -> bool:
    """Whether an error stops the study: every further cell would fail for the same reason."""
    return isinstance(problem, StorageError) or is_full_disk(problem)


def is_full_disk(error: BaseException) -> bool:
    """Whether there is no room, or no right, to write."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def told(problem: BaseException) -> str:
    """The traceback as text."""
    return "".join(traceback.format_exception(problem))


def reason(error: str | None) -> str:
    """The last line of a traceback, without the module of quantlens' exceptions."""
    last = ((error or "").strip().splitlines() or ["unknown reason"])[-1]
    return re.sub(r"^quantlens\.errors\.\w+: ", "", last)
