"""What 4-bit formats cost: integers per tensor, integers in groups, MXFP4 and NVFP4, weights and activations, on
official validation images: top-1, NLL, OOD detection, corrupted images and bytes.

    python -m benchmarks.floating_formats --out formats.jsonl            # goes on where it was stopped
    python -m benchmarks.floating_formats --out formats.jsonl --publish    # what there is, into docs/results.json
    python -m benchmarks.floating_formats --out vit.jsonl --model ViT-Tiny    # one process for each model
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.support.cells import KNOWN, MODELS, SHARED, Row, arguments, measure, model, publish

CELLS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("FP32", "FP32", "", {}),
    ("INT4 per tensor", "W4A4", "quantlens-fast", {}),
    ("INT4 in groups", "W4A4", "quantlens-fast", {"activation_granularity": "group"}),
    ("MXFP4", "MXFP4", "minmax", {}),
    ("MXFP4", "MXFP4", "quantlens-fast", {}),
    ("NVFP4", "NVFP4", "minmax", {}),
    ("NVFP4", "NVFP4", "quantlens-fast", {}),
    ("MXFP4", "MXFP4", "gptq", {}),
    ("NVFP4", "NVFP4", "gptq", {}),
    ("INT4 per tensor", "W4A4", "minmax", {}),
)
"""(format, bits, method, options); FP32 first."""
OOD = ("textures", "places", "flowers")
CORRUPTIONS = ("gaussian_noise:3", "fog:3", "jpeg_compression:3")
CALIBRATION, SEED = 32, 0


def numbers(cell: Row) -> Row:
    """The numbers of a cell's model."""
    import quantlens as ql

    one = model(cell["model"])
    _, bits, method, options = next(c for c in CELLS if (c[0], c[2]) == (cell["format"], cell["method"]))
    if method:
        images = f"imagenet:{SHARED}/imagenet[1::2]?n={CALIBRATION}&seed={SEED}"
        one = ql.quantize(one, images, method=method, bits=bits, seed=SEED, **options)
    ood = {name: f"images:{SHARED}/ood/{name}" for name in OOD}
    result = ql.evaluate(one, id=KNOWN, ood=ood, shift={"corrupt": CORRUPTIONS}, reference=False).to_dict()
    return {
        "top1": result["id"]["top1"],
        "nll": result["id"]["nll"],
        "ece": result["id"]["ece"],
        "aupr": {name: result["ood"][name]["msp"]["aupr_out"] for name in OOD},
        "corrupted": result["shift_mean"]["corruptions"]["top1"],
        "size_mb": result["size_mb"],
    }


def shown(row: Row) -> Row:
    """A cell as docs/results.json has it: percentages, rounded."""
    told = {key: row[key] for key in ("model", "format", "method")}
    percent = {
        "top1": row["top1"],
        "ece": row["ece"],
        "aupr_out": mean(row["aupr"].values()),
        "corrupted": row["corrupted"],
    }
    told |= {key: round(100 * value, 1) for key, value in percent.items()}
    return told | {"nll": round(row["nll"], 2), "size_mb": round(row["size_mb"], 2)}


def main() -> None:
    given = arguments("floating_formats", __doc__).parse_args()
    if given.publish:
        publish(given.out, "floating_formats", shown, ("model", "format", "method"))
        return
    chosen = given.model or list(MODELS)
    cells = [{"model": one, "format": form, "method": method} for form, _, method, _ in CELLS for one in chosen]
    measure(given.out[0], cells, numbers)


if __name__ == "__main__":
    main()
