"""Pictures of maps: colours that rise evenly, overlays in the right place, grids that hold what they are given."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from quantlens.attention import pictures
from quantlens.attention.picture_grids import SIDE, cell, grid
from quantlens.data.preprocess import Preprocess
from quantlens.errors import QuantlensError


def _lightness(colours: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours, written out apart from the code under test."""
    c = colours / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


@pytest.mark.parametrize("colours", [pictures.INFERNO, pictures.VIRIDIS])
def test_lightness_rises_evenly(colours):
    steps = np.diff(_lightness(pictures.coloured(np.linspace(0, 1, 9), colours)))
    assert (steps > 0).all()
    assert steps.max() < 2.2 * steps.min()


def test_colours_end_where_the_range_ends():
    ends = pictures.coloured(np.array([0.0, 1.0]))
    assert np.array_equal(pictures.coloured(np.array([-3.0, 7.0])), ends)
    assert np.array_equal(pictures.coloured(np.array([np.nan, np.inf])), ends)


def test_overlay_lights_the_patch_it_is_given():
    photo = Image.new("RGB", (64, 32), (90, 90, 90))
    values = np.zeros((4, 8))
    values[1, 6] = 1  # second row of four, seventh column of eight
    shown = _lightness(np.asarray(pictures.overlay(photo, values, pictures.Scale())).astype(float))
    assert np.unravel_index(shown.argmax(), shown.shape)[0] // 8 == 1
    assert np.unravel_index(shown.argmax(), shown.shape)[1] // 8 == 6


def test_photographs_undo_the_normalisation():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    preprocess = Preprocess((3, 8, 8))
    values = preprocess.normalize(pixels)
    expected = pixels[0].transpose(1, 2, 0)
    for images, known in (
        (SimpleNamespace(pixels=pixels, preprocess=preprocess), None),
        (SimpleNamespace(pixels=None, values=values, preprocess=preprocess), None),
        (SimpleNamespace(pixels=None, values=values, preprocess=None), preprocess),
    ):
        assert np.array_equal(np.asarray(pictures.photograph(images, 0, known)), expected)
    stretched = pictures.photograph(SimpleNamespace(pixels=None, values=values, preprocess=None), 0)
    assert np.asarray(stretched).min() == 0
    assert np.asarray(stretched).max() == 255


def test_heat_has_one_colour_per_patch():
    values = np.array([[0.0, 0.5], [1.0, 0.25]])
    shown = np.asarray(pictures.heat(values, pictures.Scale(colours=pictures.VIRIDIS)))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 4
    assert np.array_equal(shown[1, 0], pictures.coloured(np.ones(1), pictures.VIRIDIS)[0])


def test_scales_hold_the_values_they_are_made_for():
    rng = np.random.default_rng(0)
    maps = [rng.random((4, 4)) for _ in range(3)]
    scale = pictures.rollout_scale(maps)
    assert scale.low == 0
    shares = np.concatenate([scale.position(pictures.relative(m)).ravel() for m in maps])
    assert (shares <= 1).mean() >= 0.97
    assert pictures.relative(maps[0]).mean() == pytest.approx(1)
    assert pictures.rollout_scale([np.ones((2, 2))]).high == 2, "an even map does not shine"
    assert not pictures.relative(np.zeros((2, 2))).any()
    norms = np.array([10.0, 20.0, 500.0])
    assert pictures.norm_scale(norms).position(norms)[[0, 2]].tolist() == pytest.approx([0, 1])
    assert pictures.norm_scale(norms).log
    assert not pictures.norm_scale(norms[:2]).log
    assert pictures.norm_scale(np.array([np.nan, 1.0, 2.0])).high == 2


def test_a_map_lies_over_a_grey_image():
    """Every colour is one of the scale, not of the photograph."""
    photo = Image.new("RGB", (8, 8), (250, 120, 10))
    shown = np.asarray(pictures.overlay(photo, np.zeros((2, 2)), pictures.Scale()))
    assert np.ptp(shown.astype(int), axis=-1).max() <= 3, "the lowest colour of the scale is nearly black"


def drawn(cells, **settings) -> np.ndarray:
    scale = pictures.Scale(**{"low": 1.0, "high": 3.0, "label": "share", "colours": pictures.VIRIDIS, **settings})
    return np.asarray(Image.open(io.BytesIO(grid(cells, "title", "many words " * 12, scale))).convert("RGB"))


@pytest.mark.parametrize("settings", [{}, {"high": 400.0, "log": True}, {"high": 1.0}])
def test_a_grid_shows_its_scale_and_its_note(settings):
    shown = drawn([cell("a", "b", Image.new("RGB", (30, 30), (200, 0, 0)))], **settings)
    below = shown[np.flatnonzero((shown == [200, 0, 0]).all(-1).any(1)).max() + 30 :]
    assert (below < 250).any(-1).any(1).sum() > 3 * 15, "the bar, its numbers and a note of several lines"
    low, high = (bytes.fromhex(pictures.VIRIDIS.split()[k]) for k in (0, -1))
    for colour in (low, high) if settings != {"high": 1.0} else ():
        assert (np.abs(below.astype(int) - list(colour)).max(-1) < 12).any()


def test_a_grid_places_its_cells_and_cuts_long_words():
    colours = [(200, 0, 0), (0, 150, 0), (0, 0, 200)]
    photos = [Image.new("RGB", (30, 30), c) for c in colours]
    cells = [
        cell("one", c, photo, "a very long class name " * 3, "12 %") for c, photo in zip("abc", photos, strict=True)
    ]
    cells.append(cell("two_words_of_a_model", "b", photos[0], marked=True))
    shown = drawn(cells)
    places = [np.argwhere((shown == c).all(-1)) for c in colours]
    assert [len(p) for p in places] == [2 * SIDE**2, SIDE**2, SIDE**2]
    rows = sorted({int(y) for y, x in places[0]})
    assert len(rows) == 2 * SIDE, "the second row is below the first"
    assert places[0][-1][1] in places[1][:, 1], "the cell of the second row stands in the second column"
    assert shown.shape[1] < 3 * (SIDE + 8) + 220


def test_writing_and_reading_webp():
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(pictures.from_webp(pictures.webp(photo, lossless=True))), np.asarray(photo))
    for bad in ("", "!!", "AAAA"):
        with pytest.raises(QuantlensError, match="cannot be read"):
            pictures.from_webp(bad)
