"""Pictures of maps: colours that rise evenly, overlays in the right place, grids that hold what they are given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from quantlens.attention import pictures
from quantlens.data.preprocess import Preprocess
from quantlens.errors import QuantlensError, StorageError, UnknownNameError


def _lightness(colours: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours, written out apart from the code under test."""
    c = colours / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


@pytest.mark.parametrize("scale", pictures.COLOURS)
def test_lightness_rises_evenly(scale):
    steps = np.diff(_lightness(pictures.coloured(np.linspace(0, 1, 9), scale)))
    assert (steps > 0).all()
    assert steps.max() < 2.2 * steps.min()


def test_colours_end_where_the_range_ends():
    ends = pictures.coloured(np.array([0.0, 1.0]))
    assert np.array_equal(pictures.coloured(np.array([-3.0, 7.0])), ends)
    assert np.array_equal(pictures.coloured(np.array([np.nan, np.inf])), ends)
    with pytest.raises(UnknownNameError, match="inferno"):
        pictures.coloured(np.zeros(3), "jet")


def test_overlay_lights_the_patch_it_is_given():
    photo = Image.new("RGB", (64, 32), (90, 90, 90))
    values = np.zeros((4, 8))
    values[1, 6] = 1  # second row of four, seventh column of eight
    shown = _lightness(np.asarray(pictures.overlay(photo, values)).astype(float))
    assert np.unravel_index(shown.argmax(), shown.shape)[0] // 8 == 1
    assert np.unravel_index(shown.argmax(), shown.shape)[1] // 8 == 6
    assert np.array_equal(np.asarray(pictures.overlay(photo, values, opacity=0)), np.asarray(photo))
    alone = np.asarray(pictures.overlay(photo, np.ones((2, 2)), opacity=1))
    assert np.array_equal(alone[0, 0], pictures.coloured(np.ones(1))[0])
    with pytest.raises(QuantlensError, match="opacity"):
        pictures.overlay(photo, values, opacity=2)


def test_enlarging_keeps_a_constant_and_the_mean():
    assert np.allclose(pictures.enlarged(np.full((3, 5), 0.25), (50, 30)), 0.25)
    ramp = np.linspace(0, 1, 6)[None].repeat(4, 0)
    large = pictures.enlarged(ramp, (60, 40))
    assert large.shape == (40, 60)
    assert large.mean() == pytest.approx(ramp.mean(), abs=1e-3)
    assert (np.diff(large, axis=1) >= -1e-6).all()


def test_pictures_undo_the_normalisation():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    preprocess = Preprocess((3, 8, 8))
    values = preprocess.normalize(pixels[None])[0].numpy()
    assert np.array_equal(np.asarray(pictures.picture(values, preprocess)), pixels.transpose(1, 2, 0))
    assert np.array_equal(np.asarray(pictures.picture(pixels)), pixels.transpose(1, 2, 0))


def test_heat_has_one_colour_per_patch():
    values = np.array([[0.0, 0.5], [1.0, 0.25]])
    shown = np.asarray(pictures.heat(values, (20, 20)))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 4
    assert np.array_equal(shown[15, 5], pictures.coloured(np.ones(1), "viridis")[0])


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 1, False, ["0", "0.2", "0.4", "0.6", "0.8", "1+"]),
        (0, 3.3, False, ["0", "1", "2", "3.3+"]),
        (9.28, 31.7, False, ["9.28", "20", "31.7+"]),
        (12.3, 564, True, ["12.3", "50", "100", "200", "564+"]),
        (0.02, 4000, True, ["0.02", "1", "10", "100", "4000+"]),
        (5, 5, False, ["5", "5+"]),
    ],
)
def test_ticks_are_round_and_stand_where_their_values_are(low, high, log, expected):
    scale = pictures.Scale(low, high, "", log=log)
    assert [text for _, text in scale.ticks()] == expected
    for place, text in scale.ticks()[1:-1]:
        assert place == pytest.approx(float(scale.position(float(text))), abs=1e-6)


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
    shown = np.asarray(pictures.overlay(photo, np.zeros((2, 2)), opacity=0))
    assert (shown == shown[..., :1]).all()


def test_a_grid_shows_its_scale_and_all_of_its_note():
    cells = [pictures.Cell(Image.new("RGB", (30, 30), (200, 0, 0)))]
    bare = pictures.grid([cells], ["a"], ["b"], side=60)
    scale = pictures.Scale(0, 1, "share", "viridis")
    shown = pictures.grid([cells], ["a"], ["b"], side=60, scale=scale, note="many words " * 12)
    assert shown.height > bare.height + 3 * 15, "the bar, its numbers and a note of several lines"
    ends = pictures.coloured(np.array([0.0, 1.0]), "viridis")
    for colour in ends:
        assert (np.asarray(shown) == colour).all(-1).any()


def test_grid_places_cells_and_cuts_long_words():
    colours = [(200, 0, 0), (0, 150, 0), (0, 0, 200)]
    cells = [pictures.Cell(Image.new("RGB", (30, 30), c), (f"a very long class name {i}" * 3, "12 %")) for i, c in
             enumerate(colours)]  # fmt: skip
    drawn = pictures.grid([[*cells], [None, cells[0], None]], ["one", "two_words_of_a_model"], list("abc"), side=60)
    pixels = np.asarray(drawn).reshape(-1, 3)
    counts = [int((pixels == c).all(1).sum()) for c in colours]
    assert counts == [2 * 3600, 3600, 3600]
    assert drawn.width < 60 * 3 + 160
    with pytest.raises(QuantlensError, match="title"):
        pictures.grid([cells], ["one"], ["a"])


def test_saving_and_reading_back(tmp_path):
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    path = pictures.save(photo, tmp_path / "deep" / "a.png")
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(photo))
    assert Image.open(pictures.save(photo, tmp_path / "a.webp")).size == (30, 40)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.webp", "deep"]
    with pytest.raises(UnknownNameError, match=r"\.png"):
        pictures.save(photo, tmp_path / "a.bmp")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        pictures.save(photo, tmp_path / "file" / "a.png")
    assert np.array_equal(np.asarray(pictures.from_webp(pictures.webp(photo, lossless=True))), np.asarray(photo))
    assert max(pictures.thumbnail(photo, 20).size) == 20
    for bad in ("", "!!", "AAAA"):
        with pytest.raises(QuantlensError, match="cannot be read"):
            pictures.from_webp(bad)
