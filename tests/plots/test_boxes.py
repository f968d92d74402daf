"""Boxes drawn over pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

from quantlens.plots.boxes import draw_boxes

RED, BLUE = (200, 0, 0), (0, 0, 200)


def coloured(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[list[int], int]:
    """x1, y1, x2, y2 of what has exactly this colour, and how many pixels have it."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(-1))
    return [int(v) for v in (columns.min(), rows.min(), columns.max(), rows.max())], len(rows)


def test_boxes_lie_where_they_are_and_grow_with_the_picture() -> None:
    picture = Image.new("RGB", (120, 60), (120, 120, 120))
    before = picture.tobytes()
    for side, scale in ((None, 1), (480, 4)):
        drawn = draw_boxes(picture, [[20, 10, 80, 40]], [""], ["rgb(200,0,0)"], side=side)
        assert drawn.size == (120 * scale, 60 * scale)
        found, count = coloured(drawn, RED)
        assert np.abs(np.array(found) - scale * np.array([20, 10, 80, 40])).max() <= 2
        assert drawn.getpixel((50 * scale, 25 * scale)) == (120, 120, 120)  # an outline
        _, fewer = coloured(
            draw_boxes(picture, [[20, 10, 80, 40]], [""], ["rgb(200,0,0)"], dashed=True, side=side), RED
        )
        assert 0.3 * count < fewer < 0.8 * count
    assert picture.tobytes() == before


def test_the_first_is_on_top_and_what_is_outside_is_drawn_at_the_edge() -> None:
    picture = Image.new("L", (100, 100), 120)
    drawn = draw_boxes(picture, [[10, 30, 50, 60], [10, 30, 50, 60]], ["a", "b"], ["rgb(200,0,0)", "rgb(0,0,200)"])
    assert (np.asarray(drawn) == RED).all(-1).sum() > (np.asarray(drawn) == BLUE).all(-1).sum()
    drawn = draw_boxes(picture, [[-500, 80, 300, 500], [70, 9, 70, 9]], ["far out", "a point"])
    assert drawn.size == (100, 100)
    assert len(set(map(tuple, np.asarray(drawn).reshape(-1, 3)))) > 2
    assert draw_boxes(picture, np.empty((0, 4)), []).tobytes() == picture.convert("RGB").tobytes()


def test_a_class_has_its_colour() -> None:
    picture = Image.new("RGB", (300, 100), (250, 250, 250))
    boxes = [[10, 40, 50, 80], [110, 40, 150, 80], [210, 40, 250, 80]]
    pixels = np.asarray(draw_boxes(picture, boxes, ["cat 0.90", "dog 0.80", "cat 0.70"]))
    one, two, three = (pixels[60, x] for x in (10, 110, 210))
    assert one.tolist() == three.tolist() != two.tolist()
