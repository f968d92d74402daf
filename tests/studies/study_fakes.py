"""A small stand-in for models and methods: nearest-centroid classifiers on the embedded digits, quantized by rounding.

The images, metrics, store and runner are the real ones. `FakeBackend` notes every cell it runs in a file, so that tests
see what ran, in which process, and how often.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from quantlens.data import Preprocess, open_source
from quantlens.data.images import load_images
from quantlens.errors import UnknownNameError
from quantlens.studies.backend import Backend, MethodChoice
from quantlens.studies.config import StudyConfig, parse_config
from quantlens.studies.progress import Quiet

PREPROCESS = Preprocess((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "center")
OPTIONS = {"minmax": {}, "percentile": {"percentile": 99.9}}


@lru_cache(maxsize=1)
def centroids() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [8, 64] and bias [8] of the nearest-centroid rule on 8x8 grey means."""
    images = load_images(open_source("embedded:digits-fit"), PREPROCESS, cache_dir=False)
    features = features_of(images.tensor())
    labels = torch.tensor(images.labels)
    means = torch.stack([features[labels == k].mean(0) for k in range(8)])
    return means, -0.5 * (means**2).sum(1)


def features_of(pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4).flatten(1)


@dataclass
class FakeModel:
    """Follows the contract of a model: outputs, classifier, preprocess, and what it is."""

    name: str = "fake"
    weight: torch.Tensor = field(default_factory=lambda: centroids()[0])
    bias: torch.Tensor = field(default_factory=lambda: centroids()[1])
    method: str = "fp32"
    bits: str = "FP32"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    reference: Any = None
    preprocess: Preprocess = PREPROCESS
    size_mb: float = 0.002
    size_ratio: float = 1.0
    num_classes: int = 8
    num_parameters: int = 520
    class_names: list[str] | None = None
    batches_seen: int = 0

    @property
    def checkpoint_sha256(self) -> str:
        return hashlib.sha256(centroids()[0].numpy().tobytes() + self.name.encode()).hexdigest()

    def outputs(self, x: torch.Tensor) -> Any:
        self.batches_seen += 1
        features = features_of(x)
        return SimpleNamespace(logits=features @ self.weight.T + self.bias, features=features)

    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, self.bias

    def to(self, device: str) -> FakeModel:
        return self


