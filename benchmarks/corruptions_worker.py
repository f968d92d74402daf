"""Corrupts pictures by the package imagecorruptions, in a Python that has it (it needs opencv and scikit-image):

    python corruptions_worker.py IN.npz OUT.npz [MODULE_FILE]

IN: `pictures` uint8 [N, H, W, 3], `seeds` int64 [N], `cases` ("name severity"). OUT: one uint8 array per case. A
picture has the random numbers that it has in quantlens, so that pixels can be compared, not moments alone.
MODULE_FILE: code with the same functions, instead of the package.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import zlib
from typing import Any

import numpy as np
import scipy.ndimage
import skimage.filters
from PIL import Image


def prepare() -> None:
    """What the package was written for and newer versions of its dependencies no longer have."""
    sys.modules["scipy.ndimage.interpolation"] = scipy.ndimage
    fake: Any = types.ModuleType("numba")
    fake.njit = lambda *_, **__: lambda function: function  # so that its loops draw from numpy.random, which is ours
    sys.modules["numba"] = fake
    smooth = skimage.filters.gaussian

    def gaussian(image: np.ndarray, sigma: Any = 1, multichannel: bool | None = None, **given: Any) -> np.ndarray:
        if multichannel is not None:
            given["channel_axis"] = -1 if multichannel else None
        return smooth(image, sigma, **given)

    skimage.filters.gaussian = gaussian
    np.float_ = np.float64  # type: ignore[attr-defined]


class Draws:
    """numpy.random's old functions, drawing from the generator of a picture in the order in which quantlens does."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.generator = np.random.Generator(np.random.PCG64(0))
        self.places: list[tuple[int, int]] = []

    def start(self, seed: int, name: str) -> None:
        bits = np.random.PCG64([int(seed) % 2**64, zlib.crc32(name.encode())])
        self.generator, self.places = np.random.Generator(bits), []

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Any = None) -> np.ndarray:
        return loc + scale * self.generator.standard_normal(size)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = None) -> Any:
        return self.generator.uniform(low, high, size)

    def poisson(self, lam: Any) -> np.ndarray:
        return self.generator.poisson(lam)

    def randint(self, low: int, high: int | None = None, size: Any = None) -> Any:
        if high is None:
            low, high = 0, low
        if size != (2,):
            return self.generator.integers(low, high, size)
        if not self.places:  # glass blur: one shift per pixel, from the last pixel to the first
            self.shifts = self.generator.integers(low, high, (2, *self.shape))
            height, width = (range(side - high, high, -1) for side in self.shape)
            self.places = [(h, w) for h in height for w in width][::-1]
        return self.shifts[(slice(None), *self.places.pop())]

    def default_rng(self, _: Any = None) -> np.random.Generator:
        return self.generator


def main(given: str, found: str, file: str | None = None) -> None:
    prepare()
    if file is None:
        import imagecorruptions.corruptions as module
    else:
        spec = importlib.util.spec_from_file_location("corruptions_given", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    data = np.load(given)
    draws = Draws(data["pictures"].shape[1:3])
    for name in ("normal", "uniform", "poisson", "randint", "default_rng"):
        setattr(np.random, name, getattr(draws, name))
    out = {}
    for case in data["cases"].tolist():
        name, severity = case.split()
        made = []
        for picture, seed in zip(data["pictures"], data["seeds"].tolist(), strict=True):
            draws.start(seed, name)
            one = np.asarray(getattr(module, name)(Image.fromarray(picture), int(severity)))
            made.append(np.rint(one) if name == "motion_blur" else one)  # as ImageMagick rounds
        out[case] = np.uint8(made)
    np.savez(found, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
