"""What calibration images matter: top-1 and NLL of methods calibrated on white noise, on made images, on flowers, and
on 1 to 256 training images, on official validation images.

    python -m benchmarks.calibration_images --out curve.jsonl            # goes on where it was stopped
    python -m benchmarks.calibration_images --out curve.jsonl --publish    # what there is, into docs/results.json
    python -m benchmarks.calibration_images --out curve.jsonl --model ViT-Tiny    # one process for each model
"""

from __future__ import annotations

from typing import Any

import altair as alt

from benchmarks.results import FILE
from benchmarks.support.cells import KNOWN, MODELS, SHARED, Row, arguments, measure, model, publish
from quantlens.plots.style import MUTED, Figure, Look, Panel, PanelRow, composed, encodings, finished

FIGURE = FILE.parent / "images" / "calibration-images.svg"
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


def numbers(cell: Row) -> Row:
    """Top-1 and NLL of a cell's model."""
    import quantlens as ql

    one, method = model(cell["model"]), cell["method"]
    if method is not None:
        images, options = calibration(cell["images"]), METHODS[method, cell["bits"]]
        one = ql.quantize(one, images, method=method.split()[0], bits=cell["bits"], seed=SEED, **options)
    result = ql.evaluate(one, id=KNOWN, reference=False).to_dict()["id"]
    return {"top1": result["top1"], "nll": result["nll"]}


def shown(row: Row) -> Row:
    """A cell as docs/results.json has it: per cent, rounded, and images by the name that the docs have for them."""
    images = NAMES.get(row["images"], str(row["images"]))
    return row | {"images": images, "top1": round(100 * row["top1"], 1), "nll": round(row["nll"], 2)}


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Top-1 in % over the calibration images, a panel for each model, a line for each method."""
    lines = [f"{method}, {bits}" for method, bits in METHODS]
    looks = {line: Look(place, place // 3) for place, line in enumerate(lines)}
    panels = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name and row["method"]]
        fp32 = next(row["top1"] for row in rows if row["model"] == name and not row["method"])
        shown = [{"line": f"{r['method']}, {r['bits']}", "images": r["images"], "y": r["top1"]} for r in mine]
        x = alt.X("images:N", sort=None, title="calibrated on", axis=alt.Axis(labelAngle=-40))
        base = alt.Chart().encode(x=x, y=alt.Y("y:Q", title="top-1, %", scale=alt.Scale(domain=[0, 90])))
        used = encodings({line: look for line, look in looks.items() if any(one["line"] == line for one in shown)})
        curve = base.mark_line(strokeWidth=1.5).encode(color=used["color"], strokeDash=used["strokeDash"])
        dots = base.mark_point(filled=True, opacity=1, size=40).encode(color=used["color"], shape=used["shape"])
        whole = alt.Chart(alt.Data(values=[{"fp32": fp32}])).mark_rule(color=MUTED, strokeDash=[2, 3])
        whole = whole.encode(y="fp32:Q")
        panels.append(Panel(alt.layer(whole, curve, dots).properties(height=260), shown, f"{name} (FP32 {fp32})"))
    return Figure(finished(composed([PanelRow("", panels)])))


def main() -> None:
    given = arguments("calibration_images", __doc__).parse_args()
    if given.publish:
        figure(publish(given.out, "calibration_images", shown, ("model", "method", "bits", "images"))).save(FIGURE)
        return
    chosen = given.model or list(MODELS)
    cells: list[Row] = [{"model": one, "method": None, "bits": "FP32", "images": None} for one in chosen]
    for method, bits in METHODS:
        cells += [{"model": one, "method": method, "bits": bits, "images": n} for n in IMAGES for one in chosen]
    measure(given.out[0], cells, numbers)


if __name__ == "__main__":
    main()
