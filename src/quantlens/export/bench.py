"""Latency of exported models and what they are compared with: interleaved runs in one process, so that ratios hold
though the machine's speed drifts."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.data import as_image_set
from quantlens.errors import QuantlensError
from quantlens.export.exported import Artefact
from quantlens.export.peers import peer_files
from quantlens.export.runtimes import isolated


@dataclass(frozen=True)
class Contender:
    """Something to time. make: threads -> function of images [B, 3, H, W] float32. path: its file, if it has one.
    facts: what it is (see `Artefact.facts`). model: threads -> what `evaluate` measures."""

    label: str
    make: Callable[[int], Callable[[np.ndarray], Any]]
    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    model: Callable[[int], Any] | None = None


def contender(path: str | Path, label: str | None = None) -> Contender:
    """An exported file."""
    path = Path(path)

    def model(threads: int) -> Artefact:
        return Artefact(path, threads=threads)

    return Contender(label or path.name, lambda threads: model(threads).run, path, Artefact(path).facts(), model)


def eager(model: Any, label: str = "PyTorch eager FP32") -> Contender:
    """The float model in PyTorch, as its author wrote it."""
    import torch

    @torch.inference_mode()
    def run(threads: int, images: np.ndarray) -> Any:
        torch.set_num_threads(threads)
        return model.module(torch.from_numpy(images))

    facts = {
        "fingerprint": f"torch {model.checkpoint_sha256 or model.name}",
        "file": None,
        "runtime": f"torch {torch.__version__}",
        "model": model.name,
        "method": "fp32",
        "bits": "FP32",
        "seed": 0,
        "checkpoint_sha256": model.checkpoint_sha256,
        "size_mb": None,
        "integers": None,
    }
    return Contender(label, lambda threads: partial(run, threads), facts=facts, model=lambda threads: model)


@isolated
def bench(
    contenders: Sequence[Contender],
    *,
    input_size: tuple[int, int, int],
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    rounds: int = 30,
    memory: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time all contenders at every batch size and thread count; the first one is the baseline of the ratios.

    Runs are interleaved: every round runs each contender once, in an order drawn anew. Two warm-up runs are not
    counted. memory: that of each file, in a process of its own. Returns a row per contender, batch and thread count:
    milliseconds per batch (median, 10th and 90th percentile), images per second, size of the file and memory that the
    model holds once it has run (MB, 10⁶ bytes; None where not measured), ``speedup``: the baseline's median over this
    one's, and the fingerprint and runtime of what was timed.
    """
    if not contenders:
        raise QuantlensError("nothing to time: give at least one exported model")
    generator = np.random.default_rng(seed)
    held = {c.label: _memory(c.path) if memory and c.path else None for c in contenders}
    total, done, found = len(batches) * len(threads) * rounds, 0, []
    for count in threads:
        runs = [c.make(count) for c in contenders]
        for batch in batches:
            images = generator.standard_normal((batch, *input_size), dtype=np.float32)
            for run in runs:
                run(images)
                run(images)
            times = np.zeros((len(runs), rounds))
            for i in range(rounds):
                for j in generator.permutation(len(runs)):
                    start = time.perf_counter()
                    runs[j](images)
                    times[j, i] = time.perf_counter() - start
                done += 1
                if progress is not None:
                    progress(done, total)
            medians = np.median(times, axis=1)
            for j, c in enumerate(contenders):
                low, high = np.quantile(times[j], [0.1, 0.9])
                found.append(
                    {
                        "label": c.label,
                        "batch": batch,
                        "threads": count,
                        "median_ms": float(1e3 * medians[j]),
                        "p10_ms": float(1e3 * low),
                        "p90_ms": float(1e3 * high),
                        "images_per_second": float(batch / medians[j]),
                        "size_mb": c.facts.get("size_mb"),
                        "memory_mb": held[c.label],
                        "speedup": float(medians[0] / medians[j]),
                        "fingerprint": c.facts.get("fingerprint", ""),
                        "runtime": c.facts.get("runtime", ""),
                    }
                )
    return found


@isolated
def line_up(
    paths: Sequence[str | Path], folder: Path, *, fp32: Any = None, with_peers: bool = False, peer_images: Any = None
) -> list[Contender]:
    """Who is timed: exported files of one model, behind its float model, the float model's files in the runtimes that
    are installed, and what the runtimes' own tools make of that.

    folder: where files are written. fp32: the float model (`load_model`); None: the files alone. with_peers: also the
    runtimes' own int8, quantized with ``peer_images`` (a SOURCE, an image set or a float tensor; None: noise, which
    gives their speed, not their accuracy) and run with the runtime's own settings. Raises QuantlensError for files that
    take images of different sizes.
    """
    if len({Artefact(path).preprocess.input_size for path in paths}) != 1:
        raise QuantlensError(
            "give at least one exported model, and time those that take different sizes of image apart"
        )
    if with_peers and fp32 is None:
        raise QuantlensError("the runtimes' own tools (--peers) quantize the float model; give it, too (--fp32 MODEL)")
    contenders = [contender(path) for path in paths]
    if fp32 is None:
        return contenders
    floats = [eager(fp32), *float_files(fp32, folder)]
    made = peer_files(_pixels(peer_images, fp32), folder) if with_peers else {}
    return [*floats, *(contender(path, label) for label, path in made.items()), *contenders]


def _pixels(images: Any, model: Any) -> np.ndarray:
    """Images as the model reads them, float32 [N, 3, H, W]: of a SOURCE those that `quantize` would draw; 16 of noise
    for None."""
    if images is None:
        shape = (16, *model.preprocess.input_size)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if isinstance(images, str):
        from quantlens.data.sources import open_calibration

        images = open_calibration(images)
    return as_image_set(images, model.preprocess).tensor().numpy()


def float_files(model: Any, folder: Path) -> list[Contender]:
    """The float model in ONNX Runtime and in OpenVINO, exported into ``folder``; what is not installed is left out."""
    from quantlens.export.export import export

    found = []
    for name, label in (("fp32.onnx", "ONNX Runtime FP32"), ("fp32.xml", "OpenVINO FP32")):
        with suppress(QuantlensError):
            found.append(contender(export(model, folder / name), label))
    return found


_MEMORY = """
import sys, numpy, psutil
from quantlens.export.exported import Artefact
from quantlens.export.runtimes import need
need("onnxruntime" if sys.argv[1].endswith(".onnx") else "openvino")
before = psutil.Process().memory_full_info().uss
artefact = Artefact(sys.argv[1], threads=1)
artefact.run(numpy.zeros((1, *artefact.preprocess.input_size), numpy.float32))
print((psutil.Process().memory_full_info().uss - before) / 1e6)
"""


def _memory(path: Path) -> float | None:
    """MB of its own that a process holds after loading a file and running it once, above those of the imported
    runtime; None where it cannot be measured."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(path.resolve())],
            capture_output=True,
            text=True,
            cwd=folder,
            check=False,
        )
    try:
        return max(0.0, float(result.stdout.split()[-1]))
    except (IndexError, ValueError):
        return None
