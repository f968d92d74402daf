"""Calibration without images: some are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.data import Preprocess
from quantlens.errors import QuantlensError

SOURCE = "made:dead-leaves?n=32&seed=3"


@pytest.mark.slow
def test_what_was_made_is_in_the_checkpoint_and_can_be_made_again(tmp_path: Path) -> None:
    model = ql.load_model("digits-vit")
    made = ql.quantize(model, None, method="minmax", bits="W4A8", seed=3)
    named = ql.quantize(model, SOURCE, method="minmax", bits="W4A8")
    loaded = ql.load(made.save(tmp_path / "q.safetensors"))
    about = loaded.provenance.calibration
    assert (about["source"], about["n"]) == (SOURCE, 32)
    assert about["fingerprint"] == named.provenance.calibration["fingerprint"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(made(images), named(images))
    other = ql.quantize(model, "none", method="minmax", bits="W4A8", seed=4)
    assert not torch.equal(made(images), other(images))


def test_every_way_to_ask_for_made_images() -> None:
    preprocess = Preprocess((3, 24, 24))
    given = (None, "none", "made:dead-leaves?n=32&seed=0")
    found = [Calibration.of(one, preprocess, seed=0).chunk(0) for one in given]
    assert found[0].shape == (32, 3, 24, 24)
    assert all(torch.equal(found[0], one) for one in found)
    assert torch.equal(Calibration.of(None, preprocess).chunk(0), found[0]), "without a seed, the first draw"


@pytest.mark.slow
@pytest.mark.parametrize(("granularity", "lost"), [("group", 0.02), ("tensor", 0.05)])
def test_digits_keep_their_accuracy_at_four_bits(granularity: str, lost: float) -> None:
    """Of 400 held-out digits; by 32 of the training images 0.5 and 1.3 points are lost."""
    model, test = ql.load_model("digits-vit"), "embedded:digits-test"
    quantized = ql.quantize(model, None, bits="W4A4", activation_granularity=granularity)
    result = ql.evaluate(quantized, id=test).to_dict()
    assert result["id"]["top1"] > result["fp32"]["id"]["top1"] - lost


class Grey(nn.Module):
    """Reads images of its own size and one channel, and more where it is asked to."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.img_size, self.fc = (12, 20), nn.Linear(channels * 240, 4)

    def forward(self, images: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.fc(images.flatten(1)) * scale


class Captioned(Grey):
    def forward(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.fc(images.flatten(1)) + text


def test_models_of_other_inputs_work_or_are_refused() -> None:
    grey = ql.load_model(Grey().eval(), input_size=(1, 12, 20))
    assert ql.quantize(grey, None, method="minmax").provenance.calibration["n"] == 32
    with pytest.raises(QuantlensError, match="4 channels"):
        ql.quantize(ql.load_model(Grey(4).eval(), input_size=(4, 12, 20)), None, method="minmax")
    with pytest.raises(QuantlensError, match=r"takes text beside images.*whole calls"):
        ql.quantize(Captioned().eval(), None, method="minmax")


@pytest.mark.slow
def test_a_detector_is_quantized_without_images() -> None:
    quantized = ql.quantize(ql.load_model("scenes-yolos"), None, method="minmax", bits="W8A8")
    assert quantized.provenance.calibration["source"].startswith("made:")
    assert quantized.graph.boxes is not None


def test_no_images_at_all_says_that_some_can_be_made() -> None:
    with pytest.raises(QuantlensError, match="None for made ones"):
        ql.quantize(ql.load_model("digits-vit"), [], method="minmax")
