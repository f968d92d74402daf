"""Methods that train: nearer to the float model on images they have not seen, and every part of them helps."""

from __future__ import annotations

from typing import Any

import torch

import quantlens as ql
from benchmarks.quality.case import Case, Quantity
from benchmarks.quality.subjects import calibration, digits, held_out, ratio, uneven

METHODS = ("qdrop", "i-and-s-vit", "fima-q", "aphq-vit")
SHORT: dict[str, Any] = {"method": "aocq", "iterations": 40, "scale_iterations": 8, "batch_size": 16}
OFF = {"scales": False, "rounding": False}


def _error(seed: int, model: Any, bits: str, **options: Any) -> float:
    """Mean squared error of aocq's logits on held-out images."""
    images, _, expected = held_out()
    q = ql.quantize(model, calibration(seed, 16), bits=bits, seed=seed, **{**SHORT, **options})
    with torch.inference_mode():
        return float((q(images) - expected).square().mean())


def _balanced(seed: int) -> float:
    model = uneven(4, heads=False)
    return _error(seed, model, "W32A5", **OFF) / _error(seed, model, "W32A5", operator=False, **OFF)


def _unbalanced(seed: int) -> float:
    settings: dict[str, Any] = {"operator": False, **OFF}
    return _error(seed, uneven(4, heads=False), "W32A5", **settings) / _error(seed, digits(), "W32A5", **settings)


def _rounding(seed: int) -> float:
    return _error(seed, digits(), "W3A8", scales=False) / _error(seed, digits(), "W3A8", **OFF)


def _scales(seed: int) -> float:
    """On the calibration images: error with refined scales to without, operators not balanced."""
    images, found = calibration(seed), []
    with torch.inference_mode():
        expected = digits()(images)
    for scales in (True, False):
        q = ql.quantize(
            digits(), images, method="aocq", bits="W32A3", rounding=False, operator=False, scales=scales, seed=seed,
            **({"batch_size": 16, "scale_iterations": 80} if scales else {}),
        )  # fmt: skip
        with torch.inference_mode():
            found.append(float((q(images) - expected).square().mean()))
    return found[0] / found[1]


def _accepted(method: str) -> Quantity:
    """Share of units whose loss on all calibration images fell."""

    def quantity(seed: int) -> float:
        q = ql.quantize(digits(), calibration(seed, 16), method=method, bits="W3A4", iterations=32, seed=seed)
        reports = q.plan.info["reconstruction"]
        units = reports["quantized"] if isinstance(reports, dict) else reports
        return sum(bool(u["accepted"]) for u in units) / len(units)

    return quantity


CASES = (
    Case("aocq/operators", "error with balanced operators to without, uneven channels", _balanced, below=0.5),
    Case("aocq/uneven", "error with uneven channels to even ones, operators off", _unbalanced, above=4),
    Case("aocq/scales", "error with refined scales to without, calibration images", _scales, below=1),
    Case("aocq/rounding", "error with learned rounding to nearest", _rounding, below=0.4),
    *(
        Case(
            f"{method}/trained",
            "KL after 32 steps to KL after none, W3A4",
            ratio({"iterations": 32}, {"iterations": 0}, method=method, bits="W3A4", images=16),
            below=0.85,
        )
        for method in METHODS
    ),
    *(
        Case(f"{method}/accepted", "share of units that came nearer", _accepted(method), above=0.5)
        for method in METHODS
    ),
)
