"""The image sets that ship with the package: real images, reached without a network.

Nothing is stored here as a file. The digits and the two photographs come with scikit-learn (a dependency),
the letters are drawn with the font that comes with Pillow. Every set is deterministic and is identified by a
hash of its pixels.

In distribution: eight of the ten digits of scikit-learn's ``load_digits`` (the test part of the UCI *Optical
Recognition of Handwritten Digits* data, E. Alpaydin and C. Kaynak, 1998: 1797 digits by 13 writers, scanned
at 32x32, counted in 4x4 blocks to 8x8 values 0..16), put back to 32x32 by bicubic interpolation. The images
of these eight are split once, by class and with a fixed seed, into test (50 a class), calibration (32 a
class) and fit (the rest); train = calibration + fit.

Near OOD: the two digits no model of the zoo has seen. Far OOD: patches of the two sample photographs (in
grey, so that colour alone does not give them away), and letters that went through the digits' own 32x32 ->
8x8 -> 32x32 pipeline.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from quantlens.boxes import Boxes
from quantlens.data.sources import ArraySource, SourceSpec
from quantlens.errors import UnknownNameError
from quantlens.files import package_file

SIZE = 32  # side of every embedded image, in pixels
HELD_OUT_DIGITS = (8, 9)
ID_DIGITS = tuple(d for d in range(10) if d not in HELD_OUT_DIGITS)
TEST_PER_CLASS = 50
CALIBRATION_PER_CLASS = 32
SPLIT_SEED = 20260

# Capitals made of straight strokes. Left out because at this resolution they read as a digit: A (4), B (8), C
# D G O Q U (0, 6), I J L T (1), P (9), S (5), Y (7, 4), Z (2).
LETTERS = "EFHKMNRVWX"
LETTERS_PER_CLASS = 40
PATCHES_PER_PHOTO = 200
MIN_CONTRAST = 12.0  # grey levels
PATCH_SIDES = (32, 48, 64, 96, 128, 192, 256)  # sides of the square cut from the photograph, in pixels


Built = tuple[np.ndarray, list[str], np.ndarray | Boxes | None, list[str] | None]
"""Pixels, a name for each image, labels (or boxes), class names."""


@dataclass(frozen=True)
class EmbeddedInfo:
    """What one embedded set is. `group` is "id", "near" (near OOD) or "far" (far OOD)."""

    group: str
    description: str
    build: Callable[[], Built]


def available_embedded() -> dict[str, EmbeddedInfo]:
    """Name -> description of every embedded set. Reads no image."""
    return dict(_SETS)


@cache
def load_embedded(name: str) -> ArraySource:
    """Build the embedded set `name`; the arrays, uint8 [N,32,32,3], are shared between callers and read-only.

    Raises UnknownNameError for a name that is not in `available_embedded()`.
    """
    if name not in _SETS:
        raise UnknownNameError("embedded image set", name, _SETS, hint="`quantlens sources` lists them")
    pixels, names, labels, classes = _SETS[name].build()
    pixels.setflags(write=False)
    given = (f"embedded:{name}", "embedded", name, names)
    source = ArraySource(*given, class_names=classes, group=_SETS[name].group, pixels=pixels)
    if isinstance(labels, Boxes):
        source.boxes, source.sizes = labels, np.tile(pixels.shape[1:3], (len(pixels), 1))
    else:
        source.labels = labels
    return source


def open_embedded(spec: SourceSpec) -> ArraySource:
    """`embedded:NAME`: a set that ships with the package."""
    return replace(load_embedded(spec.path), spec=spec.text)


# --- handwritten digits ---


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1797 digits: pixels uint8 [1797,32,32,3] and the digit of each, int64 [1797], in the file's
    order.
    """
    table = np.loadtxt(package_file("sklearn", "datasets/data/digits.csv.gz"), delimiter=",", dtype=np.int64)
    counts = table[:, :64].reshape(-1, 8, 8)
    return np.stack([_enlarge(c) for c in counts]), table[:, 64]


def _enlarge(counts: np.ndarray) -> np.ndarray:
    """[8,8] block counts 0..16 -> uint8 [32,32,3], bicubic, white strokes on black."""
    grey = np.round(counts * (255 / 16)).astype(np.uint8)
    return _rgb(Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").convert("RGB"))


@cache
def _parts() -> dict[str, np.ndarray]:
    """Row numbers of each part in `_digits()`, ascending. Split by class with a fixed seed; parts are
    disjoint.
    """
    _, digit = _digits()
    rng = np.random.RandomState(SPLIT_SEED)  # its stream is frozen by NumPy, unlike that of default_rng
    ends = (TEST_PER_CLASS, TEST_PER_CLASS + CALIBRATION_PER_CLASS)
    split = [np.split(rng.permutation(np.flatnonzero(digit == d)), ends) for d in ID_DIGITS]
    names = ("test", "calibration", "fit")
    rows_of = {name: np.sort(np.concatenate(rows)) for name, rows in zip(names, zip(*split, strict=True), strict=True)}
    rows_of["train"] = np.sort(np.concatenate([rows_of["calibration"], rows_of["fit"]]))
    rows_of["held-out"] = np.flatnonzero(np.isin(digit, HELD_OUT_DIGITS))
    return rows_of


def _digit_part(part: str) -> Built:
    pixels, digit = _digits()
    rows = _parts()[part]
    names = [f"digits/{row:04d}-{digit[row]}" for row in rows]
    if part == "held-out":
        return pixels[rows], names, None, None
    labels = np.searchsorted(ID_DIGITS, digit[rows]).astype(np.int64)
    labels.setflags(write=False)
    return pixels[rows], names, labels, [str(d) for d in ID_DIGITS]


# --- far OOD ---


def _photo_patches() -> Built:
    """Square patches of seven scales at random places of china.jpg and flower.jpg, in grey, bicubic to 32x32.

    Empty sky and blurred background (standard deviation of grey below `MIN_CONTRAST`) are passed over.
    """
    rng = np.random.RandomState(SPLIT_SEED + 1)
    pixels: list[np.ndarray] = []
    names: list[str] = []
    for photo in ("china", "flower"):
        with Image.open(package_file("sklearn", f"datasets/images/{photo}.jpg")) as opened:
            image = opened.convert("L")
        wanted = len(pixels) + PATCHES_PER_PHOTO
        while len(pixels) < wanted:
            side = PATCH_SIDES[rng.randint(len(PATCH_SIDES))]
            left = rng.randint(image.width - side + 1)
            top = rng.randint(image.height - side + 1)
            box = (left, top, left + side, top + side)
            patch = _rgb(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))
            if patch.std() >= MIN_CONTRAST:
                pixels.append(patch)
                names.append(f"{photo}/{left}-{top}-{side}")
    return np.stack(pixels), names, None, None


