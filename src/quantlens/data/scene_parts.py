"""What scenes are put together from: photographs and textures to stand behind, digits and letters to find.

Everything is bytes made by integer arithmetic, so that it is the same on every processor. Photographs come in halves:
the left one for training, the right one for testing; textures of the two splits come from different seeds.
"""

from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from quantlens.data.embedded import SPLIT_SEED, load_embedded
from quantlens.files import package_file

PHOTOS = ("china", "flower")
TEXTURE_SIDE = 192
TEXTURES = {"train": 48, "test": 24}
LEVELS = 3  # of a photograph or texture, each half as large as the one before
GLYPH = 64  # side of the largest level of a glyph; then 32, 16 and 8
GLYPHS = {"train": ("digits-train",), "test": ("digits-test",), "unknown": ("digits-held-out", "letters")}
DARKEST, BRIGHTEST = 70, 190  # grey levels of an enlarged digit that are no stroke at all, and wholly stroke


@dataclass(frozen=True)
class Parts:
    """Pictures behind (`behind`: bytes [M,3]; `places`: offset, width, height [sources, LEVELS, 3]; the first `photos`
    sources are photographs) and glyphs (`strokes`: opacity [G, all levels], each level with a border of zeros;
    `classes` [G], -1 for what is unknown).
    """

    behind: Tensor
    places: Tensor
    photos: int
    strokes: Tensor
    classes: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved = (value.to(device) if isinstance(value, Tensor) else value for value in vars(self).values())
        return type(self)(*moved)


def level_offsets() -> list[int]:
    """Where each level of a glyph begins in its row of `Parts.strokes`, and the row's length."""
    sides = [(GLYPH >> level) + 2 for level in range(4)]
    return [0, *np.cumsum([side * side for side in sides]).tolist()]


@cache
def parts(split: str) -> Parts:
    """The parts of "train", "test", or "unknown" (what stands behind "test", with digits and letters of no class)."""
    half = "train" if split == "train" else "test"
    pictures = [_photo(name, half) for name in PHOTOS] + _textures(half)
    pixels: list[np.ndarray] = []
    places = np.zeros((len(pictures), LEVELS, 3), np.int32)
    start = 0
    for source, picture in enumerate(pictures):
        for level in range(LEVELS):
            height, width, _ = picture.shape
            places[source, level] = start, width, height
            pixels.append(picture.reshape(-1, 3).astype(np.uint8))
            start += height * width
            picture = _halved(picture)
    sets = [load_embedded(name) for name in GLYPHS[split]]
    glyphs = np.concatenate([_strokes(s.pixels[..., 0]) for s in sets])
    classes = torch.full((len(glyphs),), -1) if split == "unknown" else torch.from_numpy(np.array(sets[0].labels))
    behind = torch.from_numpy(np.concatenate(pixels))
    return Parts(behind, torch.from_numpy(places), len(PHOTOS), torch.from_numpy(glyphs), classes)


def _photo(name: str, half: str) -> np.ndarray:
    with Image.open(package_file("sklearn", f"datasets/images/{name}.jpg")) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(np.int64)
    middle = pixels.shape[1] // 2
    return pixels[:, :middle] if half == "train" else pixels[:, middle:]


def _halved(pixels: np.ndarray) -> np.ndarray:
    """[H,W,...] -> [H//2,W//2,...]: rounded means of 2x2 pixels."""
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    even = pixels[:height, :width]
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2] + 2) >> 2


def _strokes(grey: np.ndarray) -> np.ndarray:
    """Glyphs, uint8 [G,32,32], white on black -> opacity of the stroke at all levels, uint8 [G, ...]."""
    large = [np.asarray(Image.fromarray(g).resize((GLYPH, GLYPH), Image.Resampling.BICUBIC)) for g in grey]
    opacity = (np.stack(large).astype(np.int64) - DARKEST) * 255 // (BRIGHTEST - DARKEST)
    level = opacity.clip(0, 255).transpose(1, 2, 0)
    rows = []
    for _ in range(4):
        rows.append(np.pad(level, ((1, 1), (1, 1), (0, 0))).reshape(-1, len(grey)))
        level = _halved(level)
    return np.ascontiguousarray(np.concatenate(rows).T.astype(np.uint8))


def _textures(half: str) -> list[np.ndarray]:
    """Clouds of several grains between two or three colours; stripes and checks; some with lines and shapes on them."""
    rng = np.random.RandomState(SPLIT_SEED + {"train": 3, "test": 4}[half])  # a stream that NumPy has frozen
    return [_texture(rng, kind % 4) for kind in range(TEXTURES[half])]


def _texture(rng: np.random.RandomState, kind: int) -> np.ndarray:
    side = TEXTURE_SIDE
    weight = _clouds(rng)
    if kind == 1:  # stripes, bent by the clouds
        across, down = rng.randint(-12, 13, size=2)
        y, x = np.mgrid[:side, :side]
        phase = (across * x + down * y + (weight >> 2)) & 127
        weight = np.minimum(phase, 127 - phase) * 4
    elif kind == 2:  # checks
        y, x = np.mgrid[:side, :side] // int(rng.randint(6, 40))
        weight = ((x + y) % 2) * 160 + weight * 95 // 255
    low, high = rng.randint(0, 256, size=(2, 3))
    pixels = low + (high - low) * weight[..., None] // 255
    if kind == 3:
        pixels = _cluttered(rng, pixels.clip(0, 255).astype(np.uint8))
    return pixels.clip(0, 255).astype(np.int64)


def _clouds(rng: np.random.RandomState) -> np.ndarray:
    """Smooth noise of three grains, int [side, side] of 0..255."""
    total = np.zeros((TEXTURE_SIDE, TEXTURE_SIDE), np.int64)
    for share, cells in ((2, rng.randint(2, 7)), (1, rng.randint(8, 24)), (1, rng.randint(24, 97))):
        coarse = Image.fromarray(rng.randint(0, 256, size=(cells, cells)).astype(np.uint8))
        total += share * np.asarray(coarse.resize((TEXTURE_SIDE,) * 2, Image.Resampling.BICUBIC)).astype(np.int64)
    return total // 4


def _cluttered(rng: np.random.RandomState, pixels: np.ndarray) -> np.ndarray:
    """With straight lines, frames and discs of any colour."""
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for _ in range(24):
        colour = tuple(int(c) for c in rng.randint(0, 256, size=3))
        x, y, dx, dy = (int(v) for v in rng.randint(0, TEXTURE_SIDE, size=4))
        shape, wide = int(rng.randint(3)), int(rng.randint(1, 6))
        if shape == 0:
            draw.line((x, y, dx, dy), colour, wide)
        elif shape == 1:
            draw.rectangle((x, y, x + dx // 4, y + dy // 4), None if wide > 3 else colour, colour, wide)
        else:
            draw.ellipse((x, y, x + dx // 5, y + dx // 5), colour if wide > 3 else None, colour, wide)
    return np.asarray(image)
