"""The corruptions of ImageNet-C: their formulas by hand, and that a picture's corruption is its own."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy import ndimage

from quantlens.data import corruption_blurs as blurs, corruption_pixels as light, corruption_weather as weather
from quantlens.data.corruptions import CORRUPTIONS, corrupt, parse_corruption, picture_seeds
from quantlens.errors import QuantlensError, UnknownNameError

SIZES = ((20, 33), (64, 72))
"""One with the constants of CIFAR-10-C, one with those of ImageNet-C; neither square."""


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth and coloured, with edges: uint8 [count, height, width, 3]."""
    noise = np.random.default_rng(seed).normal(size=(count, height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 3, 3, 0))
    smooth += 0.1 * np.sign(ndimage.gaussian_filter(noise, (0, 6, 6, 0)))
    return np.uint8(np.clip(128 + 100 * smooth / smooth.std(axis=(1, 2, 3), keepdims=True) / 2, 0, 255))


GIVEN = {size: pictures(3, *size) for size in SIZES}


def plain(colour: tuple[int, int, int], height: int = 64, width: int = 64) -> np.ndarray:
    return np.tile(np.uint8(colour), (1, height, width, 1))


def one(pixels: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    return corrupt(pixels, name, severity, seeds=np.full(len(pixels), seed)).astype(int)


def test_there_are_15_and_4_with_constants_of_five_severities():
    assert [name for name, found in CORRUPTIONS.items() if found.extra] == list(CORRUPTIONS)[15:]
    assert len(CORRUPTIONS) == 19
    assert all(len(found.large) == len(found.small) == 5 for found in CORRUPTIONS.values())
    assert list(CORRUPTIONS)[:3] == ["gaussian_noise", "shot_noise", "impulse_noise"]


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_a_picture_becomes_the_same_whatever_stands_beside_it(name, size):
    given = GIVEN[size]
    before, seeds = given.copy(), picture_seeds(given)
    for severity in (1, 4):
        found = corrupt(given, name, severity, seeds=seeds)
        assert (found.dtype, found.shape) == (np.uint8, given.shape)
        assert not np.array_equal(found, given)
        order = np.array([2, 0, 1])
        assert np.array_equal(corrupt(given[order], name, severity, seeds=seeds[order]), found[order])
        assert np.array_equal(corrupt(given[1:2], name, severity, seeds=seeds[1:2]), found[1:2])
    assert np.array_equal(given, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_random_ones_depend_on_the_seed_and_the_others_do_not(name):
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur"}
    given = GIVEN[SIZES[1]]
    same = np.array_equal(one(given, name, 3, seed=1), one(given, name, 3, seed=2))
    assert same == (name in fixed | {"saturate"})


UNEVEN = {"elastic_transform", "saturate", "spatter", "frost", "snow", "fog", "glass_blur"}
"""In ImageNet-C too a higher severity of these is another effect, not everywhere more of one."""


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (80, 80)])
def test_a_higher_severity_is_further_from_the_picture(name, size):
    given = pictures(4, *size, seed=1)
    seeds = picture_seeds(given)
    found = [corrupt(given, name, s, seeds=seeds) for s in (1, 2, 3, 4, 5)]
    far = [np.abs(one - given.astype(float)).mean() for one in found]
    if name in UNEVEN:
        assert len(set(far)) == 5, far
    else:  # CIFAR-10-C's motion of severity 3 is that of 4 on pictures so small
        assert np.all(np.diff(far) >= 0), far
        assert far[0] < far[2] < far[4]


def test_the_constants_change_at_64_pixels():
    assert one(plain((100, 100, 100), 64, 64), "brightness", 1).max() == 125
    assert one(plain((100, 100, 100), 63, 90), "brightness", 1).max() == 112


# ---- known values ----------------------------------------------------------------------------------------------------


def test_contrast_is_about_each_channels_mean():
    given = np.concatenate([plain((0, 40, 90), 64, 32), plain((200, 40, 30), 64, 32)], axis=2)
    found = one(given, "contrast", 1)
    assert found[0, 0, 0].tolist() == [60, 40, 72]  # 100 - 0.4 * 100, 40, 60 + 0.4 * 30
    assert found[0, 0, -1].tolist() == [140, 40, 48]


def test_brightness_raises_the_value_and_keeps_hue_and_saturation():
    found = one(np.concatenate([plain((200, 100, 50)), plain((0, 0, 0)), plain((250, 25, 0))]), "brightness", 2)
    assert found[:, 0, 0].tolist() == [[251, 125, 62], [51, 51, 51], [255, 25, 0]]  # 251 / 200; 0.2 * 255; to 1 at most


