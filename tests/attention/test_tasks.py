"""Attention of models that are no plain classifiers: outputs in a dictionary, one logit, several labels, features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import quantlens as ql
from detectors import detector, pictures
from quantlens.attention.maps import MAPS, maps_of
from quantlens.attention.recording import Lens
from quantlens.errors import UnsupportedError


class Wrapped(torch.nn.Module):
    """A classifier that returns what models of Hugging Face return, or the last ``keep`` of its logits alone."""

    def __init__(self, inner: torch.nn.Module, keep: int = 0):
        super().__init__()
        self.inner, self.keep = inner, keep

    def forward(self, pixel_values):
        logits = self.inner(pixel_values)
        return logits[:, -self.keep :] if self.keep else {"logits": logits, "more": logits * 2}


@pytest.fixture(scope="module")
def net(loaded):
    return loaded["vit"]


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wrapped(net):
    return ql.load_model(Wrapped(net.module), input_size=32)


def both(module, images, **how):
    model = ql.load_model(module, input_size=32, **how)
    return model, ql.quantize(model, images, method="minmax", bits="W4A4")


@pytest.mark.parametrize("kind", ["grad-cam", "gradient-rollout"])
def test_logits_in_a_dictionary(kind, net, wrapped, images):
    """The maps and probabilities are those of the classifier that gives logits alone."""
    for found, wanted in zip(maps_of(wrapped, images, kind), maps_of(net, images, kind), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_one_logit_is_two_classes(net, images):
    model, quantized = both(Wrapped(net.module, keep=1), images)
    view = ql.attention.compare(model, quantized, images, map="grad-cam").sets["ID"]
    positive = model(images)[:, 0].sigmoid()
    assert bool((positive < 0.5).any())  # else the test says little
    assert view.predicted["FP32"].tolist() == (positive > 0.5).long().tolist()
    np.testing.assert_allclose(view.confidence["FP32"], torch.maximum(positive, 1 - positive), rtol=1e-4)
    assert (view.maps["FP32"].max((1, 2)) > 0).all()  # also where the predicted class is 0
    p, q = positive.double(), quantized(images)[:, 0].sigmoid().double()
    wanted = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    np.testing.assert_allclose(view.drift["W4A4"].output_kl, wanted, rtol=1e-3, atol=1e-6)


def test_several_labels_are_sigmoids(net, images):
    model, quantized = both(net.module, images, task="multilabel")
    view = ql.attention.compare(model, quantized, images).sets["ID"]
    p, q = (one(images).double().sigmoid() for one in (model, quantized))
    np.testing.assert_allclose(view.confidence["FP32"], p.amax(1), rtol=1e-4)
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    np.testing.assert_allclose(view.drift["W4A4"].output_kl, wanted, rtol=1e-3, atol=1e-6)


def test_features_have_no_classes(net, images, tmp_path):
    model, quantized = both(net.module, images, task="features")
    found = ql.attention.compare(model, quantized, images)
    view, drift = found.sets["ID"], found.drift()["W4A4"]["ID"]
    assert (view.predicted, view.confidence) == ({}, {})
    assert {"rollout_spearman", "row_kl"} <= set(drift)
    assert not {"prediction_changed", "confidence_change", "output_kl"} & set(drift)
    assert set(view.per_image("W4A4")[0]) >= {"image", "rollout_spearman"}
    assert {path.name for path in found.save(tmp_path)} >= {"maps.png", "norms.png", "drift.json"}
    for kind in MAPS[1:]:
        with pytest.raises(UnsupportedError, match=f"no class whose {kind} map could be drawn; take rollout"):
            ql.attention.compare(model, quantized, images, map=kind)


def test_a_detector_has_no_maps_as_its_tokens_are_not_all_patches():
    model, images = detector(), pictures().values
    for kind in ("rollout", "grad-cam"):
        with pytest.raises(UnsupportedError, match="reads its boxes off queries"):
            maps_of(model, images, kind)
    with pytest.raises(UnsupportedError, match="reads its boxes off queries"):
        ql.attention.compare(model, ql.quantize(model, images, "minmax", "W8A8"), images)
    with pytest.raises(UnsupportedError, match="reads its boxes off queries"):
        Lens(model)
