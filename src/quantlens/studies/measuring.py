"""The work of a study without its store: load a model, decode its images once, and measure its cells.

Executors put this where they like: in the process that holds the store, or in a worker that never sees it.
"""

from __future__ import annotations

import errno
import re
import time
import traceback
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from threadpoolctl import threadpool_limits

from quantlens.data import load_images
from quantlens.errors import QuantlensError, StorageError
from quantlens.evaluation.images import source_name
from quantlens.evaluation.outputs import pack
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
        self._calibration: dict[int, Any] = {}

    @property
    def checkpoint_sha256(self) -> str | None:
        return None if self.model.checkpoint_sha256 is None else str(self.model.checkpoint_sha256)

    @property
    def preprocess(self) -> dict[str, Any]:
        return dict(self.model.preprocess.to_dict())

    @cached_property
    def id(self) -> Any:
        return self._load(self.images.id, "the ID set")

    @cached_property
    def ood(self) -> dict[str, Any]:
        return {name: self._load(source, f"OOD set {name}") for name, source in self.images.ood.items()}

    @cached_property
    def fit(self) -> Any:
        return None if self.images.fit is None else self._load(self.images.fit, "the fit set")

    def decode(self) -> None:
        """Read every set that is evaluated; raises at once what every cell would raise."""
        _ = self.id, self.ood, self.fit

    def calibration(self, seed: int) -> Any:
        """The decoded calibration images of a seed."""
        if seed not in self._calibration:
            assert self.config.calibration is not None
            images = self._load(self.images.calibration[seed], "the calibration images")
            wanted = self.config.calibration.n
            if len(images) < wanted and not self.config.skip_bad:
                raise QuantlensError(
                    f"{source_name(images)} gave {len(images)} calibration images, not {wanted}; give a larger source"
                )
            self._calibration[seed] = images
        return self._calibration[seed]

    def measure(self, cell: PlannedCell) -> tuple[dict[str, Any], bytes | None]:
        """The result dict of a cell, not compared with FP32 yet, and its per-image outputs packed."""
        config, step = self.config, self.shown.step
        if cell.inspects:
            images = self._load(self.images.inspected, "the inspected images")
            return {
                "inspection": self.backend.inspect(self.model, images, cell.method, cell.bits, cell.seed, step)
            }, None
        started = time.perf_counter()
        measured = self.model
        if cell.method is not None:
            images = self.calibration(cell.seed)
            measured = self.backend.quantize(
                self.model, images, cell.method, cell.bits, cell.seed, lambda n, total: step("calibrating", n, total)
            )
        seconds = time.perf_counter() - started
        # NumPy's sums (ViM, Mahalanobis) differ in the last bit with its threads, and those with the executor
        with threadpool_limits(limits=1, user_api="blas"):
            result = self.backend.evaluate(
                measured,
                self.id,
                self.ood,
                fit=self.fit,
                reference=False,
                scores=config.scores,
                groups=self.images.groups,
                batch_size=config.batch_size,
                progress=step,
                keep=config.outputs,
            )
        outputs = None if result.outputs is None else pack(result.outputs)
        data: dict[str, Any] = result.to_dict()
        if cell.method is not None:
            data["seconds"] = {**data["seconds"], "calibration": seconds}
        if config.attention is not None:
            started = time.perf_counter()
            data |= self.backend.attention(measured, self.model, self.id, self.ood, config.attention, step)
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

    def _load(self, source: Any, what: str) -> Any:
        cache = self.config.cache
        return load_images(
            source,
            self.model.preprocess,
            cache_dir=None if cache is True else cache,
            skip_bad=self.config.skip_bad,
            progress=lambda done, total: self.shown.step(f"decoding {what}", done, total),
        )


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