def test_saturation_is_multiplied_and_grey_turns_red():
    found = one(np.concatenate([plain((200, 100, 150)), plain((120, 120, 120))]), "saturate", 2)
    assert found[:, 0, 0].tolist() == [[200, 190, 195], [120, 120, 120]]  # 0.1 of the difference is left
    assert one(plain((120, 120, 120)), "saturate", 5)[0, 0, 0].tolist() == [120, 96, 96]  # saturation 0.2, hue 0


def test_noise_has_the_spread_that_its_constant_says():
    grey = plain((128, 128, 128), 128, 128)
    assert one(grey, "gaussian_noise", 1).std() == pytest.approx(0.08 * 255, rel=0.02)
    assert one(grey, "speckle_noise", 1).std() == pytest.approx(0.15 * 128, rel=0.02)
    assert one(grey, "shot_noise", 1).std() == pytest.approx(255 * (128 / 255 / 60) ** 0.5, rel=0.02)
    hit = one(grey, "impulse_noise", 5)
    assert (hit == 0).mean() == pytest.approx(0.135, abs=0.006)
    assert (hit == 255).mean() == pytest.approx(0.135, abs=0.006)
    assert set(np.unique(hit)) == {0, 128, 255}
    assert (hit == 128).all(axis=-1).mean() == pytest.approx(0.73**3, abs=0.02)  # each channel for itself
    assert np.mean(one(grey, "gaussian_noise", 1)) == pytest.approx(127.5, abs=0.5)  # cut off, not rounded


def test_severities_share_a_pictures_random_numbers():
    grey = plain((128, 128, 128))
    assert np.corrcoef(*(one(grey, "gaussian_noise", s).ravel() for s in (1, 2)))[0, 1] > 0.99
    assert np.corrcoef(*(one(grey, n, 1).ravel() for n in ("gaussian_noise", "speckle_noise")))[0, 1] < 0.1


def test_jpeg_and_large_pixels_are_pillows():
    given = GIVEN[SIZES[1]]
    stream = BytesIO()
    Image.fromarray(given[1]).save(stream, "JPEG", quality=10)
    assert np.array_equal(one(given, "jpeg_compression", 4)[1], np.asarray(Image.open(stream)))
    halves = plain((0, 0, 0), 64, 128)
    halves[:, :, ::2] = 200
    assert np.unique(one(halves, "pixelate", 5)).tolist() == [100]  # 4 x 4 to one


def test_gaussian_blur_of_a_point_is_a_gaussian():
    point = plain((0, 0, 0), 65, 65)
    point[0, 32, 32] = 255
    line = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    expected = 255 * np.outer(line, line) / line.sum() ** 2
    assert np.array_equal(one(point, "gaussian_blur", 1)[0, 28:37, 28:37, 1], expected.astype(int))


def test_defocus_of_a_point_is_a_disk():
    point = plain((0, 0, 0), 65, 65)
    point[0, 32, 32] = 255
    found = one(point, "defocus_blur", 1)[0, :, :, 0]
    y, x = np.mgrid[-32:33, -32:33]
    assert np.array_equal(found, np.where(x**2 + y**2 <= 9, 255 // 29, 0))


@pytest.mark.parametrize("angle", [0.0, 30.0, -45.0, -100.0])
def test_motion_is_half_a_gaussian_along_a_line(angle):
    x = pictures(2, 20, 31).astype(float)
    weights = np.exp(-(np.arange(9) ** 2) / 18)
    expected = np.zeros_like(x)
    for step, weight in enumerate(weights / weights.sum()):
        right, down = (
            int(np.ceil(step * part - 0.5)) for part in (np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle)))
        )
        rows, columns = np.clip(np.arange(20) + down, 0, 19), np.clip(np.arange(31) + right, 0, 30)
        expected += weight * x[:, rows][:, :, columns]
    assert np.allclose(blurs.moved(x, 4, 3, np.array([angle, angle])), expected)


def test_glass_takes_from_neighbours_one_after_the_other():
    class Fixed:
        def integers(self, low, high, size):
            return np.random.default_rng(7).integers(low, high, size)

    shifts, distance = Fixed().integers(-2, 2, (2, 14, 17)), 2
    expected = np.arange(14 * 17).reshape(14, 17)
    for h in range(14 - distance, distance, -1):
        for w in range(17 - distance, distance, -1):
            dx, dy = shifts[:, h, w]
            expected[h, w] = expected[h + dy, w + dx]
    found = blurs._nearby(14, 17, distance, [Fixed(), Fixed()])
    assert np.array_equal(found, np.stack([expected.ravel()] * 2))
    assert len(np.unique(expected)) < expected.size  # colours are copied, not swapped


def test_zoom_is_scipys():
    x = pictures(2, 40, 53).astype(float)
    for factor in (1.0, 1.3, 2.5):
        cut = [int(np.ceil(side / factor)) for side in (40, 53)]
        top, left = (40 - cut[0]) // 2, (53 - cut[1]) // 2
        large = ndimage.zoom(
            x[:, top : top + cut[0], left : left + cut[1]], (1, factor, factor, 1), order=1, mode="nearest"
        )
        y, z = (large.shape[1] - 40) // 2, (large.shape[2] - 53) // 2
        assert np.allclose(blurs.zoomed(x, factor), large[:, y : y + 40, z : z + 53])