def quantized(model: FakeModel, bits: str, seed: int = 0, method: str = "minmax") -> FakeModel:
    """Weights rounded to the bits of `W<n>A<m>`, with a little noise from the seed."""
    width = int(bits[1 : bits.index("A")])
    step = float(model.weight.abs().max()) / (2 ** (width - 1))
    noise = torch.rand(model.weight.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    weight = torch.round(model.weight / step + 0.5 * noise) * step
    return FakeModel(model.name, weight, model.bias, method, bits, seed, reference=model, size_ratio=width / 32)


def surroundings() -> dict[str, str]:
    """The environment of a process that finds this module, and what its parent finds."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


BALLAST = "ballast"


def fill(disk: Path) -> None:
    """Leave no room on the file system that is mounted there."""
    with (disk / BALLAST).open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


class FakeBackend(Backend):
    """`log`: a line for each cell run. `pause`: seconds a quantized cell takes, in a temporary folder with `scratch`.
    `patience`: seconds that FP32 waits for a quantized cell to begin. `broken`: cells ("minmax W4A4 0", "fp32") that
    raise; with `error` "full" and "interrupt" what these say; with "kill" they kill their process ("kill once": at the
    first try alone), with a path they fill the disk there."""

    def __init__(
        self,
        log: Path,
        pause: float = 0.0,
        broken: tuple[str, ...] = (),
        error: str = "",
        patience: float = 0.0,
        scratch: bool = False,
    ) -> None:
        self.log, self.pause, self.broken, self.error, self.patience = Path(log), pause, broken, error, patience
        self.scratch = scratch

    def free(self, *, at_once: bool = False) -> None:
        """Nothing: these models hold no cycles, and a collection walks all that other tests left."""

    def note(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{text} pid {os.getpid()}\n")

    def method(self, name: str, options: Any) -> MethodChoice:
        if name not in OPTIONS:
            raise UnknownNameError("method", name, OPTIONS)
        return MethodChoice(name, 1, {**OPTIONS[name], **options})

    def check_model(self, name: str, weights: str | None) -> None:
        if name.startswith("unknown"):
            raise UnknownNameError("model", name, ["fake"])

    def load_model(self, name: str, weights: str | None, device: str, options: Any) -> FakeModel:
        self.note(f"load {name}")
        if name == "unloadable":
            raise RuntimeError("no such weights")
        return FakeModel(name)

    def quantize(
        self, model: FakeModel, calibration: Any, choice: MethodChoice, bits: str, seed: int, progress: Any
    ) -> FakeModel:
        self.begin(model, f"{choice.name} {bits} {seed}")
        assert len(calibration) == 16
        return quantized(model, bits, seed, choice.name)

    def begin(self, model: FakeModel, what: str) -> None:
        """Note a cell, take the time it takes, and raise for one that is broken."""
        self.note(f"start {model.name} {what}")
        with tempfile.TemporaryDirectory(prefix="quantlens-") if self.scratch else nullcontext():
            time.sleep(self.pause)
        if what not in self.broken:
            return
        if self.error == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.error == "interrupt":
            raise KeyboardInterrupt
        if self.error.startswith("kill"):
            tries = self.log.read_text().count(f"start {model.name} {what} ")
            if self.error == "kill" or tries == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return
        if not self.error:
            raise ValueError(f"{what} is broken")
        fill(Path(self.error))

    def inspect(
        self, model: FakeModel, images: Any, choice: MethodChoice, bits: str, seed: int, progress: Any
    ) -> dict[str, Any]:
        self.begin(model, f"inspection {bits} {seed}")
        found = inspection(model.name, choice.name, bits, {"source": str(images.source), "n": len(images)})
        self.note(f"end {model.name} inspection {bits} {seed}")
        return found.to_dict()

    def evaluate(self, model: FakeModel, id: Any, ood: Any, **settings: Any) -> Any:
        if model.method == "fp32":
            deadline = time.monotonic() + self.patience
            while time.monotonic() < deadline and "start " not in self.log.read_text():
                time.sleep(0.02)
            if "fp32" in self.broken:
                raise ValueError("fp32 is broken")
        result = super().evaluate(model, id, ood, **settings)
        self.note(f"end {model.name} {model.method} {model.bits} {model.seed}")
        return result

    def ended(self) -> list[str]:
        """The cells that were measured, in order."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        return [line[4:].rpartition(" pid ")[0] for line in lines if line.startswith("end ")]


class Recorder(Quiet):
    """A display that notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.said: list[str] = []
        self.lefts: list[float | None] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def finished(self, kind, what, seconds, error=None) -> None:
        super().finished(kind, what, seconds, error)
        self.seen.append(what)
        self.lefts.append(self.left())


def inspection(model: str, method: str, bits: str, images: dict[str, Any]) -> Any:
    """A made-up Inspection of two layers, of which the second hurts."""
    from quantlens.sensitivity import Inspection  # late, as most processes of these tests do without
    from quantlens.sensitivity.alone import Effect
    from quantlens.sensitivity.inspection import Part
    from quantlens.sensitivity.statistics import EdgeStatistics

    still = EdgeStatistics("a.input", "input", False, 8, -1.0, 1.0, 3.0, 40.0, 4, 1.5, (2,), token_norm=2.0)
    loud = EdgeStatistics("b.input", "input", False, 8, -9.0, 90.0, 37762.0, 12.0, 4, 112.0, (), (3,), (90.0,), 9.0)
    parts = (
        Part("blocks.0.a", "linear", "blocks.0", bits, Effect(40.0, 1e-4, 0.0), (still,)),
        Part("blocks.0.b", "linear", "blocks.0", bits, Effect(12.5, 0.02, 0.1), (loud,)),
    )
    block = Part("blocks.0", "block", "blocks.0", bits, Effect(12.0, 0.03, 0.1))
    return Inspection(model, "sha", method, bits, 0, {"site": parts, "block": (block,)}, images)


def config(**changes: Any) -> StudyConfig:
    """A study of 1 + 2 x 2 x 2 = 9 cells on the embedded digits."""
    data: dict[str, Any] = {
        "name": "test",
        "models": ["fake"],
        "methods": ["minmax", "percentile"],
        "bits": ["FP32", "W8A8", "W3A3"],
        "seeds": [0, 13],
        "calibration": {"source": "embedded:digits-calibration", "n": 16},
        "id": "embedded:digits-test[0:100]",
        "ood": {"letters": "embedded:letters[0:40]", "other": "embedded:digits-held-out[0:40]"},
        "scores": ["msp", "energy"],
        "device": "cpu",
        "cache": False,
    }
    data.update(changes)
    return parse_config({k: v for k, v in data.items() if v is not ...})


if __name__ == "__main__":  # python study_fakes.py OUT LOG PAUSE [SETTINGS [CHANGES]]
    # a study in its own process: by `run_study`, or by `quantlens study` with the list SETTINGS of options
    import json
    import sys

    import study_fakes  # workers import the classes from the module, not from this script

    from quantlens.studies import runner

    torch.set_num_threads(1)
    out, log, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    settings, changes = (json.loads(sys.argv[i]) if len(sys.argv) > i else {} for i in (4, 5))
    backend = study_fakes.FakeBackend(log, pause)
    if isinstance(settings, dict):
        print(runner.run_study(config(**changes), out, backend=backend, **settings))
    else:
        from quantlens.cli.main import main

        runner.Backend = lambda: backend  # type: ignore[assignment, misc]
        file = log.with_suffix(".yaml")
        file.write_text(json.dumps(config(**changes).to_dict()))
        sys.argv = ["quantlens", "study", str(file), "--out", str(out), *settings]
        main()
