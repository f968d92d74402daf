"""What a calibration costs, over models of four sizes: ``python -m benchmarks.cost [--methods …] [--models …]``.

Cost: processor seconds of quantizing (W4A4, 32 images) over those of one FP32 forward pass of the same images. Memory:
the peak of the whole process, Python and its libraries included, and how much of it lies above the loaded model and
the images. Every pair is measured in a process of its own, on one thread; a busy machine changes little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")
METHODS = ("quantlens-fast", "repq-vit")
GOALS = {"quantlens-fast": 12.0, "repq-vit": 5.0}
"""Forward passes, at most."""

MEMORY = 3.0
"""GB, at most."""

COLUMNS = ("passes", "goal", "seconds", "capture", "forward", "peak GB", "above GB")


def measure(model_name: str, method: str, bits: str) -> dict[str, float]:
    """One method on one model with random weights, in this process: see :data:`COLUMNS`. ``capture`` is what the
    model's first quantization takes on top of ``seconds``; ``above`` is above the model and images, before that."""
    import psutil
    import torch

    import quantlens as ql
    from quantlens.graph import graph_of

    torch.set_num_threads(1)
    model, images = ql.load_model(model_name), torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    loaded = psutil.Process().memory_info().rss / 1e9

    def forward() -> float:
        with torch.inference_mode():
            return _seconds(lambda: model(images))

    forward()  # what the first one takes on top is memory asked for
    forwards = [forward(), forward()]
    capture = _seconds(lambda: graph_of(model))
    seconds = _seconds(lambda: ql.quantize(model, images, method=method, bits=bits))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    least = min(*forwards, forward(), forward())
    found = (seconds / least, GOALS.get(method, 0.0), seconds, capture, least, peak, peak - loaded)
    return dict(zip(COLUMNS, found, strict=True))


def _seconds(function: Any) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure_apart(model: str, method: str, bits: str = "W4A4") -> dict[str, float]:
    """:func:`measure` in a fresh process, on one thread."""
    command = [sys.executable, "-m", "benchmarks.cost", "--one", model, method, bits]
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **alone})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def cost() -> dict[str, Any]:
    """Forward passes and peak memory of the methods that have goals, on models of four sizes."""
    out: dict[str, Any] = {}
    for method in METHODS:
        for model in MODELS:
            found = measure_apart(model, method)
            out[f"{method} {model}"] = f"{found['passes']:.1f} passes, {found['peak GB']:.2f} GB"
    goals = ", ".join(f"{method} {goal:g}" for method, goal in GOALS.items())
    return {**out, "target": f"passes at most: {goals}; {MEMORY:g} GB"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="TIMM_NAME")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--bits", default="W4A4")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "METHOD", "BITS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    print(f"memory goal: {MEMORY:g} GB\n{'method':16} {'model':30}", *(f"{c:>8}" for c in COLUMNS))
    for method in arguments.methods:
        for model in arguments.models:
            found = measure_apart(model, method, arguments.bits)
            values = (f"{found[c]:8.2f}" if found[c] else f"{'':8}" for c in COLUMNS)
            print(f"{method:16} {model:30}", *values, flush=True)


if __name__ == "__main__":
    main()
