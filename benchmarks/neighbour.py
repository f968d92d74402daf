"""A Python call of `quantize` beside other work: one process per processor that never rests."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

METHOD = "repq-vit"

CALL = f"""
import json, os, time
if os.environ.get("QUANTLENS_BENCH_PASSIVE"):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the command line does, before torch is loaded
import torch
import quantlens as ql
model = ql.load_model("vit_small_patch16_224")
images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
ql.quantize(model, images[:2], method="minmax", bits="W8A8")  # the graph is captured once
wall, processor, threads = time.perf_counter(), time.process_time(), torch.get_num_threads()
ql.quantize(model, images, method="{METHOD}", bits="W4A4")
assert torch.get_num_threads() == threads
print(json.dumps([time.perf_counter() - wall, time.process_time() - processor]))
"""
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # no longer than the benchmark


def neighbour(rounds: int = 3) -> dict[str, Any]:
    """Seconds and processor seconds of a quantization of ViT-Small from Python, against the same with OpenMP's threads
    told to sleep before torch is loaded, as on the command line; beside a busy process per processor, interleaved."""
    free = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    places = {"python": free, "command line": {**free, "QUANTLENS_BENCH_PASSIVE": "1"}}
    found: dict[str, list[list[float]]] = {name: [] for name in places}
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        for _ in range(rounds):
            for name, environment in places.items():
                command = [sys.executable, "-c", CALL]
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    walls, processors = (
        {name: statistics.median(run[i] for run in runs) for name, runs in found.items()} for i in (0, 1)
    )
    return {
        **{f"{name}, s": f"{walls[name]:.1f} ({processors[name]:.1f} of the processor)" for name in places},
        "ratio": round(walls["python"] / walls["command line"], 2),
        "target": "at most 1.2",
    }
