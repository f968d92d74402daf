"""The work behind `quantlens attention`: measures sets, chooses images, writes pictures and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlens.attention import lookup, pictures
from quantlens.attention.lens import Lens
from quantlens.errors import UnsupportedError
from quantlens.files import write_whole
from quantlens.qmodel import float_model

PART = 16
FP32 = "FP32"


class Look:
    """A float model and its quantized versions, seen through one kind of map.

    reference: the float model. models: label -> quantized model. kind: one of ``lookup.MAPS``. rollout: settings of
    rollout. target: class of gradient maps; None for the float model's prediction of each image.
    Raises UnsupportedError where the kind of map does not apply.
    """

    def __init__(
        self, reference: Any, models: Mapping[str, Any], kind: str, rollout: Mapping[str, Any], target: int | None
    ):
        self.reference, self.models, self.kind = reference, dict(models), kind
        self.rollout, self.target = dict(rollout), target
        self.summaries: dict[str, dict[str, dict[str, Any]]] = {}
        self.refused = ""
        self._sets: dict[str, tuple[Any, list[int]]] = {}
        self._changed: dict[str, np.ndarray] = {}
        self._lenses: dict[str, Any] = {FP32: reference, **self.models}
        try:
            self._lenses = {label: Lens(m) for label, m in self._lenses.items()}
        except UnsupportedError as error:
            if kind in ("rollout", "gradient-rollout"):
                raise
            self.refused = str(error)
        if kind == "gradient-rollout":
            self.rollout.pop("fusion")

    def measure(self, name: str, images: Any, limit: int, progress: Callable[[int, int], None]) -> None:
        """Drift on at most ``limit`` images of a set; kept under its name in ``summaries``: label -> figures."""
        positions = lookup.evenly(len(images), limit)
        found: dict[str, dict[str, Any]] = {label: {} for label in self.models}
        if not self.refused:
            settings = self.rollout if self.kind == "rollout" else {}
            drifts = lookup.drifts(
                self._lenses[FP32],
                {label: self._lenses[label] for label in self.models},
                images,
                positions,
                progress=lambda done: progress(done, len(positions)),
                **settings,
            )
            found = {label: d.summary() for label, d in drifts.items()}
            self._changed[name] = next(reversed(drifts.values())).rollout_spearman
        if self.kind != "rollout":
            maps, probabilities = self._all_maps(images, positions, progress)
            for label in self.models:
                parts = lookup.map_drift(maps[FP32], maps[label])
                means = {f"map_{k}": float(v.mean(dtype=np.float64)) for k, v in parts.items()}
                changed = probabilities[label].argmax(1) != probabilities[FP32].argmax(1)
                found[label] = {"n": len(positions), "prediction_changed": float(changed.mean())} | found[label] | means
                self._changed[name] = parts["spearman"]
        self._sets[name], self.summaries[name] = (images, positions), found

    def _all_maps(
        self, images: Any, positions: list[int], progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(maps [n, rows, columns], probabilities [n, K]) of some images by every model, FP32 first."""
        maps: dict[str, list[np.ndarray]] = {label: [] for label in self._lenses}
        seen: dict[str, list[np.ndarray]] = {label: [] for label in self._lenses}
        device = float_model(self.reference).device
        for start in range(0, len(positions), PART):
            batch = lookup.chosen(images, positions[start : start + PART]).to(device)
            target: Any = self.target
            for label, model in self._lenses.items():
                settings = self.rollout if "rollout" in self.kind else {}
                values, probabilities = lookup.maps_of(model, batch, self.kind, target=target, **settings)
                if target is None and self.kind != "rollout":
                    target = probabilities.argmax(1)
                maps[label].append(values)
                seen[label].append(probabilities.detach().cpu().numpy())
            if progress is not None:
                progress(min(start + PART, len(positions)), len(positions))
        return {k: np.concatenate(v) for k, v in maps.items()}, {k: np.concatenate(v) for k, v in seen.items()}

    def write(self, folder: Path, show: int, most_changed: bool) -> list[Path]:
        """Write the pictures and the figures; the files written."""
        rows, titles, norm_rows, norm_titles = [], [], [], []
        chosen: dict[str, list[int]] = {}
        for name, (images, positions) in self._sets.items():
            order = np.argsort(self._changed[name], kind="stable") if most_changed else np.arange(len(positions))
            picked = [positions[i] for i in order[:show]]
            chosen[name] = picked
            maps, probabilities = self._all_maps(images, picked)
            names = lookup.class_names(images if name == "ID" else None, float_model(self.reference))
            for k, position in enumerate(picked):
                photo = lookup.photograph(images, position)
                truth = None if images.labels is None or name != "ID" else int(images.labels[position])
                known = "" if truth is None else f": {lookup.name_of(names, truth) or f'class {truth}'}"
                titles.append(f"{name} {position}{known}")
                top = 1.0 if self.kind == "rollout" else max(float(maps[FP32][k].max()), 1e-12)
                expected = int(probabilities[FP32][k].argmax())
                cells: list[pictures.Cell | None] = [pictures.Cell(photo)]
                for label in self._lenses:
                    found = int(probabilities[label][k].argmax())
                    words = lookup.name_of(names, found) or f"class {found}"
                    share = f"{100 * float(probabilities[label][k].max()):.0f} %"
                    picture = pictures.overlay(photo, maps[label][k] / top)
                    cells.append(pictures.Cell(picture, (words, share), found != expected))
                rows.append(cells)
            if not self.refused:
                norm_rows += self._norms(images, picked)
                norm_titles += titles[-len(picked) :]
        first = float_model(self.reference)
        quantized = next(iter(self.models.values()))
        columns = list(self._lenses)
        note = f"{quantized.method}; maps: {self.kind}" + (
            ", 1 is the largest of each map" if self.kind == "rollout" else ", colours up to FP32's largest"
        )
        written = [
            pictures.save(
                pictures.grid(rows, titles, ["image", *columns], title=f"{first.name}: {self.kind}", note=note),
                folder / "maps.png",
            )
        ]
        if norm_rows:
            block = self._lenses[FP32].blocks[-1]
            words = "colours from the smallest to the largest norm at FP32 of each image"
            written.append(
                pictures.save(
                    pictures.grid(
                        norm_rows,
                        norm_titles,
                        columns,
                        title=f"Norms of patch tokens behind {block}",
                        note=words,
                        side=120,
                    ),
                    folder / "norms.png",
                )
            )
        return [*written, *self._figures(folder, chosen, quantized)]

    def _norms(self, images: Any, positions: list[int]) -> list[list[pictures.Cell | None]]:
        """A row of heat maps per image: norms behind the last block, by every model."""
        from quantlens.attention.tokens import outliers, token_norms

        rows: list[list[pictures.Cell | None]] = [[] for _ in positions]
        scale: list[tuple[float, float]] = []
        for label, lens in self._lenses.items():
            with torch.inference_mode():
                batch = lookup.chosen(images, positions).to(lens.model.device)
                norms = torch.cat([token_norms(lens(p).tokens[-1], lens.layout.prefix) for p in batch.split(PART)])
            counts = outliers(norms).sum(1).tolist()
            values = norms.cpu().numpy()
            if label == FP32:
                scale = [(float(v.min()), float(v.max())) for v in values]
            for k, (low, high) in enumerate(scale):
                shown = (values[k].reshape(lens.layout.grid) - low) / max(high - low, 1e-9)
                number = f"{counts[k]} outlier" + ("" if counts[k] == 1 else "s")
                span = f"{values[k].min():.1f} to {values[k].max():.1f}"
                rows[k].append(pictures.Cell(pictures.heat(shown), (span, number)))
        return rows

    def _figures(self, folder: Path, chosen: Mapping[str, list[int]], quantized: Any) -> list[Path]:
        from quantlens.evaluation.result import plain
        from quantlens.report.attention import drift_svg

        first = float_model(self.reference)
        about = {
            "model": first.name,
            "checkpoint_sha256": first.checkpoint_sha256,
            "method": quantized.method,
            "seed": quantized.seed,
            "map": {"kind": self.kind, "target": self.target, **self.rollout},
            "images": {
                name: {"source": s.source, "fingerprint": s.fingerprint, "n": len(p), "shown": chosen[name]}
                for name, (s, p) in self._sets.items()
            },
            "unavailable": self.refused or None,
            "drift": {label: {name: self.summaries[name][label] for name in self._sets} for label in self.models},
        }
        target = folder / "drift.json"
        write_whole(target, json.dumps(plain(about), indent=1, allow_nan=False) + "\n")
        if self.refused:
            return [target]
        drawing = drift_svg(f"{first.name}, {quantized.method}: drift of attention from FP32", about["drift"])
        write_whole(folder / "drift.svg", drawing)
        return [target, folder / "drift.svg"]
