"""Pictures of maps, with Pillow and numpy alone: overlays, heat maps of token norms, and grids like Figure 2 of Kuang
and Wong (2026): rows of images or models, columns of precisions, each with its predicted label and probability.

Pixels are PIL images in RGB. Maps are float arrays [rows, columns] on the model's grid of patches; 0 to 1 is the range
of the colours, and what lies outside is cut off.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.files import write_whole

COLOURS = {
    "inferno": "000004 210c4a 56106e 89226a bb3754 e35932 f98c0a f9c932 fcffa4",
    "viridis": "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725",
}
"""Nine points of each scale; lightness rises evenly along both (van der Walt and Smith, 2015), so that equal steps of a
value are equal steps to the eye, also without colour."""

OPACITY = 0.6
INK, MUTED, PAPER = (28, 33, 38), (90, 100, 110), (255, 255, 255)


def coloured(values: np.ndarray, scale: str = "inferno") -> np.ndarray:
    """Values [...] from 0 to 1 as colours, uint8 [..., 3]."""
    if scale not in COLOURS:
        raise UnknownNameError("colour scale", scale, COLOURS)
    points = np.array([list(bytes.fromhex(c)) for c in COLOURS[scale].split()], dtype=np.float32)
    at = np.linspace(0, 1, len(points))
    clipped = np.clip(np.nan_to_num(np.asarray(values, dtype=np.float32)), 0, 1)
    return np.stack([np.interp(clipped, at, points[:, k]) for k in range(3)], axis=-1).round().astype(np.uint8)


def picture(pixels: Any, preprocess: Any = None) -> Image.Image:
    """An image of a set as a PIL image: uint8 [3, H, W], or float values that ``preprocess`` (mean, std) normalised;
    floats of unknown origin are stretched to their own range."""
    array = np.asarray(pixels)
    if array.dtype != np.uint8:
        if preprocess is not None:
            array = array * np.reshape(preprocess.std, (3, 1, 1)) + np.reshape(preprocess.mean, (3, 1, 1))
        else:
            array = (array - array.min()) / max(float(array.max() - array.min()), 1e-12)
        array = (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map [rows, columns] at (width, height) pixels, bilinear: float32 [height, width]."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def overlay(image: Image.Image, values: np.ndarray, *, opacity: float = OPACITY, scale: str = "inferno") -> Image.Image:
    """A map laid over the image it belongs to; opacity 0 shows the image alone, 1 the map alone."""
    if not 0 <= opacity <= 1:
        raise QuantlensError(f"opacity {opacity}: give a number from 0 to 1")
    colours = coloured(enlarged(values, image.size), scale).astype(np.float32)
    mixed = (1 - opacity) * np.asarray(image.convert("RGB"), dtype=np.float32) + opacity * colours
    return Image.fromarray(mixed.round().astype(np.uint8))


def heat(values: np.ndarray, size: tuple[int, int] | None = None, *, scale: str = "viridis") -> Image.Image:
    """A map [rows, columns] from 0 to 1 as coloured squares, one per patch; without a size one pixel per patch."""
    image = Image.fromarray(coloured(values, scale))
    return image if size is None else image.resize(size, Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Cell:
    """A picture of a grid and the lines under it: the label, then its probability."""

    image: Image.Image
    lines: tuple[str, ...] = ()
    marked: bool = False
    """Whether the first line is set in colour (the prediction is another than at FP32)."""


def grid(
    rows: Sequence[Sequence[Cell | None]],
    row_titles: Sequence[str],
    column_titles: Sequence[str],
    *,
    title: str = "",
    note: str = "",
    side: int = 160,
) -> Image.Image:
    """Pictures in rows and columns with titles. Titles and lines that are too long for their place end in "…".

    rows: cells; None leaves a place empty. side: width and height of a picture in pixels.
    Raises QuantlensError where rows and titles do not match.
    """
    if len(rows) != len(row_titles) or any(len(row) != len(column_titles) for row in rows) or not rows:
        raise QuantlensError("a grid of pictures takes one title per row, one per column, and at least one row")
    size = max(11, side // 11)
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(10, size - 1))
    line, gap = size + 4, max(6, side // 20)
    words = [_wrapped(text, font, int(side * 1.1)) for text in row_titles]
    left = gap + max(int(font.getlength(w)) for lines in words for w in lines) + gap
    count = max((len(c.lines) for row in rows for c in row if c is not None), default=0)
    top = gap + (line + gap // 2 if title else 0) + line + gap // 2
    high = side + count * line + gap
    width, height = left + len(column_titles) * (side + gap), top + len(rows) * high + (line if note else 0) + gap // 2
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, gap), _fitted(title, font, width - 2 * gap), INK, font)
    for k, text in enumerate(column_titles):
        centre = left + k * (side + gap) + side // 2
        draw.text((centre, top - line - gap // 4), _fitted(text, font, side + gap), INK, font, anchor="ma")
    for r, (cells, lines) in enumerate(zip(rows, words, strict=True)):
        y = top + r * high
        for i, text in enumerate(lines):
            draw.text((gap, y + side // 2 - len(lines) * line // 2 + i * line), text, INK, font)
        for k, cell in enumerate(cells):
            if cell is None:
                continue
            x = left + k * (side + gap)
            shown = cell.image
            if shown.size != (side, side):
                nearest = max(shown.size) < 40
                how = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
                shown = shown.resize((side, side), how)
            canvas.paste(shown, (x, y))
            for i, text in enumerate(cell.lines):
                ink = (162, 59, 0) if cell.marked and i == 0 else INK if i == 0 else MUTED
                at = (x + side // 2, y + side + 3 + i * line)
                draw.text(at, _fitted(text, small, side + gap - 2), ink, small, anchor="ma")
    if note:
        draw.text((gap, height - line - gap // 2), _fitted(note, small, width - 2 * gap), MUTED, small)
    return canvas


def _fitted(text: str, font: Any, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrapped(text: str, font: Any, room: int) -> list[str]:
    """Words on at most four lines."""
    lines: list[str] = []
    for word in text.replace("_", "_\u200b").replace("\u200b", " \u200b").split(" "):
        glued = word.startswith("\u200b")
        word = word.lstrip("\u200b")
        joined = (lines[-1] + ("" if glued else " ") + word) if lines else word
        if lines and font.getlength(joined) <= room:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > 4:
        lines = [*lines[:3], lines[3] + "…"]
    return [_fitted(one, font, room) for one in lines]


def save(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a .png or .webp file, whole or not at all. Raises StorageError where it cannot be written."""
    path = Path(path)
    kinds = {".png": "PNG", ".webp": "WEBP"}
    if path.suffix.lower() not in kinds:
        raise UnknownNameError("ending of a picture", path.suffix, kinds)
    options: dict[str, Any] = {"optimize": True} if path.suffix.lower() == ".png" else {"quality": 85}
    buffer = io.BytesIO()
    image.save(buffer, kinds[path.suffix.lower()], **options)
    write_whole(path, buffer.getvalue(), what="the picture")
    return path


def webp(image: Image.Image, *, quality: int = 70, lossless: bool = False) -> str:
    """The image as base64 text of a WebP file, for JSON and data URIs."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=lossless, method=4)
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


def thumbnail(image: Image.Image, side: int = 96) -> Image.Image:
    """The image at no more than ``side`` pixels."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small
