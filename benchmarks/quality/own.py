"""quantlens-fast and quantlens-best: better than what they start from, and every part of them helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import quantlens as ql
from benchmarks.quality.case import Case
from benchmarks.quality.subjects import calibration, cost, digits, distance, letters, one_class, ratio, uneven
from quantlens.methods.quantlens_fast import (
    QuantlensFast,
    WeightFit,
    rotate_heads,
    rotate_inputs,
    rotate_residuals,
    subtract_channel_means,
)

FAST: dict[str, Any] = {"method": "quantlens-fast", "bits": "W3A3", "activation_granularity": "tensor"}
KINDS = {"none": (), "heads": (rotate_heads,), "residual": (rotate_residuals, rotate_inputs), "all": None}


@dataclass(frozen=True)
class Ablated(QuantlensFast):
    """quantlens-fast with another fit of weights, or with some of its transforms."""

    fit: WeightFit | None = None
    kinds: tuple[Any, ...] | None = None

    def weight_fit(self, run: Any) -> WeightFit:
        return self.fit or super().weight_fit(run)

    def transforms(self, run: Any) -> list[Any]:
        made = super().transforms(run)
        return made if self.kinds is None else [t for t in made if t in (subtract_channel_means, *self.kinds)]


def _fitted(**settings: Any) -> dict[str, Any]:
    return {**FAST, "method": Ablated(WeightFit(**settings))}


def _rotated(which: str, seed: int) -> float:
    plain = Ablated(WeightFit(fit=False, columns=False), KINDS[which])
    return cost(seed, model=uneven(2, heads=True), method=plain, bits="W32A4")


def _strangers(images: Any) -> Any:
    """KL with blocks over KL with one scale per tensor, calibrated on images unlike those to come."""

    def quantity(seed: int) -> float:
        found = [
            distance(
                ql.quantize(
                    digits(),
                    images(seed),
                    method="quantlens-fast",
                    bits="W4A4",
                    activation_granularity=which,
                    seed=seed,
                )
            )
            for which in ("group", "tensor")
        ]
        return found[0] / found[1]

    return quantity


def _strangers_cost(images: Any) -> Any:
    return lambda seed: distance(
        ql.quantize(
            digits(), images(seed), method="quantlens-fast", bits="W4A4", activation_granularity="group", seed=seed
        )
    )


def _best(seed: int) -> float:
    options = {"iterations": 40}
    found = [
        distance(ql.quantize(digits(), calibration(seed), method=method, bits="W3A3", seed=seed, **given))
        for method, given in (("quantlens-best", options), ("quantlens-fast", {}))
    ]
    return found[0] / found[1]


CASES = (
    Case("fast/repq", "KL to repq-vit's, W3A3", ratio(FAST, {"method": "repq-vit", "bits": "W3A3"}), below=0.7),
    Case("fast/fit", "KL with the fit of weights to without", ratio(FAST, _fitted(fit=False)), below=0.75),
    Case(
        "fast/columns",
        "KL with compensated rounding to nearest, fitted",
        ratio(FAST, _fitted(columns=False)),
        below=0.6,
    ),
    Case(
        "fast/columns-alone",
        "KL with compensated rounding to nearest, not fitted",
        ratio(_fitted(fit=False), _fitted(fit=False, columns=False)),
        below=0.75,
    ),
    Case(
        "fast/softmax",
        "KL with a dynamic scale per softmax row to one static scale",
        ratio(FAST, {**FAST, "softmax": "uniform"}),
        below=0.7,
    ),
    Case(
        "fast/rotations",
        "KL with all rotations to none, uneven channels",
        lambda seed: _rotated("all", seed) / _rotated("none", seed),
        below=0.15,
    ),
    Case(
        "fast/rotations-both",
        "KL with all rotations to the better of two kinds",
        lambda seed: _rotated("all", seed) / min(_rotated("heads", seed), _rotated("residual", seed)),
        below=0.9,
    ),
    Case(
        "fast/rotations-one",
        "KL with the worse of two kinds to none",
        lambda seed: max(_rotated("heads", seed), _rotated("residual", seed)) / _rotated("none", seed),
        below=1.15,
    ),
    *(
        Case(
            f"fast/blocks-{bits}",
            f"KL of scales found at run time to one per tensor, {bits}",
            ratio({}, {"activation_granularity": "tensor"}, method="quantlens-fast", bits=bits),
            below=bound,
        )
        for bits, bound in (("W32A3", 0.3), ("W3A3", 0.6))
    ),
    Case("fast/letters", "KL of blocks to tensors, W4A4, calibrated on letters", _strangers(letters), below=0.7),
    Case("fast/letters-kl", "KL of blocks, W4A4, calibrated on letters", _strangers_cost(letters), below=0.03),
    Case("fast/one-class", "KL of blocks to tensors, W4A4, calibrated on one class", _strangers(one_class), below=0.4),
    Case("fast/one-class-kl", "KL of blocks, W4A4, calibrated on one class", _strangers_cost(one_class), below=0.1),
    Case("best/fast", "KL of quantlens-best, 40 steps, to quantlens-fast's, W3A3", _best, below=0.85),
)
