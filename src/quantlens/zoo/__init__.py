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


@dataclass(frozen=True)
class ZooEntry:
    """One model that ships with the package. `weights` is a safetensors file that fits `build()` strictly."""

    name: str
    description: str
    weights: Path
    preprocess: Preprocess
    class_names: list[str]
    sources: ZooSources

    def build(self) -> Any:
        """The untrained architecture, a torch module."""
        from quantlens.zoo.train import RECIPES

        return RECIPES[self.name].build()

    def card(self) -> dict[str, Any]:
        """Recipe, versions, SHA-256 of the weights and the metrics measured on the embedded sets."""
        return json.loads(self.weights.with_suffix(".json").read_text(encoding="utf-8"))


def available() -> dict[str, ZooEntry]:
    """Name -> entry of every model that ships with the package."""
    sets = available_embedded().items()
    ood = {name: {"source": f"embedded:{name}", "group": info.group} for name, info in sets if info.group != "id"}
    digits = ZooEntry(
        name="digits-vit",
        description=f"ViT for {SIZE}x{SIZE} images of {len(ID_DIGITS)} handwritten digits",
        weights=WEIGHTS / "digits_vit.safetensors",
        preprocess=Preprocess((3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0),
        class_names=[str(digit) for digit in ID_DIGITS],
        sources=ZooSources("embedded:digits-test", "embedded:digits-calibration", "embedded:digits-fit", ood),
    )
    return {digits.name: digits}
