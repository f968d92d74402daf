"""Run the benchmarks and print one line each: ``python -m benchmarks [NAME …] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.corruptions import corruptions
from benchmarks.cost import cost
from benchmarks.neighbour import neighbour
from benchmarks.studies import ray_workers, studies
from benchmarks.support import main as support

DEIT = "deit_tiny_patch16_224"
SHARED = Path(os.environ.get("QUANTLENS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def _deit() -> Any:
    """DeiT-Tiny with its real weights where they are, else with random ones (the times do not differ)."""
    import quantlens as ql

    weights = SHARED / "weights" / f"{DEIT}.safetensors"
    return ql.load_model(DEIT, weights if weights.is_file() else None)


def _images(count: int) -> Any:
    import torch

    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def _interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function; the functions take turns, so that a busy machine is busy for all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def calibration() -> dict[str, Any]:
    """repq-vit W4A4 calibration of DeiT-Tiny on 32 images, against one FP32 forward of the same images."""
    import torch

    import quantlens as ql

    model, images = _deit(), _images(32)
    start = time.perf_counter()
    ql.quantize(model, images, method="repq-vit", bits="W4A4")
    first = time.perf_counter() - start
    with torch.inference_mode():
        seconds = _interleaved(
            {
                "calibration": lambda: ql.quantize(model, images, method="repq-vit", bits="W4A4"),
                "fp32": lambda: model(images),
            },
            rounds=3,
        )
    return {
        "seconds, with capture": round(first, 2),
        "seconds": round(seconds["calibration"], 2),
        "times one FP32 forward": round(seconds["calibration"] / seconds["fp32"], 2),
        "target": "at most 10 s on 2 cores",
    }


def methods() -> dict[str, Any]:
    """Every method: W4A4 of DeiT-Tiny on 32 images, once each, against one FP32 forward of the same images and against
    repq-vit."""
    import torch

    import quantlens as ql
    from quantlens.methods import registry

    model, images = _deit(), _images(32)
    model_forward = {"fp32": lambda: model(images)}
    ql.quantize(model, images, method="minmax", bits="W8A8")  # the graph is captured once
    seconds, forwards = {}, {}
    for name in registry.available():
        start = time.perf_counter()
        ql.quantize(model, images, method=name, bits="W4A4")
        seconds[name] = time.perf_counter() - start
        with torch.inference_mode():
            forwards[name] = _interleaved(model_forward, rounds=3)["fp32"]
    found = {
        name: f"{taken:.1f} s, {taken / forwards[name]:.0f} times one FP32 forward, "
        f"{taken / seconds['repq-vit']:.1f} times repq-vit"
        for name, taken in seconds.items()
    }
    return {**found, "target": "20 s on 2 cores without optimisation; vt-ptq and ptq4vit 60 s"}


def simulation() -> dict[str, Any]:
    """A simulated W4A4 forward of DeiT-Tiny against timm's own FP32 forward (fused attention)."""
    import torch

    import quantlens as ql

    model, images = _deit(), _images(32)
    qmodel = ql.quantize(model, images, method="repq-vit", bits="W4A4")
    out: dict[str, Any] = {}
    with torch.inference_mode():
        for batch in (1, 8, 32):
            x = images[:batch]
            seconds = _interleaved(
                {"fp32": lambda x=x: model(x), "w4a4": lambda x=x: qmodel(x)}, rounds=21 if batch < 32 else 7
            )
            out[f"batch {batch}"] = f"{seconds['w4a4'] / seconds['fp32']:.2f}x ({seconds['fp32'] * 1e3:.0f} ms FP32)"
    return {**out, "target": "at most 1.5x"}


def image_cache() -> dict[str, Any]:
    """Decoding 200 JPEG images against reading them from the cache that all cells of a study share."""
    import numpy as np
    from PIL import Image

    from quantlens.data import Preprocess, load_images, open_source

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(200):
            small = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(small).resize((340, 256), Image.Resampling.BICUBIC).save(f"{folder}/{i:03}.jpg", quality=90)
        source, times = open_source(f"images:{folder}"), []
        for _ in range(2):
            start = time.perf_counter()
            images = load_images(source, Preprocess(), cache_dir=f"{folder}/cache")
            int(np.asarray(images.pixels).sum())
            times.append(time.perf_counter() - start)
    return {"first": f"{times[0]:.2f} s", "second": f"{times[1]:.3f} s", "ratio": round(times[0] / times[1], 1)}


