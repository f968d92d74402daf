"""The image sets that ship with the package."""

from __future__ import annotations

import numpy as np
import pytest

from quantlens.data import Preprocess, available_embedded, cache_directory, load_embedded, load_images, open_source
from quantlens.data.embedded import HELD_OUT_DIGITS, ID_DIGITS
from quantlens.errors import UnknownNameError

DIGITS = [name for name in available_embedded() if not name.startswith("scenes")]
"""Sets that are there at once; scenes are drawn for seconds, and `test_scenes` looks at fewer of them."""


def keys(name: str) -> set[bytes]:
    return {p.tobytes() for p in load_embedded(name).pixels}


def test_what_there_is() -> None:
    groups = {name: info.group for name, info in available_embedded().items()}
    assert groups == {
        "digits-test": "id",
        "digits-train": "id",
        "digits-calibration": "id",
        "digits-fit": "id",
        "digits-held-out": "near",
        "photo-patches": "far",
        "letters": "far",
        "scenes": "id",
        "scenes-calibration": "id",
        "scenes-unknown": "near",
    }
    for name in DIGITS:
        images = load_embedded(name)
        assert images.pixels.dtype == np.uint8
        assert images.pixels.shape == (len(images.names), 32, 32, 3)
        assert len(set(images.names)) == len(images.names)
        assert images.pixels.std(axis=(1, 2, 3)).min() > 5  # no blank image
        assert (images.labels is not None) == (groups[name] == "id")
    with pytest.raises(UnknownNameError, match="letters"):
        load_embedded("leters")


def test_parts_are_disjoint_and_balanced() -> None:
    test, train = keys("digits-test"), keys("digits-train")
    calibration, fit, held_out = keys("digits-calibration"), keys("digits-fit"), keys("digits-held-out")
    assert len(load_embedded("digits-test").names) >= 350
    assert len(load_embedded("digits-held-out").names) >= 350
    for a, b in [(test, train), (test, held_out), (train, held_out), (calibration, fit)]:
        assert not a & b
    assert calibration | fit == train
    assert set(np.bincount(load_embedded("digits-test").labels)) == {50}
    assert set(np.bincount(load_embedded("digits-calibration").labels)) == {32}


def test_digits_are_scikit_learns_with_true_labels() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = 0
    for name in ("digits-test", "digits-train", "digits-held-out"):
        images = load_embedded(name)
        rows = [int(n.split("/")[1].split("-")[0]) for n in images.names]
        seen += len(rows)
        if images.labels is None:
            assert set(digits.target[rows]) == set(HELD_OUT_DIGITS)
        else:
            assert [ID_DIGITS[y] for y in images.labels] == digits.target[rows].tolist()
        # a 4x4 block of the enlarged image follows the count it came from
        blocks = images.pixels[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
        assert np.corrcoef(blocks.ravel(), digits.images[rows].ravel())[0, 1] > 0.97
    assert seen == 1797


def test_letters_look_like_digits_and_patches_do_not() -> None:
    digits, letters, patches = (load_embedded(n).pixels for n in ("digits-test", "letters", "photo-patches"))
    dark = [np.mean(x < 40) for x in (digits, letters, patches)]  # white strokes on black
    assert abs(dark[0] - dark[1]) < 0.2
    assert digits[..., 0].max(axis=(1, 2)).min() > 200
    assert letters[..., 0].max(axis=(1, 2)).min() > 150
    for x in (digits, letters, patches):
        assert np.array_equal(x[..., 0], x[..., 1])


def test_sets_are_deterministic() -> None:
    for name in DIGITS:
        first = load_embedded(name)
        load_embedded.cache_clear()
        again = load_embedded(name)
        assert again is not first
        assert again.fingerprint() == first.fingerprint()
    assert len({load_embedded(n).fingerprint() for n in DIGITS}) == len(DIGITS)


@pytest.mark.slow
def test_scenes_have_boxes_in_pixels_and_unknown_ones_have_none() -> None:
    for name, count in (("scenes", 512), ("scenes-calibration", 128), ("scenes-unknown", 512)):
        source = open_source(f"embedded:{name}")
        assert (len(source), source.sizes.shape, source.labels) == (count, (count, 2), None)
        corners = source.boxes.boxes
        assert (corners[:, :2] < corners[:, 2:]).all()
        assert (corners >= 0).all()
        assert (corners <= 96).all()
        assert len(np.unique(source.boxes.image)) == (0 if name == "scenes-unknown" else count)
    part = open_source("embedded:scenes[500:]")
    assert part.boxes.image.max() < 12
    assert part.boxes.names == tuple("01234567")


def test_sets_are_read_only_and_not_cached_on_disk() -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_embedded("letters").pixels[0] = 0
    images = load_images("embedded:letters[:5]", Preprocess((3, 32, 32), crop_pct=1.0))
    assert not cache_directory().exists()
    assert images.group == "far"
    assert np.array_equal(images.pixels, load_embedded("letters").pixels[:5].transpose(0, 3, 1, 2))


def test_source_fingerprint_follows_the_content() -> None:
    a, b = open_source("embedded:letters[:5]"), open_source("embedded:letters[:6]")
    assert a.fingerprint() == open_source("embedded:letters[:5]").fingerprint()
    assert a.fingerprint() != b.fingerprint()
