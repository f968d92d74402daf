"""Pictures of maps, with Pillow and numpy alone: overlays, heat maps of token norms, and grids like Figure 2 of Kuang
and Wong (2026): rows of images or models, columns of precisions, each with its predicted label and probability.

Pixels are PIL images in RGB. Maps are float arrays [rows, columns] on the model's grid of patches. A :class:`Scale`
says which values have which colours; all maps of a picture share one, which a colour bar shows.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Sequence
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
INK, MUTED, PAPER, MARKED = (28, 33, 38), (90, 100, 110), (255, 255, 255), (162, 59, 0)


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


@dataclass(frozen=True)
class Scale:
    """What the colours of all maps of a picture mean: values from ``low`` to ``high`` (log: in equal ratios), and what
    they are in words. Values outside get the colour of the end."""

    low: float
    high: float
    label: str
    colours: str = "inferno"
    log: bool = False

    def position(self, values: Any) -> np.ndarray:
        """Values as places on the scale: 0 for ``low``, 1 for ``high``."""
        array = np.asarray(values, dtype=np.float32)
        low, high = self.low, self.high
        if self.log:
            array, low, high = np.log(np.maximum(array, low)), math.log(low), math.log(high)
        return (array - low) / max(high - low, 1e-9)

    def ticks(self) -> list[tuple[float, str]]:
        """(place from 0 to 1, number) of both ends and of round values between them; + says that the last colour
        is that of larger values, too."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            inner = [m * 10.0**p for p in powers for m in ((1, 2, 5) if self.high < 300 * self.low else (1,))]
        else:
            step = 10.0 ** math.floor(math.log10(max(self.high - self.low, 1e-9) / 2))
            step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= 5)
            inner = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        between = [(float(self.position(v)), f"{v:g}") for v in inner]
        inside = [(place, text) for place, text in between if 0.16 < place < 0.84]
        return [(0.0, _short(self.low)), *inside, (1.0, f"{_short(self.high)}+")]


def _short(value: float) -> str:
    """Three digits, never as a power of ten below a million."""
    return f"{float(f'{value:.3g}'):g}"


def rollout_scale(maps: Iterable[np.ndarray]) -> Scale:
    """One scale for rollout maps, each divided by its mean (:func:`relative`): from 0 to their 99th percentile, at
    least 2."""
    values = _finite(np.concatenate([relative(m).ravel() for m in maps] or [np.ones(1)]))
    return Scale(0.0, max(2.0, round(float(np.quantile(values, 0.99)), 1)), "times the mean of the map")


def relative(values: Any) -> np.ndarray:
    """A map divided by its mean, so that 1 is what an even map has everywhere; zeros stay zeros."""
    array = np.asarray(values, dtype=np.float32)
    return array / max(float(array.mean()), 1e-12)


def _finite(values: np.ndarray) -> np.ndarray:
    found = values[np.isfinite(values)]
    return found if found.size else np.ones(1)


def norm_scale(norms: np.ndarray) -> Scale:
    """One scale for norms of tokens, from the smallest to the largest; in equal ratios where they span a decade."""
    finite = _finite(norms)
    low, high = float(finite.min()), float(finite.max())
    return Scale(low, high, "norm of the token", "viridis", 0 < 10 * low < high)


def overlay(
    image: Image.Image, values: np.ndarray, *, opacity: float = OPACITY, scale: str | Scale = "inferno"
) -> Image.Image:
    """A map laid over the image it belongs to, which loses its colours, so that every colour is one of the scale.

    scale: the name of the colours of values from 0 to 1, or a :class:`Scale`. opacity: 0 shows the image alone, 1 the
    map alone.
    """
    if not 0 <= opacity <= 1:
        raise QuantlensError(f"opacity {opacity}: give a number from 0 to 1")
    scale = scale if isinstance(scale, Scale) else Scale(0.0, 1.0, "", scale)
    colours = coloured(enlarged(scale.position(values), image.size), scale.colours).astype(np.float32)
    mixed = (1 - opacity) * np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) + opacity * colours
    return Image.fromarray(mixed.round().astype(np.uint8))


def heat(values: np.ndarray, size: tuple[int, int] | None = None, *, scale: str | Scale = "viridis") -> Image.Image:
    """A map [rows, columns] as coloured squares, one per patch; without a size one pixel per patch. scale: as for
    :func:`overlay`."""
    scale = scale if isinstance(scale, Scale) else Scale(0.0, 1.0, "", scale)
    image = Image.fromarray(coloured(scale.position(values), scale.colours))
    return image if size is None else image.resize(size, Image.Resampling.NEAREST)


