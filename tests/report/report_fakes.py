"""A store with made-up but coherent results: every figure follows from simulated scores and predictions.

The scores of ID and OOD images are drawn from normal distributions whose distance shrinks with the
precision; ranks, counts and histograms are computed from them, so that tables and charts of a test report
look as real ones do.
"""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantlens.attention import pictures

SCORES = ("msp", "maxlogit", "energy", "entropy", "gen", "knn", "vim", "mahalanobis", "rmahalanobis", "react")
SETS = {"textures": "far", "places": "far", "flowers": "near"}
DAMAGE = {"FP32": 0.0, "W8A8": 0.02, "W6A6": 0.08, "W4A8": 0.3, "W8A4": 0.38, "W4A4": 0.62}
METHODS = {"minmax": 1.5, "percentile": 1.15, "repq-vit": 0.6}
MODELS = {"deit_tiny_patch16_224": 0.8, "vit_tiny_patch16_224.augreg_in21k_ft_in1k": 1.25}
N_ID, N_OOD, N_CLASSES = 400, 100, 40


@dataclass
class FakeCell:
    key: str
    spec: dict[str, Any]
    status: str = "done"
    result: dict[str, Any] | None = None
    error: str | None = None
    created: str = "2026-11-20T22:00:00"
    seconds: float = 4.2


@dataclass
class FakeStore:
    listed: list[FakeCell]
    config: dict[str, Any] = field(default_factory=lambda: {"name": "tiny", "bits": list(DAMAGE)})
    name: str = "Two small models, three methods"

    def cells(self) -> list[FakeCell]:
        return self.listed

    def study(self) -> dict[str, Any]:
        return {"name": self.name, "config": self.config, "environment": {}, "created": "2026-11-20T21:59:00"}


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Step-sum average precision; positives should have the larger values."""
    values = np.concatenate([positive, negative])
    truth = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    truth = truth[np.argsort(-values, kind="stable")]
    return float(np.sum(truth * np.cumsum(truth) / np.arange(1, len(truth) + 1)) / len(positive))


def figures_of(id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
    share = len(ood_scores) / (len(ood_scores) + len(id_scores))
    return {
        "aupr_out": average_precision(-ood_scores, -id_scores),
        "aupr_in": average_precision(id_scores, ood_scores),
        "auroc": float((id_scores[:, None] > ood_scores[None]).mean()),
        "fpr95_id": float((ood_scores >= np.quantile(id_scores, 0.05)).mean()),
        "fpr95_ood": float((id_scores <= np.quantile(ood_scores, 0.95)).mean()),
        "chance_aupr_out": share,
        "chance_aupr_in": 1 - share,
        "n_id": len(id_scores),
        "n_ood": len(ood_scores),
    }


def mean_figures(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        s: {k: float(np.mean([e[s][k] for e in entries])) for k in entries[0][s]}
        for s in entries[0]
        if isinstance(entries[0][s], dict)
    }


def ood_means(ood: dict[str, Any]) -> dict[str, Any]:
    chosen = {part: [e for e in ood.values() if part in ("all", e["group"])] for part in ("far", "near", "all")}
    return {part: mean_figures(entries) for part, entries in chosen.items() if entries}


def id_figures(
    rng: np.random.Generator, damage: float, source: str = "imagenet:data/imagenet[32:432]"
) -> dict[str, Any]:
    confidence = np.clip(rng.beta(5 - 2.5 * damage, 1.4 + damage, N_ID), 0.02, 0.999)
    correct = rng.random(N_ID) < np.clip(0.97 * confidence ** (0.45 + damage) * (1 - 0.45 * damage), 0, 1)
    edges = np.linspace(0, 1, 16)
    which = np.clip(np.digitize(confidence, edges) - 1, 0, 14)
    counts = np.bincount(which, minlength=15)
    means = [float(confidence[which == b].mean()) if counts[b] else None for b in range(15)]
    hits = [float(correct[which == b].mean()) if counts[b] else None for b in range(15)]
    ece = sum(counts[b] / N_ID * abs(means[b] - hits[b]) for b in range(15) if counts[b])
    classes = np.arange(N_ID) % N_CLASSES
    top1 = float(correct.mean())
    return {
        "source": source,
        "fingerprint": "5be1c2f0",
        "n": N_ID,
        "skipped": 0,
        "num_classes": N_CLASSES,
        "top1": top1,
        "top5": min(0.995, top1 + 0.12),
        "nll": 0.55 + 2.9 * damage * (1 + 0.1 * rng.normal()) + (1 - top1),
        "ece": float(ece),
        "ece_adaptive": float(ece) * 1.05,
        "brier": 0.2 + 0.5 * damage,
        "per_class": [
            {
                "class": int(c),
                "name": f"class {c}",
                "n": int((classes == c).sum()),
                "top1": float(correct[classes == c].mean()),
            }
            for c in range(N_CLASSES)
        ],
        "reliability": {
            "edges": edges.tolist(),
            "count": counts.tolist(),
            "confidence": means,
            "accuracy": hits,
        },
    }


def damage_of(bits: str) -> float:
    """How much a precision hurts: from the table, else by its widths."""
    if bits in DAMAGE:
        return DAMAGE[bits]
    weights, activations = bits[1:].split("A")
    return min(5 * (2.0 ** -int(weights) + 2.0 ** -int(activations)), 1.3)


def measure(
    model: str, method: str, bits: str, seed: int, sets: dict[str, str], scores: tuple[str, ...]
) -> dict[str, Any]:
    """One simulated cell's figures, without model, method and the like."""
    strength = METHODS.get(method, 0.5 + (sum(map(ord, method)) % 100) / 80)
    damage = damage_of(bits) * strength * MODELS.get(model, 1.0)
    rng = np.random.default_rng([sum(map(ord, model + method + bits)), seed])
    damage *= 1 + 0.06 * rng.normal()
    ood: dict[str, Any] = {}
    histograms: dict[str, Any] = {}
    for k, score in enumerate(scores):
        scale = 10.0 ** (k % 4 - 1)
        known = rng.normal(0, 1, N_ID) * scale
        entry: dict[str, Any] = {"ood": {}}
        shown = {}
        for i, (name, group) in enumerate(sets.items()):
            gap = (1.9 - 0.35 * i + 0.08 * k) * math.exp(-1.1 * damage)
            shown[name] = rng.normal(-gap, 1.1, N_OOD) * scale
            place = ood.setdefault(
                name,
                {
                    "source": f"images:data/{name}",
                    "fingerprint": f"ab{i}c",
                    "n": N_OOD,
                    "skipped": i,
                    "group": group,
                },
            )
            place[score] = figures_of(known, shown[name])
        everything = np.concatenate([known, *shown.values()])
        edges = np.linspace(everything.min(), everything.max(), 41)
        entry |= {
            "edges": edges.tolist(),
            "id": np.histogram(known, edges)[0].tolist(),
            "ood": {n: np.histogram(v, edges)[0].tolist() for n, v in shown.items()},
        }
        histograms[score] = entry
    return {"id": id_figures(rng, damage), "ood": ood, "ood_mean": ood_means(ood), "histograms": histograms}


