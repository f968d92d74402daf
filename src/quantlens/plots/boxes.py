"""Boxes drawn over a picture, with Pillow alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from quantlens.plots.style import COLOURS, INK, PAPER


def draw_boxes(
    picture: Image.Image,
    boxes: Any,
    texts: Sequence[str],
    colours: Sequence[str] | None = None,
    *,
    dashed: Any = False,
    side: int | None = None,
) -> Image.Image:
    """A copy of the picture with N boxes, those that come first on top.

    boxes [N, 4]: x1, y1, x2, y2 in pixels of the picture. texts [N]: what stands at each, may be empty. colours [N]: by
    default one for each text up to its first space. dashed [N]: which are drawn so. side: length of the longer side of
    the copy; None leaves the size.
    """
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if colours is None:
        kinds = list(dict.fromkeys(sorted(text.partition(" ")[0] for text in texts)))
        colours = [COLOURS[kinds.index(text.partition(" ")[0]) % len(COLOURS)] for text in texts]
    scale = 1.0 if side is None else side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    drawn = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pen, longest = ImageDraw.Draw(drawn), max(size)
    width, font = max(1, round(longest / 120)), ImageFont.load_default(max(10, longest // 17))
    lines = np.broadcast_to(dashed, len(corners))
    limits = np.array([*size, *size]) - 1
    for k in reversed(range(len(corners))):
        x1, y1, x2, y2 = np.clip(corners[k] * scale, 0, limits).round()
        box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        _outline(pen, box, colours[k], width, bool(lines[k]))
        if texts[k]:
            _label(pen, box, texts[k], colours[k], font, size)
    return drawn


def _outline(pen: Any, box: tuple[float, ...], colour: str, width: int, dashed: bool) -> None:
    """A rectangle of lines with a dark edge, so that it is seen on every ground."""
    x1, y1, x2, y2 = box
    step = 3 * width
    for ink, wide in ((INK, width + 2), (colour, width)):
        for start, end in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
            a, b = np.array(start), np.array(end)
            length = float(np.abs(b - a).sum())
            along = (b - a) / max(length, 1.0)
            for at in np.arange(0.0, max(length, 1.0), 2 * step) if dashed else (0.0,):
                to = a + along * (min(at + step, length) if dashed else length)
                pen.line([*(a + along * at), *to], fill=ink, width=wide)


def _label(pen: Any, box: tuple[float, ...], text: str, colour: str, font: Any, size: tuple[int, ...]) -> None:
    """A text over the box, or in it where there is no room over it."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    wide, high = right - left + 4, bottom - top + 4
    x = min(max(box[0], 0), max(size[0] - wide, 0))
    y = box[1] - high if box[1] >= high else min(box[1], size[1] - high)
    pen.rectangle((x, y, x + wide, y + high), fill=colour)
    red, green, blue = ImageColor.getrgb(colour)[:3]
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 150
    pen.text((x + 2 - left, y + 2 - top), text, fill=INK if light else PAPER, font=font)
