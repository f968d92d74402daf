"""Scenes: pictures of 96x96 with one to five handwritten digits on photographs and textures, and the digits' boxes.

Drawn whenever they are wanted, nothing is stored. The arithmetic is that of integers: the same seed gives the same
bytes on every processor. Classes are the eight digits that `embedded` calls in distribution; scenes of the split
"unknown" hold the other two and letters only, and have no box.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantlens.data.embedded import ID_DIGITS
from quantlens.data.scene_parts import GLYPH, Parts, level_offsets, parts

SIDE = 96  # of a scene, in pixels
MOST = 5  # digits in a scene
CLASSES = [str(digit) for digit in ID_DIGITS]
SPLITS = ("train", "test", "unknown")
UNIT = 16  # of positions and sizes: sixteenths of a pixel
HEIGHTS = tuple(round(UNIT * 10 * 6.4 ** (i / 63)) for i in range(64))  # 10 to 64 pixels, evenly on a log scale
STROKE = 64  # opacity, of 255, from which a pixel belongs to the box
OVERLAP = 8  # the largest overlap of two digits: the smaller one's area divided by this
TRIES = 12  # places tried for one digit before it is left out
PHOTO_SHARE = 5  # of 8 scenes stand on a photograph, the others on a texture
TOGETHER = 16  # scenes drawn at a time: fewer scenes are the first of more

Draw = Callable[..., Tensor]
"""`draw(low, high, *shape)`: whole numbers, low to high - 1."""


@dataclass(frozen=True)
class Scenes:
    """Pictures uint8 [N,96,96,3] and their boxes, one row per digit: number of the picture, x1, y1, x2, y2 in pixels
    (float64 [M,4]), and class (a place in `CLASSES`).
    """

    pixels: np.ndarray
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def scenes(split: str, n: int, seed: int = 0) -> Scenes:
    """`n` scenes of a split ("train", "test", "unknown"), the same on every machine."""
    found = []
    for block in range(-(-n // TOGETHER)):
        rng = np.random.RandomState([seed, block, SPLITS.index(split)])  # a stream that NumPy has frozen

        def draw(low: int, high: int, *shape: int, rng: np.random.RandomState = rng) -> Tensor:
            return torch.from_numpy(rng.randint(low, high, size=shape))

        found.append(compose(parts(split), draw, TOGETHER))
    pixels, boxes, labels = (torch.cat(tensors)[:n].numpy() for tensors in zip(*found, strict=True))
    image, slot = np.nonzero(labels >= 0)
    return Scenes(pixels, image, boxes[image, slot].astype(np.float64), labels[image, slot])


def compose(bank: Parts, draw64: Draw, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` scenes on the bank's device: pixels uint8 [B,96,96,3], boxes [B,MOST,4] (x1, y1, x2, y2), and labels
    [B,MOST], -1 where there is no digit or one of no class."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return draw64(low, high, *shape).int()  # which is wide enough, and half the memory

    glyph = draw(0, len(bank.classes), count, MOST)
    height = torch.tensor(HEIGHTS, device=bank.behind.device, dtype=torch.int)[draw(0, len(HEIGHTS), count, MOST)]
    width = height * draw(200, 300, count, MOST) // 256
    centre, there = _places(draw, width, height)
    opacity = _rendered(bank, draw, glyph, centre, width, height) * there[..., None, None]
    stroke = opacity >= STROKE
    there = there & stroke.flatten(2).any(-1)
    boxes = _boxes(stroke) * there[..., None]
    picture = _behind(bank, draw, count)
    for slot in range(MOST):
        picture = _painted(draw, picture, opacity[:, slot])
    grain = draw(0, 10, count, 1, 1, 1)
    picture = picture + ((draw(-64, 65, count, SIDE, SIDE, 3) * grain) >> 6)
    return picture.clamp(0, 255).to(torch.uint8), boxes, torch.where(there, bank.classes[glyph], -1)


def _places(draw: Draw, width: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [B,MOST,2] in units, and whether the digit is there: one to MOST are, as far as there is room."""
    count = len(width)
    half = torch.stack((width, height), -1) * 5 // 8  # slant makes it wider and higher
    room = SIDE * UNIT - 2 * half
    tried = half[:, :, None] + (draw(0, 1 << 16, count, MOST, TRIES, 2) * room[:, :, None] >> 16)
    area = 4 * half.prod(-1)
    there = draw(1, MOST + 1, count, 1) > torch.arange(MOST, device=width.device)
    centre, kept = tried[:, :, 0].clone(), there.clone()
    for slot in range(1, MOST):
        one, others = tried[:, slot, :, None], centre[:, None, :slot]
        reach = half[:, slot, None, None] + half[:, None, :slot]
        shared = torch.minimum(
            reach - (one - others).abs(), 2 * torch.minimum(half[:, slot, None], half[:, :slot])[:, None]
        )
        limit = torch.minimum(area[:, slot, None], area[:, :slot])[:, None] // OVERLAP
        free = ((shared.clamp(min=0).prod(-1) <= limit) | ~kept[:, None, :slot]).all(-1)
        best = free.int().argmax(-1)
        centre[:, slot] = tried[:, slot].gather(1, best[:, None, None].expand(-1, 1, 2))[:, 0]
        kept[:, slot] &= free.any(-1)
    return centre, kept


