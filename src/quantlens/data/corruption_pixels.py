"""Corruptions of single pixels: noise, light and colour, and what compression and scaling do.

Each function takes pictures (float64 [B, H, W, 3] in 0…1), the constants of a severity and a random generator per
picture, and returns pictures of the same kind, or uint8. The formulas are those of ImageNet-C (see `corruptions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

Generators = Sequence[np.random.Generator]


def drawn(generators: Generators, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
    """[B, …]: what every picture's own generator draws, so that it does not depend on the other pictures."""
    return np.stack([draw(generator) for generator in generators])


def to_bytes(x: np.ndarray) -> np.ndarray:
    """0…1 -> uint8 as ImageNet-C does it, by cutting off; a millionth is added for what is a whole number but for
    rounding, so that all processors agree."""
    return (np.clip(x, 0, 1) * 255 + 1e-6).astype(np.uint8)


def gaussian_noise(x: np.ndarray, scale: float, generators: Generators) -> np.ndarray:
    return x + scale * drawn(generators, lambda g: g.standard_normal(x.shape[1:]))


def shot_noise(x: np.ndarray, photons: float, generators: Generators) -> np.ndarray:
    return np.stack([g.poisson(one * photons) for one, g in zip(x, generators, strict=True)]) / photons


def impulse_noise(x: np.ndarray, amount: float, generators: Generators) -> np.ndarray:
    """Every value, of each channel for itself, becomes 0 or 1 with a probability."""
    hit, white = drawn(generators, lambda g: g.random((2, *x.shape[1:]))).swapaxes(0, 1)
    return np.where(hit <= amount, white <= 0.5, x)


def speckle_noise(x: np.ndarray, scale: float, generators: Generators) -> np.ndarray:
    return x + x * scale * drawn(generators, lambda g: g.standard_normal(x.shape[1:]))


def brightness(x: np.ndarray, more: float, generators: Generators) -> np.ndarray:
    """The value of HSV is raised; hue and saturation stay."""
    value = x.max(axis=-1, keepdims=True)
    raised = np.minimum(value + more, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def contrast(x: np.ndarray, factor: float, generators: Generators) -> np.ndarray:
    """About the mean of each channel."""
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * factor + means


def saturate(x: np.ndarray, c: tuple[float, float], generators: Generators) -> np.ndarray:
    """The saturation of HSV, times a factor and plus a number. Grey has hue 0, and turns red where that is above 0."""
    value, least = x.max(axis=-1, keepdims=True), x.min(axis=-1, keepdims=True)
    spread = value - least
    saturation = spread / np.where(value > 0, value, 1)
    new = np.clip(saturation * c[0] + c[1], 0, 1)
    missing = np.where(spread > 0, (value - x) / np.where(spread > 0, spread, 1), np.array([0.0, 1.0, 1.0]))
    return value * (1 - new * missing)


def _each(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """`change` of every picture, by Pillow."""
    pictures = np.rint(x * 255).astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])


def jpeg_compression(x: np.ndarray, quality: int, generators: Generators) -> np.ndarray:
    def change(picture: Image.Image) -> Image.Image:
        stream = BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _each(x, change)


def pixelate(x: np.ndarray, factor: float, generators: Generators) -> np.ndarray:
    """Made smaller, and large again, both by boxes."""
    height, width = x.shape[1:3]
    small = int(width * factor), int(height * factor)
    box: Any = Image.Resampling.BOX
    return _each(x, lambda picture: picture.resize(small, box).resize((width, height), box))