def colour_bar(scale: Scale, width: int = 200, height: int = 12) -> Image.Image:
    """The colours of a scale from its low end to its high end, without numbers."""
    return Image.fromarray(coloured(np.linspace(0, 1, width)[None].repeat(height, 0), scale.colours))


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
    scale: Scale | None = None,
    side: int = 160,
) -> Image.Image:
    """Pictures in rows and columns with titles. Titles and lines that are too long for their place end in "…".

    rows: cells; None leaves a place empty. scale: drawn as a colour bar below. note: below that, on as many lines as it
    takes. side: width and height of a picture in pixels.
    Raises QuantlensError where rows and titles do not match.
    """
    if len(rows) != len(row_titles) or any(len(row) != len(column_titles) for row in rows) or not rows:
        raise QuantlensError("a grid of pictures takes one title per row, one per column, and at least one row")
    count = max((len(c.lines) for row in rows for c in row if c is not None), default=0)
    sheet = _Sheet(side, row_titles, len(column_titles), count, title, note, scale)
    for k, text in enumerate(column_titles):
        sheet.column_title(k, text)
    for r, cells in enumerate(rows):
        sheet.row_title(r)
        for k, cell in enumerate(cells):
            if cell is not None:
                sheet.cell(r, k, cell)
    return sheet.canvas


class _Sheet:
    """The canvas of a grid: where everything stands."""

    def __init__(
        self, side: int, row_titles: Sequence[str], columns: int, lines: int, title: str, note: str, scale: Scale | None
    ):
        size = max(11, side // 11)
        self.font, self.small = ImageFont.load_default(size), ImageFont.load_default(max(10, size - 1))
        self.side, self.line, self.gap = side, size + 4, max(6, side // 20)
        self.words = [_wrapped(text, self.font, int(side * 1.1)) for text in row_titles]
        self.left = 2 * self.gap + max(int(self.font.getlength(w)) for lines_ in self.words for w in lines_)
        self.top = self.gap + (self.line + self.gap // 2 if title else 0) + self.line + self.gap // 2
        self.high = side + lines * self.line + self.gap
        width = self.left + columns * (side + self.gap)
        notes = _lines(note, self.small, width - 2 * self.gap)
        foot = self.top + len(row_titles) * self.high
        end = foot + (2 * self.line + self.gap if scale else 0)
        self.canvas = Image.new("RGB", (width, end + len(notes) * self.line + self.gap), PAPER)
        self.draw = ImageDraw.Draw(self.canvas)
        if title:
            self.draw.text((self.gap, self.gap), _fitted(title, self.font, width - 2 * self.gap), INK, self.font)
        if scale:
            self._bar(scale, foot, width)
        for i, text in enumerate(notes):
            self.draw.text((self.gap, end + i * self.line), text, MUTED, self.small)

    def column_title(self, k: int, text: str) -> None:
        centre = self.left + k * (self.side + self.gap) + self.side // 2
        words = _fitted(text, self.font, self.side + self.gap)
        self.draw.text((centre, self.top - self.line - self.gap // 4), words, INK, self.font, anchor="ma")

    def row_title(self, r: int) -> None:
        lines = self.words[r]
        y = self.top + r * self.high + self.side // 2 - len(lines) * self.line // 2
        for i, text in enumerate(lines):
            self.draw.text((self.gap, y + i * self.line), text, INK, self.font)

    def cell(self, r: int, k: int, cell: Cell) -> None:
        x, y = self.left + k * (self.side + self.gap), self.top + r * self.high
        shown = cell.image
        if shown.size != (self.side, self.side):
            how = Image.Resampling.NEAREST if max(shown.size) < 40 else Image.Resampling.LANCZOS
            shown = shown.resize((self.side, self.side), how)
        self.canvas.paste(shown, (x, y))
        for i, text in enumerate(cell.lines):
            ink = MARKED if cell.marked and i == 0 else INK if i == 0 else MUTED
            at = (x + self.side // 2, y + self.side + 3 + i * self.line)
            self.draw.text(at, _fitted(text, self.small, self.side + self.gap - 2), ink, self.small, anchor="ma")

    def _bar(self, scale: Scale, y: int, width: int) -> None:
        """The colour bar with its numbers below and its words to the right."""
        long = min(240, (width - 2 * self.gap) // 2)
        self.canvas.paste(colour_bar(scale, long, self.line - 4), (self.gap, y + 2))
        for place, text in scale.ticks():
            half = self.small.getlength(text) / 2
            x = min(max(self.gap + place * long, self.gap + half), self.gap + long - half)
            self.draw.text((x, y + self.line), text, MUTED, self.small, anchor="ma")
        room = width - long - 4 * self.gap
        self.draw.text((2 * self.gap + long, y), _fitted(scale.label, self.small, room), INK, self.small)


def _lines(text: str, font: Any, room: float) -> list[str]:
    """Words on as many lines as they take."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_fitted(one, font, room) for one in lines]


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