def _rendered(bank: Parts, draw: Draw, glyph: Tensor, centre: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Opacity int32 [B,MOST,96,96] of the glyphs, turned and slanted, each from the level next to its size."""
    level = sum((height < GLYPH * UNIT * 3 // 4 >> k).int() for k in range(3))
    side = GLYPH >> level
    along, down = (side * (256 * UNIT) // size for size in (width, height))  # source pixels in a pixel, of 256
    turn, slant = draw(-56, 57, *glyph.shape), draw(-56, 57, *glyph.shape)
    at = torch.arange(SIDE, device=glyph.device, dtype=torch.int) * UNIT + UNIT // 2
    x = (at - centre[..., :1])[:, :, None, :]
    y = (at - centre[..., 1:])[:, :, :, None]

    def wide(value: Tensor) -> Tensor:
        return value[..., None, None]

    middle = wide((side + 1) * 128)  # the first pixel of a level is its border
    u = ((wide(along) * x + wide(along * (turn + slant) >> 8) * y) >> 4) + middle
    v = ((wide(down) * y - wide(down * turn >> 8) * x) >> 4) + middle
    start = torch.tensor(level_offsets(), device=glyph.device, dtype=torch.int)
    first = glyph * start[-1] + start[level]
    values = bank.strokes.view(-1, 1)
    return _sampled(values, wide(first), wide(side + 2), wide(side + 2), u, v)[..., 0]


def _sampled(values: Tensor, start: Tensor, width: Tensor, height: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear, int32 [..., C]: of the pictures that begin in row `start` of `values` [M,C], at u, v in pixels/256."""
    u = torch.minimum(u.clamp(min=0), (width - 1) * 256 - 1)
    v = torch.minimum(v.clamp(min=0), (height - 1) * 256 - 1)
    right, low = (u & 255)[..., None], (v & 255)[..., None]
    corner = start + (v >> 8) * width + (u >> 8)
    above = values[corner] * (256 - right) + values[corner + 1] * right
    below = values[corner + width] * (256 - right) + values[corner + width + 1] * right
    return (above * (256 - low) + below * low + (1 << 15)) >> 16


def _boxes(stroke: Tensor) -> Tensor:
    """[B,MOST,96,96] -> the smallest boxes that hold the strokes, x1, y1, x2, y2, in pixels."""
    sides = []
    for dim in (-2, -1):
        any_of = stroke.any(dim).int()
        sides.append((any_of.argmax(-1), SIDE - any_of.flip(-1).argmax(-1)))
    (x1, x2), (y1, y2) = sides
    return torch.stack((x1, y1, x2, y2), -1)


def _behind(bank: Parts, draw: Draw, count: int) -> Tensor:
    """int32 [B,96,96,3]: a piece of a photograph or texture, of any scale, mirrored or not, of any contrast."""
    photo = draw(0, 8, count) < PHOTO_SHARE
    source = torch.where(photo, draw(0, bank.photos, count), draw(bank.photos, len(bank.places), count))
    largest = bank.places[source, 0, 1:].amin(-1) * 256 // (SIDE + 1)
    scale = torch.minimum(90 + (draw(0, 27, count) * draw(0, 27, count)), largest)  # source pixels in a pixel, of 256
    level = (scale >= 384).int() + (scale >= 768).int()
    start, width, height = bank.places[source, level].unbind(-1)
    scale = scale >> level
    at = torch.arange(SIDE, device=scale.device, dtype=torch.int)
    axes = []
    for length in (width, height):
        first = draw(0, 1 << 12, count) * (length * 256 - SIDE * scale).clamp(min=1) >> 12
        axes.append(first[:, None] + at * scale[:, None])
    x = torch.where(draw(0, 2, count, 1) > 0, axes[0].flip(-1), axes[0])
    y = torch.where(draw(0, 4, count, 1) > 2, axes[1].flip(-1), axes[1])

    def wide(value: Tensor) -> Tensor:
        return value[:, None, None]

    pixels = _sampled(bank.behind, wide(start), wide(width), wide(height), x[:, None, :], y[:, :, None])
    gain, shift = draw(110, 300, count, 1, 1, 1), draw(-40, 41, count, 1, 1, 1) + draw(-16, 17, count, 1, 1, 3)
    return (((pixels - 128) * gain >> 8) + 128 + shift).clamp(0, 255)


def _painted(draw: Draw, picture: Tensor, opacity: Tensor) -> Tensor:
    """With one glyph [B,96,96] in ink: darker or lighter than what is under it, grey or of some colour."""
    count = len(picture)
    weight = opacity[..., None]
    under = ((picture * weight).sum((1, 2)) // weight.sum((1, 2)).clamp(min=1)).int()
    light = (under[:, :1] + 2 * under[:, 1:2] + under[:, 2:]) >> 2
    strength = draw(60, 126, count, 1)
    sign = 1 - 2 * draw(0, 2, count, 1)
    sign = torch.where((light + sign * strength < 0) | (light + sign * strength > 255), -sign, sign)
    tint = draw(-60, 61, count, 3) * draw(0, 2, count, 1)
    tint = tint - tint.sum(-1, keepdim=True).int() // 3
    ink = (light + sign * strength + tint).clamp(0, 255)[:, None, None]
    covering = weight * draw(180, 257, count, 1, 1, 1) >> 8
    return picture + (((ink - picture) * covering + 128) >> 8)