def memory() -> dict[str, Any]:
    """Peak memory of calibrating DeiT-Tiny on 32 and on 192 images, with 64 MiB for waiting activations."""
    code = (
        "import psutil, resource, sys; import benchmarks.__main__ as b; import quantlens as ql\n"
        "from quantlens.calibration import cache; cache.MEMORY = 64 << 20\n"
        "model = b._deit(); images = b._images(int(sys.argv[1]))\n"
        "before = psutil.Process().memory_info().rss / 1024\n"
        "ql.quantize(model, images, method='repq-vit', bits='W4A4')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = {}
    for count in (32, 192):
        result = subprocess.run([sys.executable, "-c", code, str(count)], capture_output=True, text=True, check=True)
        grown[f"{count} images"] = float(result.stdout.split()[-1]) / 1024
    shown = {name: f"{value:.0f} MiB above the model and the images" for name, value in grown.items()}
    return {**shown, "ratio": round(grown["192 images"] / grown["32 images"], 2)}


def allocation() -> dict[str, Any]:
    """Mixed precision of DeiT-Tiny at the size of W6A6 on 32 images: seconds of each sensitivity, and the KL divergence
    (nats per image, held-out images) of the model that min-max quantizes at the widths it chooses."""
    import torch

    import quantlens as ql
    from quantlens.metrics.divergence import kl_of_logits

    model = _deit()
    images, others = _photographs(model, 32, 1), _photographs(model, 128, 0)
    with torch.inference_mode():
        expected = torch.cat([model(part) for part in others.split(32)])

    def loss(bits: Any) -> float:
        qmodel = ql.quantize(model, images, method="minmax", bits=bits)
        with torch.inference_mode():
            logits = torch.cat([qmodel(part) for part in others.split(32)])
        return float(kl_of_logits(expected.double(), logits.double()).mean())

    out: dict[str, Any] = {"uniform W6A6 kl": round(loss("W6A6"), 4)}
    seconds = {}
    for name in ("nuclear-norm", "hessian", "kl", "random"):
        seeds = range(3) if name == "random" else range(1)
        found = [ql.allocate(model, images, "MP6", sensitivity=name, seed=seed) for seed in seeds]
        seconds[name] = found[0].seconds
        out[name] = f"{seconds[name]:.1f} s, kl {statistics.mean(loss(one) for one in found):.4f}"
    out["hessian over nuclear-norm, seconds"] = round(seconds["hessian"] / seconds["nuclear-norm"], 1)
    return {**out, "target": "at least 10, and no higher kl than hessian"}


def _photographs(model: Any, count: int, first: int) -> Any:
    """Real photographs where they are (every second one of a thousand, from number ``first`` on), else noise."""
    from quantlens.data import load_images, open_source

    folder = SHARED / "imagenet"
    if not folder.is_dir():
        return _images(count)
    step = 2 * (500 // count)
    return load_images(
        open_source(f"imagenet:{folder}[{first}:{first + step * count}:{step}]"), model.preprocess
    ).tensor()


def attention() -> dict[str, Any]:
    """The attention lens (maps of all blocks, rollout, outlier tokens, drift) on DeiT-Tiny in FP32 and at three
    precisions, against plain evaluations of the same four models on the same 16 images; processor seconds, the
    least of seven rounds."""
    import torch

    import quantlens as ql
    from quantlens.attention.drift import measure
    from quantlens.attention.recording import Lens
    from quantlens.qmodel import float_model

    model, images = _deit(), _images(32)
    quantized = {bits: ql.quantize(model, images, method="repq-vit", bits=bits) for bits in ("W8A8", "W6A6", "W4A4")}
    plain = [float_model(model), *quantized.values()]
    reference, lenses = Lens(model), {bits: Lens(q) for bits, q in quantized.items()}
    part = images[:16]

    def evaluate(models: list[Any]) -> None:
        with torch.inference_mode():
            for one in models:
                one.outputs(part)

    functions: dict[str, Callable[[], Any]] = {
        "plain": lambda: evaluate(plain),
        "lens": lambda: measure(reference, lenses, [part]),
        "plain, one": lambda: evaluate(plain[-1:]),
        "lens, one": lambda: measure(reference, {"W4A4": lenses["W4A4"]}, [part]),
        "fp32": lambda: evaluate(plain[:1]),
    }
    seconds = dict.fromkeys(functions, float("inf"))
    for _ in range(7):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds[name] = min(seconds[name], time.process_time() - start)
    one = (seconds["lens, one"] - seconds["fp32"]) / seconds["plain, one"]
    return {
        "FP32 and three precisions": f"{seconds['lens'] / seconds['plain']:.2f}x",
        "one precision, less FP32's forward": f"{one:.2f}x",
        "processor seconds of one, plain": round(seconds["plain, one"], 2),
        "target": "at most 1.3x a plain evaluation",
    }


def inspection(count: int = 32, every: int = 4) -> dict[str, Any]:
    """All sites of DeiT-Tiny quantized alone at W8A8, 32 images: one pass over cached inputs, against a whole forward
    per site (of every fourth site, times four: all cost the same). Processor seconds; the noise compared."""
    import torch

    import quantlens as ql
    from quantlens.calibration import Calibration
    from quantlens.qmodel import Plan, QuantizedModel
    from quantlens.sensitivity.alone import effects_alone

    model = _deit()
    images = _photographs(model, count, 1)
    quantized = ql.quantize(model, images, method="minmax", bits="W8A8")
    graph, quantizers = quantized.graph, quantized.plan.quantizers
    parts: dict[str, list[str]] = {}
    for key in quantizers:
        parts.setdefault(graph.sites.edges[key].site, []).append(key)
    calibration = Calibration.of(images, model.preprocess)
    start = time.process_time()
    effects = dict(zip(parts, effects_alone(graph, quantizers, list(parts.values()), calibration), strict=True))
    seconds, naive, apart = time.process_time() - start, 0.0, 0.0
    with torch.inference_mode():
        expected = graph(images).double()
        for name in list(parts)[::every]:
            start = time.process_time()
            plan = Plan({key: quantizers[key] for key in parts[name]})
            logits = QuantizedModel(graph, plan, preprocess=model.preprocess)(images).double()
            naive += time.process_time() - start
            noise = 10 * torch.log10(expected.square().sum() / (logits - expected).square().sum())
            apart = max(apart, abs(float(noise) - (effects[name].sqnr_db or 0.0)))
    naive *= len(parts) / len(list(parts)[::every])
    return {
        "sites": len(parts),
        "processor seconds": round(seconds, 1),
        "a whole forward per site": round(naive, 1),
        "ratio": round(naive / seconds, 2),
        "apart at most, dB": round(apart, 4),
        "target": "2 or more: half of every forward lies in front of its site, on average",
    }


def detection(count: int = 64) -> dict[str, Any]:
    """Evaluating the shipped scenes-detr quantized, against plain FP32 forwards of the same scenes; and what its
    calibrations on 32 scenes take, capture left out."""
    import torch

    import quantlens as ql
    from quantlens.data import load_images, open_source

    model = ql.load_model("scenes-detr")
    images, others = (
        load_images(open_source(f"embedded:scenes[{rows}]"), model.preprocess, cache_dir=False)
        for rows in (f":{count}", f"{count}:{count + 32}")
    )
    ql.quantize(model, others, method="minmax", bits="W8A8")  # the graph is captured once
    calibrated, made = {}, {}
    for method, bits in (("repq-vit", "W8A8"), ("repq-vit", "W4A4"), ("quantlens-fast", "W4A4")):
        start = time.perf_counter()
        made[method, bits] = ql.quantize(model, others, method=method, bits=bits)
        calibrated[f"{method} {bits}, s"] = round(time.perf_counter() - start, 1)

    def forward() -> None:
        for pixels, _ in images.batches(batch_size=32):
            model(pixels)

    measured = {"FP32": model, "W8A8": made["repq-vit", "W8A8"], "W4A4": made["repq-vit", "W4A4"]}
    evaluations = {name: lambda one=one: ql.evaluate(one, id=images, batch_size=32) for name, one in measured.items()}
    with torch.inference_mode():
        seconds = _interleaved({"forward": forward, **evaluations}, rounds=3)
    least = seconds.pop("forward")
    rates = {
        f"{name} evaluated": f"{count / taken:.1f} images/s, {taken / least:.2f}x the forwards"
        for name, taken in seconds.items()
    }
    target = "calibration on 2 cores: repq-vit at most 10 s, quantlens-fast 60 s"
    return {"FP32 forwards": f"{count / least:.1f} images/s", **rates, **calibrated, "target": target}


BENCHMARKS = {
    f.__name__: f
    for f in (
        calibration,
        methods,
        simulation,
        image_cache,
        memory,
        allocation,
        attention,
        inspection,
        detection,
        neighbour,
        studies,
        ray_workers,
        cost,
        corruptions,
    )
}


def main() -> None:
    if sys.argv[1:2] == ["support"]:  # takes arguments of its own
        support(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=[], help=f"some of: {', '.join(BENCHMARKS)} (all by default)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    unknown = [n for n in arguments.names if n not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    results = {}
    for name in arguments.names or BENCHMARKS:
        results[name] = BENCHMARKS[name]()
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in results[name].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