def difference(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return {k: d for k, v in first.items() if k in second and (d := difference(v, second[k])) is not None}
    numeric = isinstance(first, int | float) and isinstance(second, int | float)
    return first - second if numeric else None


def make_cells(
    models=tuple(MODELS),
    methods=tuple(METHODS),
    bits=tuple(DAMAGE),
    seeds=(0, 13, 37),
    sets=None,
    scores=SCORES,
) -> list[FakeCell]:
    """The cells of a whole study."""
    sets = SETS if sets is None else sets
    cells = []
    for model in models:
        fp32 = measure(model, "fp32", "FP32", 0, sets, scores)
        runs = [("fp32", "FP32", 0)] if "FP32" in bits else []
        runs += [(method, b, seed) for method in methods for b in bits if b != "FP32" for seed in seeds]
        for method, precision, seed in runs:
            base = precision == "FP32"
            found = fp32 if base else measure(model, method, precision, seed, sets, scores)
            compared = ("id", "ood", "ood_mean")
            width = 32 if base else int(precision[1:].split("A")[0])
            common = {
                "model": model,
                "checkpoint_sha256": f"{sum(map(ord, model)):064x}",
                "method": method,
                "bits": precision,
                "seed": seed,
                "options": {} if method != "percentile" else {"percentile": 99.99},
            }
            result = (
                common
                | found
                | {
                    "size_mb": 22.9 * width / 32,
                    "size_ratio": width / 32,
                    "num_parameters": 5_717_416,
                    "calibration": None
                    if base
                    else {"source": "imagenet:data/imagenet[0:32]", "n": 32, "fingerprint": "77aa"},
                    "preprocess": {
                        "input_size": [3, 224, 224],
                        "mean": [0.485, 0.456, 0.406],
                        "std": [0.229, 0.224, 0.225],
                        "interpolation": "bicubic",
                        "crop_pct": 0.9,
                        "crop_mode": "center",
                    },
                    "environment": {
                        "quantlens": "0.1.0",
                        "torch": "2.15.0",
                        "python": "3.11.9",
                        "platform": "Linux",
                        "cpu": "2 cores",
                        "device": "cpu",
                        "threads": 2,
                    },
                    "fit": {"source": "imagenet:data/imagenet[432:1000]", "n": 568} if sets else None,
                    "scores_unavailable": {"rmahalanobis_l2": "fewer images than feature dimensions"},
                    "fp32": None if base else {k: fp32[k] for k in compared},
                    "change": None if base else {k: difference(found[k], fp32[k]) for k in compared},
                    "seconds": {"calibration": 0.0 if base else 8.1, "evaluation": 3.3},
                }
            )
            spec = common | {
                "calibration": "imagenet:data/imagenet[0:32]",
                "id": "imagenet:data/imagenet[32:432]",
            }
            cells.append(FakeCell(f"{model}/{method}/{precision}/{seed}", spec, result=result))
    return cells


@pytest.fixture(scope="session")
def make():
    """(make_cells, FakeCell, FakeStore) for tests that build stores of their own."""
    return make_cells, FakeCell, FakeStore


@pytest.fixture(scope="session")
def full_store() -> FakeStore:
    """Two models, three methods, six precisions, three seeds, three OOD sets, one failed cell."""
    cells = make_cells()
    cells.append(
        FakeCell(
            "failed",
            {"model": "deit_tiny_patch16_224", "method": "repq-vit", "bits": "W2A2", "seed": 0},
            "failed",
            None,
            "BadImageError: places/p17.jpg cannot be decoded",
            seconds=0.4,
        )
    )
    return FakeStore(cells)


@pytest.fixture(scope="session")
def small_store() -> FakeStore:
    """One model, one method, two precisions, one seed: a page of it is made in a fraction of the time."""
    return FakeStore(make_cells(models=tuple(MODELS)[:1], methods=("minmax",), bits=("FP32", "W4A4"), seeds=(0,)))


ATTENTION_BITS = ("FP32", "W8A8", "W6A6", "W4A8", "W8A4", "W4A4")


def drift_summary(amount: float, rng) -> dict:
    return {
        "n": 16, "row_cosine": 1 - 0.3 * amount, "row_kl": 4 * amount, "entropy_change": -amount,
        "rollout_spearman": 1 - amount, "rollout_overlap": 1 - 0.8 * amount, "centre_movement": 0.05 * amount,
        "outliers": 20 - 10 * amount, "outliers_fp32": 20.0, "outlier_overlap": 1 - amount / 2,
        "prediction_changed": amount / 2, "confidence_change": -amount / 3, "output_kl": amount + 0.01 * rng.random(),
    }  # fmt: skip


def _example(name: str, ood: bool, index: int, amount: float, rng, fp32: bool) -> dict:
    example = {
        "set": name, "ood": ood, "index": index, "grid": [4, 4], "truth": None if ood else 3, "label": 3 if amount < 0.5
        else 5, "class_name": "tench" if amount < 0.5 else "<b>otter</b>", "probability": 0.9 - amount / 2,
        "rollout": rng.random(16).round(3).tolist(), "norms": {"blocks.1": (5 + rng.random(16)).tolist()},
    }  # fmt: skip
    if fp32:
        photo = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        example |= {"thumbnail": pictures.webp(photo), "truth_name": None if ood else "tench"}
    return example


@pytest.fixture
def attention_store():
    """A study with the attention lens: drift for every cell, four images with their maps."""
    return FakeStore(pickle.loads(attention_cells()))


@cache
def attention_cells() -> bytes:
    cells = make_cells(methods=("minmax", "repq-vit"), bits=ATTENTION_BITS, seeds=(0, 13), scores=("msp",))
    rng = np.random.default_rng(0)
    for cell in cells:
        fp32 = cell.spec["bits"] == "FP32"
        widths = [] if fp32 else [int(n) for n in re.findall(r"\d+", cell.spec["bits"])]
        amount = 0.0 if fp32 else min(0.9, sum(2.0**-w for w in widths) * (6 if cell.spec["method"] == "minmax" else 4))
        cell.result["attention"] = {
            "id": drift_summary(amount, rng),
            "ood": {s: drift_summary(amount, rng) for s in ("textures", "places")},
        }
        cell.result["attention_examples"] = [
            _example(name, ood, i, amount, rng, fp32)
            for name, ood in (("id", False), ("textures", True))
            for i in (0, 7)
        ]
    return pickle.dumps(cells)


@pytest.fixture
def drift():
    """A made-up summary of drift: (amount, generator) -> figures."""
    return drift_summary
