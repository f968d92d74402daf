"""What a detector finds in pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import quantlens as ql
from detectors import SIDE, detector
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.evaluation.objects import find_objects
from quantlens.evaluation.open_models import measurable


class Bright(torch.nn.Module):
    """One query for each half of an image; it is a cat in a box around the half where that is bright."""

    def forward(self, images):
        halves = torch.stack([images[..., : SIDE // 2].mean((1, 2, 3)), images[..., SIDE // 2 :].mean((1, 2, 3))], 1)
        logits = torch.stack([20 * halves - 10, -20 * halves, 10 - 20 * halves], -1)
        places = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]).expand(len(images), 2, 4)
        return {"logits": logits, "pred_boxes": places + 0 * halves[..., None]}


def bright() -> ql.Model:
    return ql.load_model(Bright(), preprocess=detector().preprocess, class_names=["cat", "dog"])


def test_boxes_are_in_pixels_of_each_picture(tmp_path) -> None:
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 50:] = 255
    file = tmp_path / "right.png"
    Image.fromarray(pixels).save(file)
    dark, both = Image.new("L", (30, 30), 0), Image.new("RGB", (8, 64), (255, 255, 255))
    right, nothing, two = find_objects(measurable(bright()), [file, dark, both])
    assert [(one.label, one.box) for one in right] == [("cat", (50, 0, 100, 40))]
    assert right[0].score > 0.99
    assert nothing == []
    assert [one.box for one in two] == [(0, 0, 4, 64), (4, 0, 8, 64)]
    assert find_objects(measurable(bright()), []) == []


def test_the_threshold_chooses_among_the_same() -> None:
    grey = Image.new("RGB", (20, 20), (140, 140, 140))
    model = measurable(bright())
    every = find_objects(model, [grey], threshold=0.0)[0]
    assert [one.score for one in every] == sorted((one.score for one in every), reverse=True)
    for threshold in (0.2, every[0].score, 1.0):
        assert find_objects(model, [grey], threshold=threshold)[0] == [o for o in every if o.score >= threshold]
    with pytest.raises(QuantlensError, match="scores are from 0 to 1"):
        find_objects(model, [grey], threshold=50)


def test_a_classifier_finds_no_objects() -> None:
    classifier = ql.load_model("digits-vit")
    with pytest.raises(UnsupportedError, match="boxes"):
        find_objects(classifier, [Image.new("RGB", (32, 32))])
