"""Small models, loaded once, with a starting point to reconstruct from."""

from __future__ import annotations

import pytest

import quantlens as ql


@pytest.fixture(scope="session")
def small(small_models):
    """The small models as loaded models, by architecture."""
    return {kind: ql.load_model(model, input_size=(3, 32, 32), name=kind) for kind, model in small_models.items()}


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The shipped model with 32 calibration images and 128 held-out ones."""
    from quantlens import zoo
    from quantlens.data import load_images, open_source

    entry = zoo.available()["digits-vit"]

    def images(spec):
        return load_images(open_source(spec), entry.preprocess, cache_dir=tmp_path_factory.mktemp("cache")).tensor()

    return {
        "model": ql.load_model("digits-vit"),
        "calibration": images(f"{entry.sources.calibration}?n=32&seed=0"),
        "images": images(entry.sources.id)[:128],
    }
