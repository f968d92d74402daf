"""What 4-bit formats cost: integers per tensor, integers in groups, MXFP4 and NVFP4, weights and activations, on
official validation images: top-1, NLL, OOD detection, corrupted images and bytes.

    python -m benchmarks.floating_formats --out formats.jsonl            # goes on where it was stopped
    python -m benchmarks.floating_formats --out formats.jsonl --table    # what there is, as a table in Markdown

Needs the folder of weights and images that the project's tests use ($QUANTLENS_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("QUANTLENS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MODELS = {"DeiT-Tiny": "deit_tiny_patch16_224", "ViT-Tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k"}
FORMATS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "FP32": ("FP32", {"fp32": {}}),
    "INT4 per tensor": ("W4A4", {"minmax": {}, "quantlens-fast": {}}),
    "INT4 in groups": ("W4A4", {"quantlens-fast": {"activation_granularity": "group"}}),
    "MXFP4": ("MXFP4", {"minmax": {}, "quantlens-fast": {}}),
    "NVFP4": ("NVFP4", {"minmax": {}, "quantlens-fast": {}}),
}
"""Format -> bits and the options of every method."""

CORRUPTIONS = ("gaussian_noise:3", "fog:3", "jpeg_compression:3")
SEED = 0


def measured(one: Any, n: int | None) -> dict[str, Any]:
    """The numbers of a model, or of `n` images of each set."""
    import quantlens as ql

    sample = "" if n is None else f"?n={n}&seed={SEED}"
    known = f"imagenet:{SHARED}/imagenet_val[1::2]{sample}"
    ood = {"textures": f"images:{SHARED}/ood/textures{sample}"}
    result = ql.evaluate(one, id=known, ood=ood, shift={"corrupt": CORRUPTIONS}, reference=False).to_dict()
    return {
        "top1": result["id"]["top1"],
        "nll": result["id"]["nll"],
        "aupr": result["ood"]["textures"]["msp"]["aupr_out"],
        "corrupted": result["shift_mean"]["corruptions"]["top1"],
        "size_mb": result["size_mb"],
    }


def measure(out: Path, n: int | None, calibration: int) -> None:
    """Every cell that `out` lacks; a line of JSON for each as it comes."""
    import quantlens as ql

    done = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    known = {(one["model"], one["format"], one["method"], one["n"]) for one in done}
    cells = [(m, f, name) for f, (_, methods) in FORMATS.items() for name in methods for m in MODELS]
    left, models, start = [cell for cell in cells if (*cell, n) not in known], dict[str, Any](), time.time()
    for number, (model, form, method) in enumerate(left):
        if model not in models:
            models[model] = ql.load_model(
                MODELS[model], weights=str(SHARED / "weights" / f"{MODELS[model]}.safetensors")
            )
        (bits, methods), one = FORMATS[form], models[model]
        if method != "fp32":
            images = f"imagenet:{SHARED}/imagenet[1::2]?n={calibration}&seed={SEED}"
            one = ql.quantize(one, images, method=method, bits=bits, seed=SEED, **methods[method])
        row = {"model": model, "format": form, "method": method, "n": n, **measured(one, n)}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        hours = (time.time() - start) / (number + 1) * (len(left) - number - 1) / 3600
        print(f"{number + 1}/{len(left)} {row} about {hours:.1f} h left", flush=True)


def table(out: Path) -> str:
    """A row for every model, format and method."""
    lines = [
        "| model | format | method | top-1 % | NLL | AUPR textures | corrupted top-1 % | MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in map(json.loads, out.open()):
        numbers = (
            f"{100 * one['top1']:.1f} | {one['nll']:.3f} | {one['aupr']:.3f} | {100 * one['corrupted']:.1f} | "
            f"{one['size_mb']:.2f}"
        )
        lines.append(f"| {one['model']} | {one['format']} | `{one['method']}` | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floating_formats", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file of results, a line for each")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--n", type=int, help="images of each set (all)")
    parser.add_argument("--calibration", type=int, default=32, help="calibration images")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.out))
    else:
        measure(arguments.out, arguments.n, arguments.calibration)


if __name__ == "__main__":
    main()
