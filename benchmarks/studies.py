"""Studies: the cells of one run against the same cells one by one as commands, and two Ray workers against one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "deit_tiny_patch16_224"
SHARED = Path(os.environ.get("QUANTLENS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
BITS = ("W8A8", "W6A6", "W4A8", "W8A6", "W6A8", "W4A4")
SEEDS = (0, 13, 37)
METHOD = "percentile"
CALIBRATION = 32


def _study(images: int) -> dict[str, Any]:
    """6 precisions × 3 seeds of DeiT-Tiny on so many real images; calibration images come from the other half."""
    folder = SHARED / "imagenet"
    if not folder.is_dir():
        raise SystemExit(f"this benchmark needs the real weights and images, which are not at {SHARED}")
    return {
        "models": [{"name": MODEL, "weights": str(SHARED / "weights" / f"{MODEL}.safetensors")}],
        "methods": [METHOD],
        "bits": list(BITS),
        "seeds": list(SEEDS),
        "calibration": {"source": f"imagenet:{folder}[1::2]", "n": CALIBRATION},
        "id": f"imagenet:{folder}[0:{2 * images}:2]",
        "device": "cpu",
        "outputs": False,
    }


class _Commands:
    """Runs `quantlens` commands in an empty image cache, and counts their seconds and processor seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds, self.processor = folder, 0.0, 0.0
        self.environment = {**os.environ, "QUANTLENS_CACHE": str(folder / "cache")}

    def run(self, *arguments: str) -> None:
        """One command; its output is shown where it fails."""
        start, used = time.perf_counter(), _children()
        code = "from quantlens.cli.main import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(arguments)}: {result.stderr}")
        self.seconds += time.perf_counter() - start
        self.processor += _children() - used


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _write(folder: Path, study: dict[str, Any]) -> str:
    path = folder / "study.yaml"
    path.write_text(json.dumps(study), encoding="utf-8")  # JSON is YAML
    return str(path)


def studies(images: int = 100, every: int = 6) -> dict[str, Any]:
    """The 19 cells of a study in one run, against `quantize` and `evaluate` commands for every sixth of the quantized
    ones, times six (a cell costs the same at every width)."""
    study = _study(images)
    weights = study["models"][0]["weights"]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        run, single = _Commands(Path(one)), _Commands(Path(other))
        run.run("study", _write(Path(one), study), "--out", "out", "--quiet")
        single.run("evaluate", MODEL, "--weights", weights, "--id", study["id"], "--quiet")
        fp32 = single.seconds, single.processor
        cells = [(bits, seed) for bits in BITS for seed in SEEDS][::every]
        for bits, seed in cells:
            source = study["calibration"]["source"]
            settings = ["--n", str(CALIBRATION), "--method", METHOD, "--bits", bits, "--seed", str(seed)]
            out = ["--out", "q.safetensors", "--quiet"]
            single.run("quantize", MODEL, "--weights", weights, "--calibration", source, *settings, *out)
            single.run("evaluate", "q.safetensors", "--weights", weights, "--id", study["id"], "--quiet")
    share = len(BITS) * len(SEEDS) / len(cells)
    seconds = fp32[0] + (single.seconds - fp32[0]) * share
    processor = fp32[1] + (single.processor - fp32[1]) * share
    return {
        "images": images,
        "cells": 1 + len(BITS) * len(SEEDS),
        "one run": f"{run.seconds:.0f} s",
        "as commands": f"{seconds:.0f} s, from {len(cells)} of the quantized cells",
        "ratio": round(run.seconds / seconds, 2),
        "ratio of processor seconds": round(run.processor / processor, 2),
        "target": "at most 0.4",
    }


def ray_workers(images: int = 400, bits: tuple[str, ...] = BITS, seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """The same study on a Ray cluster of this machine that is there already, by one worker of one thread and by two.
    The two go first, and so decode the images. It needs two cores that nothing else uses."""
    import ray

    study = {**_study(images), "bits": list(bits), "seeds": list(seeds), "resources": {"cpu": 1}}
    seconds = {}
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        address = context.address_info["gcs_address"]
        with tempfile.TemporaryDirectory() as folder:
            commands = _Commands(Path(folder))
            place = ["--executor", "ray", "--address", address, "--quiet"]
            file = _write(Path(folder), study)
            for workers in (2, 1):
                commands.run("study", file, "--out", f"out{workers}", "--workers", str(workers), *place)
                seconds[workers] = commands.seconds - sum(seconds.values())
    finally:
        ray.shutdown()
    return {
        "images": images,
        "cells": 1 + len(bits) * len(seeds),
        "one worker": f"{seconds[1]:.0f} s",
        "two workers": f"{seconds[2]:.0f} s",
        "ratio": round(seconds[2] / seconds[1], 2),
        "target": "at most 0.6",
    }