def test_elastic_moves_by_its_fields_and_mirrors():
    x = pictures(1, 12, 15).astype(float)
    columns, rows = np.meshgrid(np.arange(15), np.arange(12))
    moved = np.stack([columns + 3.0, rows - 2.0], axis=-1)[None]
    padded = np.pad(x, ((0, 0), (2, 0), (0, 3), (0, 0)), mode="reflect")[:, :12, 3:]
    assert np.allclose(blurs._sampled(x, moved, corners=True), padded)
    padded = np.pad(x, ((0, 0), (2, 0), (0, 3), (0, 0)), mode="symmetric")[:, :12, 3:]
    assert np.allclose(blurs._sampled(x, moved, corners=False), padded)
    field = np.random.default_rng(0).uniform(-1, 1, (12, 15))
    expected = ndimage.gaussian_filter(field, 2.5, mode="reflect", truncate=3)
    assert np.allclose(blurs._smoothing(12, 2.5) @ field @ blurs._smoothing(15, 2.5).T, expected)


def test_elastic_follows_three_points():
    """Severity 1 of small pictures is the three points' movement alone."""
    size = 48
    rows, columns = np.mgrid[0:size, 0:size]
    ramp = np.stack([columns, rows, columns * 0], axis=-1)[None] / 100
    generator = np.random.Generator(np.random.PCG64(3))
    found = blurs.elastic_transform(ramp, (0, 0, 0.08), [np.random.Generator(np.random.PCG64(3))])[0] * 100
    moves = generator.uniform(-1, 1, (3, 2)) * 0.08 * size
    for point, move in zip(24 + 16 * np.array([[1, 1], [1, -1], [-1, -1]]), moves, strict=True):
        x, y = point + move
        at = [ndimage.map_coordinates(found[..., k], [[y], [x]], order=1) for k in (0, 1)]
        assert np.allclose(np.ravel(at), point, atol=0.05)


def test_fog_is_a_field_from_0_to_1_and_darkens_what_it_covers():
    fields = weather.plasma(32, 2.0, np.random.default_rng(0).uniform(-1, 1, (2, 32 * 32)))
    assert fields.min(axis=(1, 2)).tolist() == [0, 0]
    assert fields.max(axis=(1, 2)).tolist() == [1, 1]
    rough, smooth = (
        np.abs(np.diff(weather.plasma(32, decay, np.random.default_rng(0).uniform(-1, 1, (1, 1024))))).mean()
        for decay in (1.4, 3.0)
    )
    assert rough > 2 * smooth
    found = one(plain((200, 100, 0)), "fog", 1)[0]
    assert found[..., 0].max() <= 200  # (x + 1.5 f) m / (m + 1.5), where m is the brightest value
    least = np.array([200, 100, 0]) / 255 * (200 / 255) / (200 / 255 + 1.5) * 255
    assert np.all(found.min(axis=(0, 1)) >= np.floor(least))
    assert np.array_equal(found[..., 0] - found[..., 2], np.full((64, 64), found[0, 0, 0] - found[0, 0, 2])) or (
        np.ptp(found[..., 0] - found[..., 2]) <= 1
    )


def test_plasma_is_the_mean_of_its_neighbours_and_noise():
    noise = np.zeros((1, 16))
    noise[0, 0] = 1  # the middle of the whole; all after it are means
    field = weather.plasma(4, 2.0, noise)[0]
    assert field[2, 2] == 1
    assert field[0, 0] == 0
    assert field[0, 2] == field[2, 0] == 0.5  # (1 + 1 + 0 + 0) / 4: it goes on at the other side
    assert field[1, 1] == 0.5  # (0 + 0.5 + 0.5 + 1) / 4


def test_frost_is_a_share_of_the_picture_and_of_a_texture_of_its_own():
    for which, (means, spreads, *_) in enumerate(weather.FROST):
        texture = weather.frost_texture(which)
        assert texture.mean(axis=(0, 1)) == pytest.approx(means, abs=1.5)
        assert texture.std(axis=(0, 1)) == pytest.approx(spreads, rel=0.1)
    black, grey = one(plain((0, 0, 0)), "frost", 2), one(plain((100, 100, 100)), "frost", 2)
    assert np.abs(np.minimum(black + 80, 255) - grey).max() <= 1  # 0.8 of the picture, 0.6 of the texture


def test_snow_fades_colours_and_falls_both_ways():
    white = one(plain((0, 0, 0)), "snow", 1)[0]
    assert np.array_equal(white, white[::-1, ::-1])  # the layer and the layer turned by half
    assert white.min() == 25  # 0.2 * 0.5 where none falls
    assert white.max() > 60


