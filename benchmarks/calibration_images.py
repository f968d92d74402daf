"""What calibration images matter: top-1 and NLL of methods calibrated on white noise, on made images, on flowers, and
on 1 to 256 training images, on official validation images.

    python -m benchmarks.calibration_images --out curve.jsonl            # goes on where it was stopped
    python -m benchmarks.calibration_images --out curve.jsonl --publish    # what there is, into docs/results.json
    python -m benchmarks.calibration_images --out curve.jsonl --model ViT-Tiny    # one process for each model

Needs the folder of weights and images that the project's tests use ($QUANTLENS_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import altair as alt

from benchmarks.results import FILE, written
from quantlens.plots.style import MUTED, Figure, Look, Panel, PanelRow, composed, encodings, finished

FIGURE = FILE.parent / "images" / "calibration-images.svg"
SHARED = Path(os.environ.get("QUANTLENS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MODELS = {"DeiT-Tiny": "deit_tiny_patch16_224", "ViT-Tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k"}
METHODS: dict[tuple[str, str], dict[str, Any]] = {
    ("quantlens-fast", "W4A4"): {},
    ("quantlens-fast in groups", "W4A4"): {"activation_granularity": "group"},
    ("repq-vit", "W4A4"): {},
    ("minmax", "W8A8"): {},
    ("percentile", "W8A8"): {},
    ("erq", "W4A4"): {},
}
"""(label, bits) -> options; a label begins with the method's name. minmax is at chance at W4A4, whatever the images."""
IMAGES = ("noise", "made:noise", "made:dead-leaves", "flowers", 1, 4, 16, 32, 256)
NAMES = {"noise": "white noise", 1: "1 image"} | {n: f"{n} images" for n in (4, 16, 32, 256)}
"""What the docs call them, where that is not the source."""
SEED = 0


def calibration(images: str | int) -> Any:
    """The calibration images: 32 of uniform noise, 32 that are made, 32 flowers, or so many training images."""
    import numpy as np
    from PIL import Image

    if images == "noise":
        pixels = np.random.default_rng(SEED).integers(0, 256, (32, 224, 224, 3), dtype=np.uint8)
        return [Image.fromarray(one) for one in pixels]
    if isinstance(images, str) and images.startswith("made:"):
        return f"{images}?n=32&seed={SEED}"
    if images == "flowers":
        return f"images:{SHARED}/ood/flowers?n=32&seed={SEED}"
    return f"imagenet:{SHARED}/imagenet[1::2]?n={images}&seed={SEED}"


def measure(out: Path, chosen: list[str]) -> None:
    """Every cell of the chosen models that `out` lacks, FP32 first; a line of JSON for each as it comes."""
    import quantlens as ql

    done = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    known = {(one["model"], one["method"], one["bits"], one["images"]) for one in done}
    cells: list[tuple[str, str | None, str, Any]] = [(model, None, "FP32", None) for model in chosen]
    cells += [(model, name, bits, n) for name, bits in METHODS for n in IMAGES for model in chosen]
    left, models, start = [cell for cell in cells if cell not in known], dict[str, Any](), time.time()
    for number, (model, method, bits, images) in enumerate(left):
        if model not in models:
            models[model] = ql.load_model(
                MODELS[model], weights=str(SHARED / "weights" / f"{MODELS[model]}.safetensors")
            )
        one: Any = models[model]
        if method is not None:
            name, options = method.split()[0], METHODS[method, bits]
            one = ql.quantize(one, calibration(images), method=name, bits=bits, seed=SEED, **options)
        result = ql.evaluate(one, id=f"imagenet:{SHARED}/imagenet_val[1::2]", reference=False).to_dict()["id"]
        row = {
            "model": model,
            "method": method,
            "bits": bits,
            "images": images,
            "top1": result["top1"],
            "nll": result["nll"],
        }
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        hours = (time.time() - start) / (number + 1) * (len(left) - number - 1) / 3600
        print(f"{number + 1}/{len(left)} {row} about {hours:.1f} h left", flush=True)


def publish(file: Path) -> None:
    """Put the measured cells into docs/results.json, under "calibration_images", and draw them."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    data["calibration_images"] = [
        {
            "model": one["model"],
            "method": one["method"],
            "bits": one["bits"],
            "images": NAMES.get(one["images"], str(one["images"])),
            "top1": round(100 * one["top1"], 1),
            "nll": round(one["nll"], 2),
        }
        for one in map(json.loads, file.open())
    ]
    FILE.write_text(written(data), encoding="utf-8")
    figure(data["calibration_images"]).save(FIGURE)


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Top-1 in % over the calibration images, a panel for each model, a line for each method."""
    lines = [f"{method}, {bits}" for method, bits in METHODS]
    looks = {line: Look(place, place // 3) for place, line in enumerate(lines)}
    panels = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and row["method"]]
        fp32 = next(row["top1"] for row in rows if row["model"] == model and not row["method"])
        shown = [{"line": f"{r['method']}, {r['bits']}", "images": r["images"], "y": r["top1"]} for r in mine]
        x = alt.X("images:N", sort=None, title="calibrated on", axis=alt.Axis(labelAngle=-40))
        base = alt.Chart().encode(x=x, y=alt.Y("y:Q", title="top-1, %", scale=alt.Scale(domain=[0, 90])))
        used = encodings({line: look for line, look in looks.items() if any(one["line"] == line for one in shown)})
        curve = base.mark_line(strokeWidth=1.5).encode(color=used["color"], strokeDash=used["strokeDash"])
        dots = base.mark_point(filled=True, opacity=1, size=40).encode(color=used["color"], shape=used["shape"])
        whole = alt.Chart(alt.Data(values=[{"fp32": fp32}])).mark_rule(color=MUTED, strokeDash=[2, 3])
        whole = whole.encode(y="fp32:Q")
        panels.append(Panel(alt.layer(whole, curve, dots).properties(height=260), shown, f"{model} (FP32 {fp32})"))
    return Figure(finished(composed([PanelRow("", panels)])))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration_images", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file of results, a line for each")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="this model alone (default: both)")
    parser.add_argument("--publish", action="store_true", help="write what there is into docs/, and its figure")
    arguments = parser.parse_args()
    if arguments.publish:
        publish(arguments.out)
    else:
        measure(arguments.out, arguments.model or list(MODELS))


if __name__ == "__main__":
    main()
