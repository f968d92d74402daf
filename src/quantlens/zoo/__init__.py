"""The small trained models that ship with the package, and the recipes that trained them.

`python -m quantlens.zoo.train digits-vit` (`make zoo`) trains one again. Nothing heavy is imported before a
model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlens.data.embedded import ID_DIGITS, SIZE, available_embedded
from quantlens.data.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class OODSource:
    """One OOD set to measure a model on: the SOURCE and its group, "near" or "far"."""

    source: str
    group: str


@dataclass(frozen=True)
class ZooSources:
    """The SOURCEs that go with a model: images to evaluate, to calibrate, to fit OOD statistics, and OOD
    sets.
    """

    id: str
    calibration: str
    fit: str
    ood: dict[str, OODSource]


@dataclass(frozen=True)
class ZooEntry:
    """One model that ships with the package.

    `build()` gives the untrained architecture, `weights` is a safetensors file that fits it strictly,
    `card()` reads what was measured when it was trained.
    """

    name: str
    description: str
    build: Callable[[], nn.Module]
    weights: Path
    preprocess: Preprocess
    class_names: list[str]
    sources: ZooSources

    @property
    def card_path(self) -> Path:
        return self.weights.with_suffix(".json")

    def card(self) -> dict[str, Any]:
        """Recipe, versions, SHA-256 of the weights and the metrics measured on the embedded sets."""
        import json

        return json.loads(self.card_path.read_text(encoding="utf-8"))


def _digits_vit() -> nn.Module:
    from quantlens.zoo.recipe import DIGITS_VIT

    return DIGITS_VIT.build()


def available() -> dict[str, ZooEntry]:
    """Name -> entry of every model that ships with the package."""
    ood = {
        name: OODSource(f"embedded:{name}", info.group)
        for name, info in available_embedded().items()
        if info.group in ("near", "far")
    }
    return {
        "digits-vit": ZooEntry(
            name="digits-vit",
            description=f"ViT for {SIZE}x{SIZE} images of {len(ID_DIGITS)} handwritten digits",
            build=_digits_vit,
            weights=WEIGHTS / "digits_vit.safetensors",
            preprocess=Preprocess(
                (3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
            ),
            class_names=[str(digit) for digit in ID_DIGITS],
            sources=ZooSources(
                id="embedded:digits-test",
                calibration="embedded:digits-calibration",
                fit="embedded:digits-fit",
                ood=ood,
            ),
        )
    }


__all__ = ["OODSource", "ZooEntry", "ZooSources", "available"]
