"""Pictures of maps, with Pillow and numpy alone: maps laid over their images, heat maps of token norms.

Pixels are PIL images in RGB. Maps are float arrays [rows, columns] on the model's grid of patches. A :class:`Scale`
says which values have which colours; all maps of a picture share one.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from quantlens.errors import QuantlensError

INFERNO = "000004 210c4a 56106e 89226a bb3754 e35932 f98c0a f9c932 fcffa4"
VIRIDIS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
"""Nine points of each scale; lightness rises evenly along both (van der Walt and Smith, 2015), so that equal steps of a
value are equal steps to the eye, also without colour."""

OPACITY = 0.6


@dataclass(frozen=True)
class Scale:
    """What the colours of all maps of a picture mean: values from ``low`` to ``high`` (log: in equal ratios), and what
    they are in words. Values outside get the colour of the end."""

    low: float = 0.0
    high: float = 1.0
    label: str = ""
    colours: str = INFERNO
    log: bool = False

    def position(self, values: Any) -> np.ndarray:
        """Values as places on the scale: 0 for ``low``, 1 for ``high``."""
        array, ends = np.asarray(values, dtype=np.float32), np.array([self.low, self.high], dtype=np.float32)
        if self.log:
            array, ends = np.log(np.maximum(array, self.low)), np.log(ends)
        return (array - ends[0]) / max(ends[1] - ends[0], 1e-9)


def coloured(places: np.ndarray, colours: str = INFERNO) -> np.ndarray:
    """Places on a scale [...], 0 to 1, as colours, uint8 [..., 3]."""
    points = np.array([list(bytes.fromhex(c)) for c in colours.split()], dtype=np.float32)
    at, clipped = np.linspace(0, 1, len(points)), np.clip(np.nan_to_num(places), 0, 1)
    return np.stack([np.interp(clipped, at, channel) for channel in points.T], axis=-1).round().astype(np.uint8)


def rollout_scale(maps: Iterable[np.ndarray]) -> Scale:
    """One scale for rollout maps, each divided by its mean (:func:`relative`): from 0 to their 99th percentile, at
    least 2."""
    values = _finite(np.concatenate([relative(m).ravel() for m in maps] or [np.ones(1)]))
    return Scale(0.0, max(2.0, round(float(np.quantile(values, 0.99)), 1)), "times the mean of the map")


def norm_scale(norms: np.ndarray) -> Scale:
    """One scale for norms of tokens, from the smallest to the largest; in equal ratios where they span a decade."""
    finite = _finite(norms)
    low, high = float(finite.min()), float(finite.max())
    return Scale(low, high, "norm of the token", VIRIDIS, 0 < 10 * low < high)


def _finite(values: np.ndarray) -> np.ndarray:
    found = values[np.isfinite(values)]
    return found if found.size else np.ones(1)


def relative(values: Any) -> np.ndarray:
    """A map divided by its mean, so that 1 is what an even map has everywhere; zeros stay zeros."""
    array = np.asarray(values, dtype=np.float32)
    return array / max(float(array.mean()), 1e-12)


def photograph(images: Any, position: int, preprocess: Any = None) -> Image.Image:
    """One image of a set. preprocess: whose normalisation is undone where the set itself has none; floats of unknown
    origin are stretched to their own range."""
    known = images.preprocess or preprocess
    if images.pixels is not None:
        pixels = images.pixels[position]
    else:
        values = images.values[position].numpy()
        if known is not None:
            values = values * np.reshape(known.std, (-1, 1, 1)) + np.reshape(known.mean, (-1, 1, 1))
        else:
            values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
        pixels = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    if len(pixels) != 3:  # a grey image, or the first of more channels
        pixels = np.repeat(pixels[:1], 3, axis=0)
    elif known is not None and known.channels == "bgr":
        pixels = pixels[::-1]
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def overlay(image: Image.Image, values: np.ndarray, scale: Scale) -> Image.Image:
    """A map laid over the image it belongs to, which loses its colours, so that every colour is one of the scale."""
    places = Image.fromarray(np.ascontiguousarray(scale.position(values), dtype=np.float32))
    colours = coloured(np.asarray(places.resize(image.size, Image.Resampling.BILINEAR)), scale.colours)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    return Image.fromarray(((1 - OPACITY) * grey + OPACITY * colours).round().astype(np.uint8))


def heat(values: np.ndarray, scale: Scale) -> Image.Image:
    """A map [rows, columns] as one coloured pixel per patch."""
    return Image.fromarray(coloured(scale.position(values), scale.colours))


def webp(image: Image.Image, **settings: Any) -> str:
    """The image as base64 text of a WebP file, for JSON and data URIs. settings: quality, or lossless."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=4, **settings)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_webp(text: str) -> Image.Image:
    """The inverse of :func:`webp`. Raises QuantlensError for text that holds no picture."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["WEBP"])
        if max(image.size) > 1024:
            raise ValueError("too large")
        return image.convert("RGB")
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise QuantlensError(f"a stored picture cannot be read ({error})") from None
