"""What is seen of the float model on some calibration images serves every width and method that can use it."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.graph import Graph


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operations every advance of a pass ran."""
    counted: list[int] = []
    run = Graph.run

    def counting(self, nodes, *arguments, **named):
        counted.append(len(nodes))
        return run(self, nodes, *arguments, **named)

    monkeypatch.setattr(Graph, "run", counting)
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


def test_one_pass_serves_every_width(fresh, pictures, steps) -> None:
    model = fresh("vit")
    ql.quantize(model, pictures, method="minmax", bits="W8A8")
    assert steps
    steps.clear()
    again = ql.quantize(model, pictures, method="minmax", bits="W4A4", seed=5)
    assert steps == []  # nothing of the model ran again
    other_model = fresh("vit")
    assert_same(again, ql.quantize(other_model, pictures, method="minmax", bits="W4A4"))


def test_what_was_seen_is_not_taken_for_something_else(fresh, pictures, steps) -> None:
    model = fresh("vit")
    ql.quantize(model, pictures, method="minmax", bits="W4A4")
    for images, settings in (
        (pictures.flip(0) * 2, {"method": "minmax"}),  # other images
        (pictures, {"method": "percentile", "p": 0.99}),  # deeper quantiles
        (pictures, {"method": "percentile", "p": 0.9}),
    ):
        steps.clear()
        shared = ql.quantize(model, images, bits="W4A4", **settings)
        assert steps, settings
        other_model = fresh("vit")
        assert_same(shared, ql.quantize(other_model, images, bits="W4A4", **settings))
    steps.clear()
    ql.quantize(model, pictures, bits="W4A4", method="percentile", p=0.99)
    assert steps == []  # the deeper tails hold the shallower ones


def test_a_sequential_pass_sees_the_quantized_part(fresh, pictures) -> None:
    model = fresh("vit")
    for bits in ("W8A8", "W3A3"):
        shared = ql.quantize(model, pictures, method="repq-vit", bits=bits)
        other_model = fresh("vit")
        other = ql.quantize(other_model, pictures, method="repq-vit", bits=bits)
        with torch.inference_mode():
            assert torch.equal(shared(pictures), other(pictures))
