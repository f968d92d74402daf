"""The main job on what ships with the package: a study of an embedded model on embedded images, and its report."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quantlens import zoo
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.evaluation.environment import cores
from quantlens.methods.registry import available
from quantlens.report.build import write_report
from quantlens.studies.config import parse_config
from quantlens.studies.progress import Quiet
from quantlens.studies.runner import Summary, run_study

MODEL = "digits-vit"
METHODS = ("minmax", "percentile", "repq-vit", "quantlens-fast")
BITS = ("FP32", "W8A8", "W6A6", "W4A8", "W8A4", "W4A4")
SEEDS = (0, 13, 37)
CALIBRATION_IMAGES = 32


class Demo(NamedTuple):
    """What is quantized, and how, unless a person says otherwise. slice: of the sets that are evaluated."""

    model: str
    methods: tuple[str, ...]
    bits: tuple[str, ...]
    seeds: tuple[int, ...]
    slice: str = ""


DEMOS = {
    "classify": Demo(MODEL, METHODS, BITS, SEEDS),
    "detect": Demo(
        "scenes-detr",
        ("minmax", "percentile", "easyquant", "bit-split", "vt-ptq", "aocq", "quantlens-fast"),
        ("FP32", "W8A8", "W6A6", "W4A4"),
        (0,),
        "[:256]",
    ),
}
"""By task."""


def demo_of(task: str) -> Demo:
    """The demo of a task. Raises UnknownNameError for a task without one."""
    if task not in DEMOS:
        raise UnknownNameError("demo", task, DEMOS, "tasks: " + ", ".join(DEMOS))
    return DEMOS[task]


def run_demo(
    out_dir: str | os.PathLike[str],
    methods: Sequence[str] | None = None,
    bits: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    task: str = "classify",
    scores: Sequence[str] | None = None,
    progress: bool | Quiet = True,
    workers: int | None = None,
) -> tuple[Summary, Path]:
    """Quantize the embedded model of a task by each method (("all",): by every one there is) at each precision with
    each seed, evaluate, and write the report. None: what :data:`DEMOS` has.

    workers: processes that share the work; two where there are two cores, as the model is too small to use both itself.
    Resumes like any study. Returns the study's summary and the path of the report. Raises QuantlensError when every
    cell failed.
    """
    demo = demo_of(task)
    methods = demo.methods if methods is None else methods
    if tuple(methods) == ("all",):
        methods = [name for name in available() if name != "fp32"]
    sources = zoo.available()[demo.model].sources
    study = {
        "name": "quantlens demo" if task == "classify" else "quantlens demo: a detector",
        "models": [demo.model],
        "methods": list(methods),
        "bits": list(demo.bits if bits is None else bits),
        "seeds": list(demo.seeds if seeds is None else seeds),
        "calibration": {"source": sources.calibration, "n": CALIBRATION_IMAGES},
        "id": sources.id + demo.slice,
        "ood": {name: {**one, "source": one["source"] + demo.slice} for name, one in sources.ood.items()},
        "fit": sources.fit if task == "classify" else None,
        "scores": None if scores is None else list(scores),
        "device": "cpu",
    }
    config = parse_config(study, where="the demo")
    summary = run_study(config, out_dir, workers=workers or min(2, cores()), progress=progress)
    if not summary.done:
        raise QuantlensError(f"every cell of the demo failed; the first one: {summary.failed[0][1]}")
    return summary, write_report(Path(out_dir))