def test_spatter_is_water_and_at_high_severities_mud():
    found = one(plain((100, 100, 100), 96, 96), "spatter", 5)[0]
    mud = found[np.abs(found - 100).sum(axis=-1) > 100]
    assert len(mud)
    assert np.all(mud.min(axis=0) == [63, 42, 20])
    water = one(plain((20, 20, 20), 96, 96), "spatter", 3)[0] - 20
    assert water.max() == pytest.approx(238 * 0.5, abs=1)  # its strength, where it shines most
    wet = water[water[..., 1] > 50]
    assert wet[:, 0] / wet[:, 1] == pytest.approx(175 / 238, abs=0.03)


def test_edges_are_cannys():
    square = np.zeros((2, 20, 24), dtype=np.uint8)
    square[0, 6:14, 5:18] = 200
    edges = weather._edges(square, 50, 150)
    assert not edges[1].any()
    assert np.flatnonzero(edges[0, 10]).tolist() == [4, 17]  # the first of the two steep pixels at each side
    assert np.flatnonzero(edges[0, :, 10]).tolist() == [5, 13]
    faint = np.zeros((1, 20, 24), dtype=np.uint8)
    faint[0, :, 12:] = 25  # a gradient of 100: between the two bounds, and no strong edge to join
    assert not weather._edges(faint, 50, 150).any()
    faint[0, :10, 12:] = np.arange(65, 25, -4)[:, None]  # strong at the top, to which the faint part is joined
    assert weather._edges(faint, 50, 150)[0].any(axis=1).all()


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(list(CORRUPTIONS)),
    severity=st.integers(1, 5),
    height=st.integers(16, 70),
    width=st.integers(16, 70),
    seed=st.integers(0, 2**63 - 1),
    grey=st.booleans(),
)
def test_any_size_any_seed_and_grey_pictures(name, severity, height, width, seed, grey):
    given = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    if grey:
        given = np.repeat(given[..., :1], 3, axis=3)
    found = corrupt(given, name, severity, seeds=[seed, 1])
    assert (found.dtype, found.shape) == (np.uint8, given.shape)
    assert np.array_equal(corrupt(given[:1], name, severity, seeds=np.array([seed])), found[:1])


FLAT = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "elastic_transform", "contrast")


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from([*FLAT, "pixelate"]),
    severity=st.integers(1, 5),
    size=st.sampled_from([(16, 16), (31, 40), (66, 64)]),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
)
def test_what_has_one_colour_keeps_it(name, severity, size, colour):
    given = plain(colour, *size)
    assert np.array_equal(one(given, name, severity), given)


# ---- names and seeds -------------------------------------------------------------------------------------------------


def test_what_there_is_not_is_refused_with_what_there_is():
    with pytest.raises(UnknownNameError, match=r"unknown corruption 'smoke' \(there are gaussian_noise, .*saturate\)"):
        parse_corruption("smoke:3")
    for text in ("fog", "fog:0", "fog:6", "fog:x", "fog:3.5", "fog:"):
        with pytest.raises(QuantlensError, match="must be 1, 2, 3, 4 or 5; write fog:3"):
            parse_corruption(text)
    assert parse_corruption("fog:5") == ("fog", 5)
    given = GIVEN[SIZES[0]]
    for wrong, said in (
        (given.astype(float), "give uint8"),
        (given[0], r"give uint8 \[B, H, W, 3\]"),
        (given[:, :15], "pictures of 15 pixels; corruptions need at least 16"),
    ):
        with pytest.raises(QuantlensError, match=said):
            corrupt(wrong, "fog", 1, seeds=[0] * len(wrong))
    for seeds in (0, [1, 2], [0.5] * 3):
        with pytest.raises(QuantlensError, match="one whole number as seed of each of the 3 pictures"):
            corrupt(given, "fog", 1, seeds=seeds)


def test_a_pictures_seed_is_its_content_and_the_seed():
    given = GIVEN[SIZES[0]]
    seeds = picture_seeds(given)
    assert len(set(seeds)) == 3
    assert np.array_equal(picture_seeds(given[::-1]), seeds[::-1])
    assert not set(picture_seeds(given, 1)) & set(seeds)
    other = given.copy()
    other[0, 0, 0, 0] ^= 1
    assert (picture_seeds(other) != seeds).tolist() == [True, False, False]
    assert picture_seeds(given.swapaxes(1, 2).reshape(given.shape))[0] != seeds[0]


def test_bytes_are_cut_off_but_not_below_a_whole_number():
    values = np.array([100 / 255 - 1e-16, 0.3 + 0.1, 100.9 / 255, 1.5, -1])
    assert light.to_bytes(values).tolist() == [100, 102, 100, 255, 0]
