"""The small trained models that ship with the package, and the recipes that trained them.

`python -m quantlens.zoo.train digits-vit` (`make zoo`) trains one again. Nothing heavy is imported before a
model is built.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlens.data.embedded import ID_DIGITS, SIZE, available_embedded
from quantlens.data.preprocess import Preprocess

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class ZooSources:
    """The SOURCEs that go with a model: images to evaluate, to calibrate, to fit OOD statistics, and OOD
    sets: {name: {"source", "group"}}, the group being "near" or "far".
    """

    id: str
    calibration: str
    fit: str
    ood: dict[str, dict[str, str]]


SCENE_SIDE = 96
SCENES = ZooSources(
    "embedded:scenes",
    "embedded:scenes-calibration",
    "embedded:scenes-calibration",
    {"scenes-unknown": {"source": "embedded:scenes-unknown", "group": "near"}},
)


@dataclass(frozen=True)
class ZooEntry:
    """One model that ships with the package. `weights` is a safetensors file that fits `build()` strictly.

    scoring: of a detector, "softmax" (its last class is "no object") or "sigmoid"; None for a classifier.
    """

    name: str
    description: str
    weights: Path
    preprocess: Preprocess
    class_names: list[str]
    sources: ZooSources
    scoring: str | None = None

    def build(self) -> Any:
        """The untrained architecture, a torch module."""
        from quantlens.zoo.detector_training import DETECTOR_RECIPES
        from quantlens.zoo.train import RECIPES

        recipe: Any = {**RECIPES, **DETECTOR_RECIPES}[self.name]
        return recipe.build()

    def card(self) -> dict[str, Any]:
        """Recipe, versions, SHA-256 of the weights and the metrics measured on the embedded sets."""
        return json.loads(self.weights.with_suffix(".json").read_text(encoding="utf-8"))


DETECTORS = {
    "scenes-yolos": ("ViT with detection tokens (YOLOS-shaped)", "softmax"),
    "scenes-detr": ("convolutional backbone, encoder and decoder (DETR-shaped)", "softmax"),
    "scenes-rtdetr": ("selected queries, refined boxes (RT-DETR-shaped)", "sigmoid"),
}
"""Of each detector: what it is, and how its scores are meant."""


def available() -> dict[str, ZooEntry]:
    """Name -> entry of every model whose weights lie in the package."""
    sets = available_embedded().items()
    ood = {
        name: {"source": f"embedded:{name}", "group": info.group}
        for name, info in sets
        if info.group != "id" and not name.startswith("scenes")
    }
    digits = ZooEntry(
        name="digits-vit",
        description=f"ViT for {SIZE}x{SIZE} images of {len(ID_DIGITS)} handwritten digits",
        weights=WEIGHTS / "digits_vit.safetensors",
        preprocess=Preprocess((3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0),
        class_names=[str(digit) for digit in ID_DIGITS],
        sources=ZooSources("embedded:digits-test", "embedded:digits-calibration", "embedded:digits-fit", ood),
    )
    side = SCENE_SIDE
    detectors = [
        ZooEntry(
            name=name,
            description=f"detector of handwritten digits in {side}x{side} scenes: {words}",
            weights=WEIGHTS / f"{name.replace('-', '_')}.safetensors",
            preprocess=Preprocess((3, side, side), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0),
            class_names=digits.class_names,
            sources=SCENES,
            scoring=scoring,
        )
        for name, (words, scoring) in DETECTORS.items()
    ]
    return {entry.name: entry for entry in (digits, *detectors) if entry.weights.exists()}
