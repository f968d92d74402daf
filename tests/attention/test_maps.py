"""Maps of any kind, their settings, and their drift."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlens.attention.drift import map_drift
from quantlens.attention.maps import MAPS, MapSettings, maps_of
from quantlens.errors import QuantlensError, UnknownNameError


@pytest.mark.parametrize("kind", MAPS)
def test_maps_of_any_kind(kind, loaded, pictures):
    model = loaded["vit"]
    maps, probabilities = maps_of(model, pictures, kind, target=None if kind == "rollout" else 2)
    assert maps.shape == (8, 4, 4)
    assert np.isfinite(maps).all()
    assert (maps >= 0).all()
    torch.testing.assert_close(probabilities, model(pictures).softmax(1), rtol=1e-3, atol=1e-5)
    same = map_drift(maps, maps)
    assert (same["spearman"] == 1).all()
    assert (same["overlap"] == 1).all()
    assert (same["movement"] == 0).all()


def test_unknown_maps_are_named(small_models, pictures):
    with pytest.raises(UnknownNameError, match="grad-cam"):
        maps_of(small_models["vit"], pictures, "gradcam2")


def test_settings_in_words():
    assert MapSettings().caption() == "rollout, heads fused by their maximum, smallest 90 % discarded"
    words = MapSettings(fusion="mean", discard=0.5, compat="vit-explain").caption()
    assert words == "rollout, heads fused by their mean, smallest 50 % discarded, as vit-explain"
    assert MapSettings("grad-cam", target=3).caption() == "grad-cam, class 3"
    assert MapSettings("gradient-rollout").caption() == (
        "gradient-rollout, smallest 90 % discarded, class predicted by FP32"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cam"}, "grad-cam"),
        ({"discard": 1.0}, "below 1"),
        ({"fusion": "sum"}, "mean"),
        ({"compat": "x"}, "vit-"),
    ],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(QuantlensError, match=message):
        MapSettings(**settings)
