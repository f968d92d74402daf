"""Images made by code, with statistics that photographs have: calibration for whoever has no images, `made:NAME`.

- `dead-leaves`: shapes of all sizes that hide each other, each with a colour, a texture and a light of its own. Sizes
  fall with the third power, so that the picture looks alike at every scale, and its edges are those of things (A. Lee,
  D. Mumford and J. Huang, "Occlusion Models for Natural Images", IJCV 2001).
- `noise`: a random field whose amplitudes fall as a power of the frequency, as those of photographs do, without edges
  (M. Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021, compares both).

Colours have the mean and covariance of ImageNet's pixels (as A. Krizhevsky et al., NeurIPS 2012, shift colours by);
a part of the variance lies between images. Image k of a set is the same in every run, drawn at the size that a model
wants.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from quantlens.data.preprocess import Preprocess
from quantlens.data.sources import FINGERPRINT_DIGITS, Source, SourceSpec, sha256_of
from quantlens.errors import UnknownNameError

IMAGES = 1024
"""Images of a set."""

SIDE = 256
"""Of an image that no model asks for, in pixels."""

VERSION = 1
"""Part of every fingerprint; raise it when pixels change."""

MEAN = np.array([0.485, 0.456, 0.406])
VARIANCES = np.array([0.2175, 0.0188, 0.0045])
DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
"""Of ImageNet's pixels in 0…1: mean, variances along the principal directions, and these, one a column."""

BETWEEN = 0.35
"""Share of the variance that is one between the means of images."""

COVERED = 6
"""Area of all leaves, in images: exp(-6) of the pixels see none."""

LEAST, LARGEST = 0.03, 0.6
"""Radii of leaves, in sides."""


def field_of(rng: np.random.RandomState, height: int, width: int, exponent: float) -> np.ndarray:
    """[H, W, 3]: three random fields of mean 0 and variance 1 whose amplitudes fall as frequency^-exponent."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    radius[0, 0] = np.inf
    real, imaginary = rng.standard_normal((2, 3, *radius.shape))
    found = np.fft.irfft2((real + 1j * imaginary) * radius**-exponent, s=(height, width)).transpose(1, 2, 0)
    found -= found.mean((0, 1))
    return found / found.std((0, 1))


def palette(rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """An image's mean colour [3], and what makes its colours of three normal numbers [3, 3], by a contrast of its
    own."""
    root = DIRECTIONS * np.sqrt(VARIANCES)
    mean = MEAN + np.sqrt(BETWEEN) * root @ rng.standard_normal(3)
    return mean, np.sqrt(1 - BETWEEN) * np.exp(rng.normal(0, 0.35)) * root


def noise(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Float [H, W, 3], about 0…1."""
    mean, root = palette(rng)
    return mean + field_of(rng, height, width, rng.uniform(0.9, 1.4)) @ root.T


