"""A race on this processor: the float model in PyTorch, ONNX Runtime and OpenVINO, what ONNX Runtime's and NNCF's own
tools make of it at 8 bits, and our files, by latency and, with public weights, by quality on validation images.

    python -m benchmarks.race --out race.jsonl            # goes on where it was stopped
    python -m benchmarks.race --out race.jsonl --publish    # what there is, into docs/results.json
    python -m benchmarks.race --out try.jsonl --model ViT-Tiny --rounds 3 --images 8    # a try

Nothing else may run on the machine meanwhile. Needs the extra `deploy`, and nncf.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.support.cells import KNOWN, MODELS, SHARED, Row, arguments, measure, model, publish

OOD = ("textures", "places", "flowers")
BATCHES, THREADS, SEED = (1, 8), (1, 2), 0
CALIBRATION = f"imagenet:{SHARED}/imagenet[1::2]?n=32&seed={SEED}"


class Timed(NamedTuple):
    """A model that is timed alone: its name, weights, side of its images, calibration images."""

    name: str
    weights: str | None = "random"
    side: int | None = None
    calibration: str = CALIBRATION


OTHERS = {
    "DeiT-Small": Timed("deit_small_patch16_224"),
    "Swin-T": Timed("swin_tiny_patch4_window7_224"),
    "DINOv2-S, 224 px": Timed("vit_small_patch14_dinov2", side=224),
    "scenes-detr": Timed("scenes-detr", None, None, f"embedded:scenes?n=32&seed={SEED}"),
}
"""Their weights are random where none are to be had: speed does not depend on them, quality does."""
TARGETS = {"onnxruntime-cpu": ".onnx", "openvino-cpu": ".xml"}
KEPT = ("median_ms", "speedup", "front")


def float_model(label: str) -> Any:
    import quantlens as ql

    if label in MODELS:
        return model(label)
    one = OTHERS[label]
    return ql.load_model(one.name, one.weights, input_size=one.side)


def files(one: Any, calibration: str, folder: Path) -> list[Path]:
    """Our files for each target, by the default method at W8A8; where 8-bit sums saturate also at W7A8, whose sums do
    not."""
    import quantlens as ql
    from quantlens.export.exported import saturates

    made = []
    for target, ending in TARGETS.items():
        for bits in ("W8A8", *(["W7A8"] if saturates() else [])):
            quantized = ql.quantize(one, calibration, seed=SEED, bits=bits, target=target)
            made.append(ql.export(quantized, folder / f"quantlens {bits}{ending}"))
    return made


def numbers(cell: Row, rounds: int, images: int | None) -> Row:
    """The race of one model."""
    import quantlens as ql

    versions = {name: version(name) for name in ("quantlens", "torch", "onnxruntime", "openvino", "nncf")}
    label, started = cell["model"], time.time()
    one, judged = float_model(label), {}
    calibration = OTHERS[label].calibration if label in OTHERS else CALIBRATION
    if label in MODELS:
        few = "" if images is None else f"?n={images}&seed=0"
        judged = {"id": KNOWN + few, "ood": {name: f"images:{SHARED}/ood/{name}{few}" for name in OOD}}
    with tempfile.TemporaryDirectory() as scratch:
        paths = files(one, calibration, Path(scratch))
        settings = {"fp32": one, "peers": True, "calibration": calibration, "rounds": rounds, **judged}
        found = ql.bench(paths, batch=BATCHES, threads=THREADS, folder=Path(scratch) / "made", **settings)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "rounds": rounds,
        "images": images,
        "minutes": round((time.time() - started) / 60, 1),
        "contenders": found.contenders,
        "timings": found.timings,
    }


def shown(row: Row) -> Row:
    """A model's race as docs/results.json has it: a row for each contender, percentages and latencies rounded."""
    facts = {one["fingerprint"]: one for one in row["contenders"]}
    rows: dict[str, Row] = {}
    for timing in row["timings"]:
        one = facts[timing["fingerprint"]]
        kept = rows.setdefault(timing["fingerprint"], _worth(timing, one))
        place = {key: timing[key] for key in KEPT if key in timing}
        place |= {"median_ms": round(timing["median_ms"], 2), "speedup": round(timing["speedup"], 2)}
        kept["latency"][f"{timing['batch']} on {timing['threads']}"] = place
    told = {key: row[key] for key in ("cpu", "vnni", "model", "date", "versions", "rounds")}
    return told | {"rows": list(rows.values())}


def _worth(timing: Row, facts: Row) -> Row:
    """What a contender is, and its quality where it was measured."""
    made: Row = {key: facts[key] for key in ("runtime", "method", "bits", "integers")}
    made = {"label": timing["label"], **made, "size_mb": facts["size_mb"] and round(facts["size_mb"], 2)}
    percent = {key: timing[key] for key in ("top1", "aupr_out", "agreement") if timing.get(key) is not None}
    made |= {key: round(100 * value, 2) for key, value in percent.items()}
    made |= {key: round(timing[key], 3) for key in ("nll", "sqnr_db") if timing.get(key) is not None}
    return made | {"latency": {}}


def here() -> Row:
    """The processor that this runs on, and whether its 8-bit sums are exact."""
    from quantlens.evaluation.environment import environment
    from quantlens.export.exported import saturates

    return {"cpu": environment()["cpu"], "vnni": not saturates()}


def _arguments() -> argparse.Namespace:
    parser = arguments("race", __doc__, [*MODELS, *OTHERS])
    parser.add_argument("--rounds", type=int, default=30, help="counted runs of each")
    parser.add_argument("--images", type=int, help="so many images of each set (a try; not published)")
    return parser.parse_args()


def main() -> None:
    given = _arguments()
    if given.publish:
        tries = [file for file in given.out if any(json.loads(line)["images"] for line in file.open())]
        if tries:
            raise SystemExit(f"{tries[0]} has a race with few images (--images): that is a try, and not published")
        publish(given.out, "races", shown, ("cpu", "vnni", "model"))
        return
    cells = [here() | {"model": one} for one in given.model or [*MODELS, *OTHERS]]
    measure(given.out[0], cells, lambda cell: numbers(cell, given.rounds, given.images))


if __name__ == "__main__":
    main()
