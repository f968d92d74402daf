"""Folders of small generated images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache."""
    monkeypatch.setenv("QUANTLENS_CACHE", str(tmp_path / "default-cache"))


@pytest.fixture
def shared_data() -> Path:
    if not (SHARED / "imagenet").is_dir():
        pytest.skip(f"real images are absent: no {SHARED}/imagenet")
    return SHARED


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """picture(width, height, seed): a smooth random RGB image with some noise, so that a resize is
    visible.
    """

    def make(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
        noisy = np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 3))
        return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))

    return make


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[..., Image.Image]) -> Path:
    """Ten images a.jpg … in a folder and one below it."""
    root = tmp_path / "pictures"
    (root / "deeper").mkdir(parents=True)
    for k in range(10):
        where = root / "deeper" if k >= 7 else root
        picture(40 + k, 30 + 2 * k, seed=k).save(where / f"im{k}.jpg", quality=90)
    return root
