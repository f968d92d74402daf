"""The main job on what ships with the package: a study of the embedded model on the embedded images, and its report."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlens.errors import QuantlensError
from quantlens.evaluation.environment import cores
from quantlens.studies.backend import Backend
from quantlens.studies.config import StudyConfig, parse_config
from quantlens.studies.progress import Quiet
from quantlens.studies.results import Mean, results
from quantlens.studies.runner import Summary, run_study

MODEL = "digits-vit"
METHODS = ("minmax", "percentile", "repq-vit", "quantlens-fast")
BITS = ("FP32", "W8A8", "W6A6", "W4A8", "W8A4", "W4A4")
SEEDS = (0, 13, 37)
CALIBRATION_IMAGES = 32


@dataclass(frozen=True)
class Demo:
    """What the demo left behind: the study's summary, the report's path, means over seeds with a title for them, and
    the seconds that all of it took."""

    summary: Summary
    report: Path
    means: list[Mean]
    title: str
    seconds: float


def demo_config(
    methods: Sequence[str] = METHODS,
    bits: Sequence[str] = BITS,
    seeds: Sequence[int] = SEEDS,
    *,
    scores: Sequence[str] | None = None,
    batch_size: int = 64,
    device: str = "cpu",
) -> StudyConfig:
    """The demo as a study. `methods` ("all",) is every method in the registry."""
    if tuple(methods) == ("all",):
        from quantlens.methods.registry import available

        methods = [name for name in available() if name != "fp32"]
    from quantlens import zoo

    sources = zoo.available()[MODEL].sources
    data: Mapping[str, Any] = {
        "name": "quantlens demo",
        "models": [MODEL],
        "methods": list(methods),
        "bits": list(bits),
        "seeds": list(seeds),
        "calibration": {"source": sources.calibration, "n": CALIBRATION_IMAGES},
        "id": sources.id,
        "ood": {name: {"source": ood.source, "group": ood.group} for name, ood in sources.ood.items()},
        "fit": sources.fit,
        "scores": None if scores is None else list(scores),
        "batch_size": batch_size,
        "device": device,
    }
    return parse_config(data, where="the demo")


def run_demo(
    out_dir: str | os.PathLike[str],
    methods: Sequence[str] = METHODS,
    bits: Sequence[str] = BITS,
    seeds: Sequence[int] = SEEDS,
    *,
    scores: Sequence[str] | None = None,
    progress: bool | Quiet = True,
    workers: int | None = None,
    device: str = "cpu",
    backend: Backend | None = None,
) -> Demo:
    """Quantize the embedded model by each method at each precision with each seed, evaluate, and write the report.

    workers: processes that share the work; two where there are two cores, as the model is too small to use both itself.
    Resumes like any study. Raises QuantlensError when every cell failed.
    """
    from quantlens.report import write_report

    started = time.monotonic()
    config = demo_config(methods, bits, seeds, scores=scores, device=device)
    if workers is None:
        workers = min(2, cores())
    summary = run_study(config, out_dir, workers=workers, progress=progress, backend=backend)
    if not summary.done:
        raise QuantlensError(f"every cell of the demo failed; the first one: {summary.failed[0][1]}")
    means = results(Path(out_dir)).means()
    report = Path(write_report(Path(out_dir)))
    title = f"{MODEL}: {len(means)} rows, mean ± standard deviation over {len(set(seeds))} seeds"
    return Demo(summary, report, means, title, time.monotonic() - started)
