"""What a person names to be measured."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.errors import BadWeightsError
from quantlens.evaluation.open_models import open_float, open_models
from quantlens.qmodel import float_model


def test_words_for_weights(monkeypatch):
    monkeypatch.setattr("quantlens.evaluation.open_models.load_model", lambda name, weights, **options: weights)
    said = [open_float("digits-vit", w) for w in (None, "pretrained", "random", "a.pth")]
    assert said == ["pretrained", "pretrained", "random", "a.pth"]


def test_a_name_a_file_and_what_it_was_made_from(tmp_path):
    model, reference = open_models("digits-vit")
    assert (model.name, reference) == ("digits-vit", None)
    file = tmp_path / "q.safetensors"
    ql.quantize(model, "embedded:digits-calibration[0:4]", method="minmax").save(file)
    quantized, reference = open_models(str(file))
    assert (quantized.method, reference) == ("minmax", None)
    _, reference = open_models(str(file), "pretrained")
    assert reference.checkpoint_sha256 == model.checkpoint_sha256
    with pytest.raises(BadWeightsError, match="does not exist"):
        open_models(str(tmp_path / "absent.safetensors"))


def test_a_file_without_a_classifier_stands_beside_a_model_without_one(tmp_path):
    model = ql.load_model("digits-vit", task="features")
    file = tmp_path / "q.safetensors"
    ql.quantize(model, "embedded:digits-calibration[0:4]", method="minmax").save(file)
    made, reference = open_models(str(file), "pretrained")
    assert (made.task, reference.task, reference(torch.zeros(1, 3, 32, 32)).shape) == ("features", "features", (1, 64))


def test_a_file_with_a_letterbox_stands_beside_a_model_with_one(tmp_path):
    file = tmp_path / "q.safetensors"
    float_model(ql.load_model("scenes-detr", letterbox=True)).save(file)
    made, reference = open_models(str(file), "pretrained")
    assert made.detection_head.resize == reference.detection_head.resize == "letterbox"
    assert made.preprocess == reference.preprocess
    with pytest.raises(BadWeightsError, match="says itself how its pictures are resized"):
        open_models(str(file), letterbox=True)


def test_a_file_of_other_weights_is_refused(tmp_path, monkeypatch):
    model, _ = open_models("digits-vit")
    file = tmp_path / "q.safetensors"
    ql.quantize(model, "embedded:digits-calibration[0:4]", method="minmax").save(file)
    other = type("", (), {"checkpoint_sha256": "0" * 64})
    monkeypatch.setattr("quantlens.evaluation.open_models.load_model", lambda *given, **options: other)
    with pytest.raises(BadWeightsError, match="is not the checkpoint that"):
        open_models(str(file), "other.pth")