def dead_leaves(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Float [H, W, 3], about 0…1."""
    mean, root = palette(rng)
    leaf, x, y, radius = _visible(rng, height, width)
    count, side = len(radius), (height, width)
    colour = mean + rng.standard_normal((count, 3)) @ root.T
    # a leaf's texture is a part of one field, at a place and with a contrast of its own
    texture = field_of(rng, height, width, rng.uniform(0.8, 1.3)) @ root.T
    strength = 0.35 * np.exp(rng.normal(0, 0.7, count))
    rows, columns = (
        (at + rng.randint(0, n, count)[leaf]) % n for at, n in zip(np.ogrid[:height, :width], side, strict=True)
    )
    slope = rng.normal(0, 0.25, (count, 2))[leaf]
    light = (
        slope[..., 0] * (np.arange(width) - x[leaf]) + slope[..., 1] * (np.arange(height)[:, None] - y[leaf])
    ) / radius[leaf]
    found = (colour[leaf] + strength[leaf][..., None] * texture[rows, columns]) * (1 + np.clip(light, -0.5, 0.5))[
        ..., None
    ]
    found = np.clip(found, 0, 1)
    for axis in (0, 1):  # a lens
        found = (np.roll(found, 1, axis) + 2 * found + np.roll(found, -1, axis)) / 4
    return found


def _visible(rng: np.random.RandomState, height: int, width: int) -> tuple[np.ndarray, ...]:
    """(int [H, W]: the topmost leaf at every pixel, and of every leaf x, y and radius in pixels)."""
    least, largest = LEAST * max(height, width), LARGEST * max(height, width)
    area = 2 * np.pi * np.log(largest / least) / (least**-2 - largest**-2)  # of a leaf, on average
    count = int(np.ceil(COVERED * height * width / area))
    radius = (least**-2 - rng.uniform(size=count) * (least**-2 - largest**-2)) ** -0.5  # density ~ radius^-3
    x, y = rng.uniform(-0.1, 1.1, (2, count)) * [[width], [height]]
    aspect, turn = np.exp(rng.normal(0, 0.2, count)), rng.uniform(0, np.pi, count)
    power = rng.choice([1.0, 2.0, 2.0, 8.0], count)  # diamonds, ellipses, boxes
    # every pixel of every leaf's square, leaf by leaf: of those written to one place the last one stays
    reach = np.ceil(1.42 * radius * np.maximum(aspect, 1 / aspect)).astype(np.int64)
    pixels = (2 * reach + 1) ** 2
    leaf = np.repeat(np.arange(count), pixels)
    row, column = np.divmod(np.arange(pixels.sum()) - np.repeat(pixels.cumsum() - pixels, pixels), 2 * reach[leaf] + 1)
    row, column = row - reach[leaf] + y.astype(np.int64)[leaf], column - reach[leaf] + x.astype(np.int64)[leaf]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    leaf, row, column = leaf[inside], row[inside], column[inside]
    right, down = column - x[leaf], row - y[leaf]
    cos, sin, wide, high = (v[leaf] for v in (np.cos(turn), np.sin(turn), radius * aspect, radius / aspect))
    along, across = np.abs(cos * right + sin * down) / wide, np.abs(cos * down - sin * right) / high
    inside = along ** power[leaf] + across ** power[leaf] < 1
    top = np.zeros((height, width), dtype=np.int64)
    top[row[inside], column[inside]] = leaf[inside]
    return top, x, y, radius


MADE: dict[str, Callable[[np.random.RandomState, int, int], np.ndarray]] = {"dead-leaves": dead_leaves, "noise": noise}
"""Name -> what draws an image: (generator, height, width) -> float [H, W, 3]."""


@dataclass(repr=False, eq=False)
class MadeSource(Source):
    """Images that are drawn when they are read; rows: int64 [N], their numbers."""

    rows: np.ndarray = field(kw_only=True)

    def drawn(self, index: int, height: int, width: int) -> Image.Image:
        """Image `index` at a size."""
        rng = np.random.RandomState(
            [list(MADE).index(self.name), int(self.rows[index])]
        )  # a stream that NumPy has frozen
        made = MADE[self.name](rng, height, width)
        return Image.fromarray(np.rint(np.clip(made, 0, 1) * 255).astype(np.uint8))

    def image(self, index: int) -> Image.Image:
        return self.drawn(index, SIDE, SIDE)

    def prepared(self, index: int, preprocess: Preprocess) -> np.ndarray:
        """Drawn at the model's size, so that nothing is resized."""
        return replace(preprocess, resize=()).resize_crop(self.drawn(index, *preprocess.input_size[1:]))

    def clean_fingerprint(self) -> str:
        """Hash of the names and of :data:`VERSION`."""
        return sha256_of([VERSION, *sorted(self.names)])[:FINGERPRINT_DIGITS]

    def identity(self) -> None:
        return None


def open_made(spec: SourceSpec) -> MadeSource:
    """`made:NAME`: images made by code. Raises UnknownNameError."""
    if spec.path not in MADE:
        raise UnknownNameError("set of made images", spec.path, MADE)
    names = [f"{spec.path}/{k:04d}" for k in range(IMAGES)]
    return MadeSource(spec.text, "made", spec.path, names, rows=np.arange(IMAGES))
