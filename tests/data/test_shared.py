"""Images that two sets share, by content."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlens.calibration import Calibration
from quantlens.data import ImageSet, Preprocess, load_images
from quantlens.data.shared import content_digests, warn_shared
from quantlens.errors import QuantlensWarning

PRE = Preprocess((3, 24, 24), crop_pct=0.9)


def loaded(folder: Path, rows: str = "") -> ImageSet:
    return load_images(f"images:{folder}{rows}", PRE, cache_dir=False)


def said(*args: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_shared(*args)
    assert all(w.category is QuantlensWarning for w in caught)
    return [str(w.message) for w in caught]


def test_digests_tell_images_apart_and_know_them_again(folder: Path, tmp_path: Path) -> None:
    images = loaded(folder)
    digests = content_digests(images, PRE)
    assert len(set(digests)) == len(images) == 10
    assert content_digests(images.tensor(), PRE) == digests
    assert content_digests(images.tensor(), PRE, 3) == digests[:3]
    assert content_digests(images.tensor() + 0.01, PRE) != digests
    large = torch.rand(3, 3, 384, 384)
    changed = large.clone()
    changed[1, :, 190] += 0.5
    one, two = (content_digests(x, None) for x in (large, changed))
    assert [a == b for a, b in zip(one, two, strict=True)] == [True, False, True]


def test_what_is_shared_is_counted_and_said_once(folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for k, name in enumerate(["im0.jpg", "im1.jpg", "deeper/im8.jpg"]):
        (copies / f"other{k}.jpg").write_bytes((folder / name).read_bytes())
    id, ood = loaded(folder, "[2:]"), loaded(copies)
    calibration = Calibration.of(loaded(folder, "[:4]").tensor(), PRE).info(content=True)
    assert said(id, {"far": loaded(folder, "[:2]")}, None, None, PRE) == []
    (text,) = said(id, {"far": ood}, None, calibration, PRE)
    for words in (
        "OOD set far and the ID set share 2 images (2 of the 3 of OOD set far)",
        "the ID set and the calibration images share 2 images (2 of the 8 of the ID set)",
        "OOD set far and the calibration images share 2 images",
    ):
        assert words in text
    assert said(id, {"far": ood}, None, calibration, PRE) == []
    (text,) = said(id, {"far": ood}, loaded(copies), None, PRE)
    assert "OOD set far and the fit set share 3 images" in text


def test_calibration_images_are_known_by_a_checkpoint(folder: Path) -> None:
    info = Calibration.of(loaded(folder), PRE).info(content=True)
    assert info["content"] == "".join(content_digests(loaded(folder), PRE))
    assert "content" not in Calibration.of(loaded(folder), PRE).info()
    whole = np.zeros((300, 3, 24, 24), np.float32)
    assert len(Calibration.of(whole, PRE).info(content=True)["content"]) == 256 * 16
