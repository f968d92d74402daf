from __future__ import annotations

import pytest

import quantlens as ql


@pytest.fixture(scope="session")
def loaded(small_models):
    """The small models, each of them captured once."""
    return {kind: ql.load_model(model, input_size=(3, 32, 32), name=kind) for kind, model in small_models.items()}
