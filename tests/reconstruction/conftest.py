"""Small models, loaded once, with a starting point to reconstruct from."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def small(loaded):
    """The small models as loaded models, by architecture."""
    return loaded


@pytest.fixture(scope="session")
def digits(digits):
    """With 128 held-out images."""
    return {**digits, "images": digits["images"][:128]}
