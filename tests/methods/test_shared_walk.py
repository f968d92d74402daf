"""What is seen of the float model on some calibration images serves every width and method that can use it."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.calibration import walk as module


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operations every advance of a walk ran."""
    counted: list[int] = []
    advance = module.Walk._advance

    def counting(self, nodes, *arguments, **named):
        counted.append(len(nodes))
        return advance(self, nodes, *arguments, **named)

    monkeypatch.setattr(module.Walk, "_advance", counting)
    return counted


def quantizers(qmodel) -> dict[str, dict]:
    found = {}
    for key, q in qmodel.plan.quantizers.items():
        found[key] = {name: getattr(q, name) for name in ("bits", "scale", "zero_point")}
    return found


def assert_same(first, second) -> None:
    for (key, one), other in zip(quantizers(first).items(), quantizers(second).values(), strict=True):
        assert one["bits"] == other["bits"], key
        assert torch.equal(one["scale"], other["scale"]), key
        assert torch.equal(one["zero_point"], other["zero_point"]), key


def test_one_walk_serves_every_width(small_models, pictures, steps) -> None:
    model = ql.load_model(small_models["vit"], input_size=(3, 32, 32))
    ql.quantize(model, pictures, method="minmax", bits="W8A8")
    assert steps
    steps.clear()
    again = ql.quantize(model, pictures, method="minmax", bits="W4A4", seed=5)
    assert steps == []  # nothing of the model ran again
    fresh = ql.load_model(small_models["vit"], input_size=(3, 32, 32))
    assert_same(again, ql.quantize(fresh, pictures, method="minmax", bits="W4A4"))


def test_what_was_seen_is_not_taken_for_something_else(small_models, pictures, steps) -> None:
    model = ql.load_model(small_models["vit"], input_size=(3, 32, 32))
    ql.quantize(model, pictures, method="minmax", bits="W4A4")
    for images, settings in (
        (pictures.flip(0) * 2, {"method": "minmax"}),  # other images
        (pictures, {"method": "percentile", "p": 0.99}),  # deeper quantiles
        (pictures, {"method": "percentile", "p": 0.9}),
    ):
        steps.clear()
        shared = ql.quantize(model, images, bits="W4A4", **settings)
        assert steps, settings
        fresh = ql.load_model(small_models["vit"], input_size=(3, 32, 32))
        assert_same(shared, ql.quantize(fresh, images, bits="W4A4", **settings))
    steps.clear()
    ql.quantize(model, pictures, bits="W4A4", method="percentile", p=0.99)
    assert steps == []  # the deeper tails hold the shallower ones


def test_a_sequential_walk_sees_the_quantized_part(small_models, pictures) -> None:
    model = ql.load_model(small_models["vit"], input_size=(3, 32, 32))
    for bits in ("W8A8", "W3A3"):
        shared = ql.quantize(model, pictures, method="repq-vit", bits=bits)
        fresh = ql.load_model(small_models["vit"], input_size=(3, 32, 32))
        other = ql.quantize(fresh, pictures, method="repq-vit", bits=bits)
        with torch.inference_mode():
            assert torch.equal(shared(pictures), other(pictures))
