"""Images made by code."""

from __future__ import annotations

import numpy as np
import pytest

from quantlens.data import Preprocess, load_images, open_source
from quantlens.data.made import MADE, MEAN, VARIANCES
from quantlens.data.sources import MADE_IMAGES, open_calibration
from quantlens.errors import QuantlensError, UnknownNameError

SMALL = Preprocess(input_size=(3, 64, 64))


def pixels(spec: str, preprocess: Preprocess = SMALL) -> np.ndarray:
    found = load_images(open_source(spec), preprocess).pixels
    assert found is not None
    return found


def slope(images: np.ndarray) -> float:
    """Of the mean power of grey images over the frequency, both as logarithms, from 2 to 12 periods an image."""
    grey = images.mean(axis=1)
    window = np.hanning(grey.shape[1])
    power = (np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * np.outer(window, window))) ** 2).mean(0)
    periods = np.fft.fftfreq(grey.shape[1]) * grey.shape[1]
    radius = np.rint(np.hypot(periods[:, None], periods)).astype(int)
    rings = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    at = np.arange(2, 13)
    return float(np.polyfit(np.log(at), np.log(rings[at]), 1)[0])


@pytest.mark.parametrize("name", MADE)
def test_an_image_is_the_same_in_every_draw_and_no_other(name: str) -> None:
    first, again, other = (pixels(f"made:{name}?n=8&seed={seed}") for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert len({one.tobytes() for one in first}) == 8, "each of a draw is another image"
    assert len({one.tobytes() for one in [*first, *other]}) > 12, "and another draw has others"
    source = open_source(f"made:{name}?n=8&seed=0")
    assert np.array_equal(pixels(f"made:{name}[:40]")[17:20], pixels(f"made:{name}[17:20]"))
    assert source.fingerprint() == open_source(f"made:{name}?n=8&seed=0").fingerprint()
    assert source.fingerprint() != open_source(f"made:{name}?n=8&seed=1").fingerprint()
    assert source.identity() is None, "drawn anew, not kept on disk"


@pytest.mark.parametrize("name", MADE)
def test_images_have_the_statistics_of_photographs(name: str) -> None:
    images = pixels(f"made:{name}[:48]")
    assert images.std(axis=(1, 2, 3)).min() > 10, "none is one colour"
    assert -3.2 < slope(images) < -1.4, "the power of photographs falls as about the second power of the frequency"
    channels = images.transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert np.abs(channels.mean(axis=1) - MEAN).max() < 0.1
    values = np.linalg.eigvalsh(np.cov(channels))[::-1]  # what is cut off at black and white is lost
    assert (values < 1.2 * VARIANCES).all()
    assert (values > 0.2 * VARIANCES).all()
    assert np.corrcoef(channels)[0, 1] > 0.7, "channels are alike"


def test_noise_of_white_pixels_would_not_pass() -> None:
    white = np.random.RandomState(0).randint(0, 256, (16, 3, 64, 64))
    assert slope(white) > -0.5


@pytest.mark.parametrize("shape", [(3, 40, 56), (1, 28, 28), (3, 33, 33)])
def test_images_are_drawn_at_the_size_and_channels_of_a_model(shape: tuple[int, int, int]) -> None:
    preprocess = Preprocess(shape, mean=(0.5,) * shape[0], std=(0.5,) * shape[0], crop_mode="border", crop_pct=0.8)
    found = pixels("made:dead-leaves[:3]", preprocess)
    assert found.shape == (3, *shape)
    assert found.std(axis=(1, 2, 3)).min() > 5
    assert found[:, :, 0].std() > 5, "no border, nothing is resized"


def test_blue_comes_first_where_a_model_wants_it() -> None:
    red_first, blue_first = (pixels("made:noise[:2]", Preprocess((3, 16, 16), channels=c)) for c in ("rgb", "bgr"))
    assert np.array_equal(red_first[:, ::-1], blue_first)


def test_sources_of_made_images() -> None:
    assert open_source("made:noise").image(3).size == (256, 256)
    assert len(open_source("made:noise")) == 1024
    assert pixels("made:noise[:2]?corrupt=fog:3").std() > 0
    with pytest.raises(UnknownNameError, match="dead-leaves"):
        open_source("made:dead-leafs")
    with pytest.raises(QuantlensError, match="give it tensors"):
        pixels("made:noise[:1]", Preprocess((4, 16, 16), mean=(0.5,) * 4, std=(0.5,) * 4))


@pytest.mark.parametrize("text", [None, "none"])
def test_none_is_a_draw_of_made_images(text: str | None) -> None:
    found = open_calibration(text, seed=7)
    assert found.spec == f"{MADE_IMAGES}?n=32&seed=7"
    assert len(open_calibration(text, n=5)) == 5
