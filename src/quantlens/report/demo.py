"""The main job on what ships with the package: a study of the embedded model on the embedded images, and its report."""

import os
from collections.abc import Sequence
from pathlib import Path

from quantlens import zoo
from quantlens.errors import QuantlensError
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


def run_demo(
    out_dir: str | os.PathLike[str],
    methods: Sequence[str] = METHODS,
    bits: Sequence[str] = BITS,
    seeds: Sequence[int] = SEEDS,
    *,
    scores: Sequence[str] | None = None,
    progress: bool | Quiet = True,
    workers: int | None = None,
) -> tuple[Summary, Path]:
    """Quantize the embedded model by each method (("all",): by every one there is) at each precision with each seed,
    evaluate, and write the report.

    workers: processes that share the work; two where there are two cores, as the model is too small to use both itself.
    Resumes like any study. Returns the study's summary and the path of the report. Raises QuantlensError when every
    cell failed.
    """
    if tuple(methods) == ("all",):
        methods = [name for name in available() if name != "fp32"]
    sources = zoo.available()[MODEL].sources
    study = {
        "name": "quantlens demo",
        "models": [MODEL],
        "methods": list(methods),
        "bits": list(bits),
        "seeds": list(seeds),
        "calibration": {"source": sources.calibration, "n": CALIBRATION_IMAGES},
        "id": sources.id,
        "ood": sources.ood,
        "fit": sources.fit,
        "scores": None if scores is None else list(scores),
        "device": "cpu",
    }
    config = parse_config(study, where="the demo")
    summary = run_study(config, out_dir, workers=workers or min(2, cores()), progress=progress)
    if not summary.done:
        raise QuantlensError(f"every cell of the demo failed; the first one: {summary.failed[0][1]}")
    return summary, write_report(Path(out_dir))