def _letters() -> Built:
    """Capital letters with random slant, turn, width and stroke, brought to the digits' resolution (see
    `_letter_counts`).
    """
    rng = np.random.RandomState(SPLIT_SEED + 2)
    pixels, names = [], []
    for letter in LETTERS:
        for k in range(LETTERS_PER_CLASS):
            pixels.append(_enlarge(_letter_counts(letter, rng)))
            names.append(f"letters/{letter}-{k:02d}")
    return np.stack(pixels), names, None, None


def _letter_counts(letter: str, rng: np.random.RandomState) -> np.ndarray:
    """One letter as the digits are stored: int [8,8], 0..16.

    Drawn white on black at 128x128, slanted and turned; its bounding box is fitted to 32 rows and 16 to 28
    columns, as the digits' scans were; made black or white, and counted in 4x4 blocks.
    """
    canvas = 160
    font = ImageFont.load_default(size=96.0)
    image = Image.new("L", (canvas, canvas))
    stroke = int(rng.randint(2, 6))
    ImageDraw.Draw(image).text((canvas / 2, canvas / 2), letter, 255, font, anchor="mm", stroke_width=stroke)
    angle, slant = np.deg2rad(rng.uniform(-12, 12)), float(rng.uniform(-0.25, 0.25))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1.0, slant], [0.0, 1.0]])
    shift = canvas / 2 - matrix @ np.full(2, canvas / 2)
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    image = image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    image = image.crop(image.getbbox())
    width = int(np.clip(round(SIZE * image.width / image.height * rng.uniform(0.8, 1.0)), 16, 28))
    scan = np.zeros((SIZE, SIZE), dtype=bool)
    left = (SIZE - width) // 2 + int(rng.randint(-1, 2))
    scan[:, left : left + width] = np.asarray(image.resize((width, SIZE), Image.Resampling.BOX)) >= 128
    return scan.reshape(8, 4, 8, 4).sum(axis=(1, 3))


# --- scenes ---


def _scenes(split: str, n: int) -> Built:
    """Scenes of `data.scenes`, whose boxes are known."""
    from quantlens.data.scenes import CLASSES, scenes  # built on the digits above

    found = scenes(split, n)
    boxes = Boxes(found.image, found.boxes, found.labels, names=tuple(CLASSES), ids=ID_DIGITS)
    return found.pixels, [f"scenes/{split}-{k:04d}" for k in range(n)], boxes, CLASSES


_ID_WORDS = ", ".join(map(str, ID_DIGITS[:-1])) + f" and {ID_DIGITS[-1]}"
_HELD_OUT_WORDS = " and ".join(map(str, HELD_OUT_DIGITS))
_SETS = {
    "digits-test": EmbeddedInfo("id", f"handwritten digits {_ID_WORDS}, held-out images", partial(_digit_part, "test")),
    "digits-train": EmbeddedInfo(
        "id", "the same digits, the images digits-vit was trained on", partial(_digit_part, "train")
    ),
    "digits-calibration": EmbeddedInfo(
        "id", "a part of digits-train, for calibration", partial(_digit_part, "calibration")
    ),
    "digits-fit": EmbeddedInfo(
        "id", "the rest of digits-train, for statistics of OOD scores", partial(_digit_part, "fit")
    ),
    "digits-held-out": EmbeddedInfo(
        "near",
        f"handwritten digits {_HELD_OUT_WORDS}, never seen in training",
        partial(_digit_part, "held-out"),
    ),
    "photo-patches": EmbeddedInfo("far", "grey patches of scikit-learn's two photographs", _photo_patches),
    "letters": EmbeddedInfo("far", f"the letters {' '.join(LETTERS)}, drawn in the digits' style", _letters),
    "scenes": EmbeddedInfo(
        "id",
        "photographs and textures with one to five of these digits, and their boxes",
        partial(_scenes, "test", 512),
    ),
    "scenes-calibration": EmbeddedInfo(
        "id",
        "the same of what the detectors were trained on, for calibration",
        partial(_scenes, "train", 128),
    ),
    "scenes-unknown": EmbeddedInfo(
        "near",
        f"scenes of the digits {_HELD_OUT_WORDS} and of letters alone, without boxes",
        partial(_scenes, "unknown", 512),
    ),
}
