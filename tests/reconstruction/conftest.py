"""Small models, loaded once, with a starting point to reconstruct from."""

from __future__ import annotations

import pytest

import quantlens as ql


@pytest.fixture(scope="session")
def small(small_models):
    """The small models as loaded models, by architecture."""
    return {kind: ql.load_model(model, input_size=(3, 32, 32), name=kind) for kind, model in small_models.items()}


@pytest.fixture(scope="session")
def digits(digits):
    """With 128 held-out images."""
    return {**digits, "images": digits["images"][:128]}
