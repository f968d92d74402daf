"""Scenes: the same bytes everywhere, boxes that hold the strokes, and nothing of the test in the training."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from quantlens.data import scene_parts, scenes as drawing
from quantlens.data.scene_parts import parts
from quantlens.data.scenes import CLASSES, MOST, SIDE, compose, scenes


@pytest.fixture(scope="module")
def some() -> drawing.Scenes:
    return scenes("test", 48)


def digest(found: drawing.Scenes) -> str:
    arrays = (found.pixels, found.image.astype("<i8"), found.boxes.astype("<f8"), found.labels.astype("<i8"))
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def test_scenes_are_the_same_on_every_processor(some: drawing.Scenes) -> None:
    """Held-out figures of the shipped detectors are of these very bytes; a change makes them wrong."""
    assert digest(some) == "4a66d3b7f00ac112"


def test_fewer_scenes_are_the_first_of_more_and_seeds_and_splits_differ(some: drawing.Scenes) -> None:
    few, other = scenes("test", 5), scenes("test", 5, seed=1)
    assert np.array_equal(few.pixels, some.pixels[:5])
    assert np.array_equal(few.boxes, some.boxes[some.image < 5])
    assert not np.array_equal(few.pixels, other.pixels)
    assert not np.array_equal(few.pixels, scenes("train", 5).pixels)


def test_every_scene_has_one_to_five_digits_of_many_sizes(some: drawing.Scenes) -> None:
    assert some.pixels.shape == (48, SIDE, SIDE, 3)
    assert some.pixels.dtype == np.uint8
    counts = np.bincount(some.image, minlength=48)
    assert counts.min() == 1
    assert counts.max() == MOST
    assert set(some.labels) == set(range(len(CLASSES)))
    assert np.all(some.boxes[:, :2] >= 0)
    assert np.all(some.boxes[:, 2:] <= SIDE)
    sides = some.boxes[:, 2:] - some.boxes[:, :2]
    assert sides.min() >= 3
    assert sides.max(axis=1).min() >= 8
    assert sides.max(axis=1).min() < 12
    assert 50 < sides.max() < SIDE


def without(slot_painted: int, monkeypatch: pytest.MonkeyPatch):
    """Scenes of one seed of which only one slot is painted, and without grain."""
    real, calls = drawing._painted, []

    def painted(draw, picture, opacity):
        calls.append(0)
        after = real(draw, picture, opacity)
        return after if (len(calls) - 1) % MOST == slot_painted else picture

    monkeypatch.setattr(drawing, "_painted", painted)
    rng = np.random.RandomState(5)

    def draw(low, high, *shape):
        drawn = torch.from_numpy(rng.randint(low, high, size=shape))
        return torch.zeros_like(drawn) if (low, high) == (0, 10) else drawn

    return compose(parts("test"), draw, 16)


def test_a_box_is_where_the_picture_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, boxes, labels = without(-1, monkeypatch)
    monkeypatch.undo()
    with_first, _, _ = without(0, monkeypatch)
    changed = (bare.int() - with_first.int()).abs().amax(-1)
    for picture, (x1, y1, x2, y2), label in zip(changed, boxes[:, 0].tolist(), labels[:, 0], strict=True):
        assert label >= 0, "the first digit always finds its place"
        outside = picture.clone()
        outside[y1:y2, x1:x2] = 0
        inside = picture[y1:y2, x1:x2]
        assert outside.max() <= 0.3 * inside.max(), "what lies outside is the faint edge of the stroke"
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.max() > 0, "no row or column of the box is empty"


def test_digits_cover_little_of_each_other(some: drawing.Scenes) -> None:
    for number in range(48):
        boxes = some.boxes[some.image == number]
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = (high - low).clip(0).prod(-1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        share = shared / np.minimum(area[:, None], area[None])
        np.fill_diagonal(share, 0)
        assert share.max() <= 0.45


def test_training_and_test_share_neither_digits_nor_photographs_nor_textures() -> None:
    train, test, unknown = parts("train"), parts("test"), parts("unknown")
    glyphs = [{row.numpy().tobytes() for row in bank.strokes} for bank in (train, test, unknown)]
    assert not glyphs[0] & glyphs[1]
    assert not (glyphs[0] | glyphs[1]) & glyphs[2]
    assert set(unknown.classes.tolist()) == {-1}
    for name in scene_parts.PHOTOS:
        left, right = scene_parts._photo(name, "train"), scene_parts._photo(name, "test")
        whole = np.concatenate([left, right], axis=1)
        assert whole.shape == (427, 640, 3)
    rows = [
        {row.tobytes() for row in bank.behind.numpy().reshape(-1)[: 3 * 96 * 5000].reshape(-1, 288)}
        for bank in (train, test)
    ]
    assert not rows[0] & rows[1]


def test_scenes_of_unknown_objects_have_objects_but_no_box() -> None:
    found = scenes("unknown", 8)
    assert len(found.boxes) == len(found.labels) == 0
    assert found.pixels.shape == (8, SIDE, SIDE, 3)
