"""Where images come from: the SOURCE grammar, and the two kinds of source (files, arrays).

    KIND:PATH                    imagenet:DIR, images:DIR, parquet:FILE, hf:USER/SET …: `kinds.KINDS` lists them all
    KIND:PATH[a:b]               images a to b (b excluded) in sorted order, as in Python: ends may be open or negative
    KIND:PATH[a:b:s]             every s-th of them: [::2] and [1::2] are two halves that share no image
    KIND:PATH?n=200&seed=0       a random sample of 200 (seed 0 where none is given), from the slice if there is one
    KIND:PATH?corrupt=fog:3      every picture corrupted as in ImageNet-C, NAME:SEVERITY (`corruptions.CORRUPTIONS`)
    KIND:PATH?key=value          what a kind has keys for (`KINDS`): ?split=test&n=200
    KIND:PATH/                   a file or folder whose name ends like one of these: what stands before a slash is its
                                 name, images:im[0:4]/ and images:why?/[0:4]

Images are sorted by their path below DIR, compared character by character. A sample keeps the order in which
it was drawn, so that the sample of 32 images is the beginning of the sample of 64 with the same seed.
"""

import hashlib
import os
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image, UnidentifiedImageError

from quantlens.boxes import Boxes
from quantlens.data.corruptions import check_corruption, corrupted_fingerprint, parse_corruption
from quantlens.errors import BadImageError, QuantlensError, UnknownNameError

if TYPE_CHECKING:
    from quantlens.data.preprocess import Preprocess

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
FINGERPRINT_DIGITS = 16
CALIBRATION_IMAGES = 32
"""The usual number of calibration images."""
NO_IMAGES, MADE_IMAGES = "none", "made:dead-leaves"  # what is written where there are none, and the SOURCE taken then


@dataclass(frozen=True)
class SourceSpec:
    """A parsed SOURCE: `sample` images drawn with `seed` from a slice of `rows`, and options of the kind, from the
    text `query`. corruption: its name and severity."""

    text: str
    kind: str
    path: str
    rows: slice
    sample: int | None
    seed: int
    options: dict[str, str]
    query: str = ""
    corruption: tuple[str, int] | None = None


def parse_spec(text: str) -> SourceSpec:
    """Read `KIND:PATH[a:b]?n=200&seed=0`. Raises UnknownNameError (kind, query key) or QuantlensError (the rest)."""
    from quantlens.data.kinds import KINDS  # the kinds need the classes below

    kind, colon, rest = text.partition(":")
    if not colon:
        raise QuantlensError(
            f"source {text!r} has no kind; write KIND:PATH, for example images:{text or 'DIR'} or embedded:digits-test"
        )
    if kind not in KINDS:
        raise UnknownNameError("source kind", kind, KINDS, hint="a source is written KIND:PATH")
    path, question, query = rest.rpartition("?") if "?" in rest.rpartition("/")[2] else (rest, "", "")
    if "labels" in KINDS[kind].options and (named := re.search(r"\?(?:[^/?]*&)?labels=[^?]*$", rest)):
        path, question, query = rest[: named.start()], "?", rest[named.start() + 1 :]  # its value may hold slashes
    given = _query(text, query, KINDS[kind].options) if question else {}
    rows = slice(None)
    if (bracket := re.search(r"\[([^\[\]/\\]*)\]$", path)) and re.fullmatch(r"[-+\d:\s]*", bracket[1]):
        ends = re.fullmatch(r"\s*([-+]?\d+)?\s*:\s*([-+]?\d+)?\s*(?::\s*([1-9]\d*)?\s*)?", bracket[1])
        if ends is None:
            raise QuantlensError(
                f"source {text!r}: {bracket[0]} is not a slice; write [a:b] or [a:b:step], "
                "for example [0:400], [-100:] or [::2]"
            )
        rows = slice(*(int(end) if end else None for end in ends.groups()))
        path = path[: bracket.start()]
    if not path:
        raise QuantlensError(f"source {text!r} names no {KINDS[kind].what}; write {kind}:{KINDS[kind].what.upper()}")
    seed, sample, corrupt = int(given.pop("seed", "0")), given.pop("n", None), given.pop("corrupt", None)
    corruption = None if corrupt is None else parse_corruption(corrupt)
    return SourceSpec(text, kind, path, rows, None if sample is None else int(sample), seed, given, query, corruption)


def _query(text: str, query: str, options: Iterable[str]) -> dict[str, str]:
    """What stands behind the question mark, checked."""
    if (rows := re.search(r"\[[-+\d\s]*:[-+\d:\s]*\]$", query)) and not Path(query.partition("labels=")[2]).is_file():
        ordered = f"{text.partition('?')[0]}{rows[0]}?{query[: rows.start()]}".rstrip("?")
        raise QuantlensError(f"source {text!r} has its slice after the '?', and it goes before it: write {ordered!r}")
    pairs = parse_qsl(query, keep_blank_values=True)
    if not pairs:
        raise QuantlensError(f"source {text!r} ends in '?' without a query; write ?n=200&seed=0 or leave it out")
    given = dict(pairs)
    for key in given:
        if key not in (known := ("n", "seed", "corrupt", *options)):
            raise UnknownNameError(f"query key in source {text!r}:", key, known)
    if len(given) < len(pairs):
        raise QuantlensError(f"source {text!r} gives a key twice; give it once")
    for key, least in (("n", 1), ("seed", 0)):
        value = given.get(key, "1")
        if not re.fullmatch(r"\d+", value) or int(value) < least:
            raise QuantlensError(f"source {text!r}: {key}={value!r} must be a whole number, at least {least}")
    if "seed" in given and "n" not in given and "corrupt" not in given:
        raise QuantlensError(f"source {text!r} gives a seed but no number of images; write ?n=200&seed={given['seed']}")
    return given


def with_sample(text: str, n: int, seed: int) -> str:
    """The SOURCE of `n` images that `seed` draws from the SOURCE `text`, which must not draw a sample itself."""
    return _with(text, n=n, seed=seed)


def with_corruption(text: str, name: str, severity: int) -> str:
    """The SOURCE of the images of the SOURCE `text`, each corrupted. Raises QuantlensError where they are already, or
    there is no such corruption."""
    if parse_spec(text).corruption is not None:
        raise QuantlensError(f"source {text!r} is corrupted already; give the source of clean images")
    name, severity = check_corruption(name, severity)
    return _with(text, corrupt=f"{name}:{severity}")


def _with(text: str, **added: Any) -> str:
    """A SOURCE with these keys in its query, in place of what it has of them."""
    query = parse_spec(text).query
    kept = [part for part in query.split("&") if part and part.partition("=")[0] not in added]
    return f"{text.removesuffix(f'?{query}')}?{'&'.join([*kept, *(f'{key}={value}' for key, value in added.items())])}"


def open_calibration(text: str | None, n: int | None = None, seed: int = 0) -> "Source":
    """The calibration images of a SOURCE (:data:`MADE_IMAGES` for None and "none"): `n` that `seed` draws (by default
    32, or all where there are fewer), unless it draws a sample itself. Raises QuantlensError where both say how many
    and differ, and as :func:`open_source`."""
    text = MADE_IMAGES if text in (None, NO_IMAGES) else text
    sample = parse_spec(text).sample
    if sample is not None and n not in (None, sample):
        raise QuantlensError(f"--n {n} and {text!r} ask for different numbers of images; leave one of them out")
    source = open_source(text)
    if sample is None:
        n = min(CALIBRATION_IMAGES, len(source)) if n is None else n
        source = source.select(_drawn(text, np.arange(len(source)), n, seed))
        source.spec = with_sample(text, n, seed)
        source.corruption = source.corruption and (*source.corruption[:2], seed)
    return source


@dataclass(repr=False, eq=False)
class Source(ABC):
    """A list of images that can be read one by one.

    `spec` is the text it was opened from, `kind` and `name` are for people, `names` has one name per image,
    `labels` is int64 [N] or None, `class_names` is a list that `labels` index, or None. `group` is "id",
    "near" or "far" for embedded sets and None for the rest. `boxes` are those of objects, None where nothing is known
    of any; `sizes` int64 [N, 2], (height, width), of the pictures that they are of. Every array has one row per image.
    `corruption` is (name, severity, seed) of what `load_images` does to them, or None.
    """

    spec: str
    kind: str
    name: str
    names: list[str]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    group: str | None = None
    boxes: Boxes | None = field(default=None, kw_only=True)
    sizes: np.ndarray | None = field(default=None, kw_only=True)
    corruption: tuple[str, int, int] | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB, not corrupted. Raises BadImageError with the reason; `describe(index)` names it."""

    def prepared(self, index: int, preprocess: "Preprocess") -> np.ndarray:
        """Image `index` as a model gets it, uint8 [C, H, W]. Raises as :meth:`image`."""
        return preprocess.resize_crop(self.image(index))

    def fingerprint(self) -> str:
        """Short hash that changes when the images change, or what corrupts them."""
        return corrupted_fingerprint(self.clean_fingerprint(), self.corruption)

    @abstractmethod
    def clean_fingerprint(self) -> str:
        """The same of the images as they are (see the kinds)."""

    @abstractmethod
    def identity(self) -> list[str] | None:
        """One line per image that changes when the image's bytes may have changed; None: never cached on disk."""

    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The same kind of source with only these images, in this order."""
        rows = np.asarray(indices, dtype=np.int64)
        arrays: dict[str, Any] = {
            key: value[rows] for key, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        boxes = None if self.boxes is None else self.boxes.select(rows)
        return replace(self, names=[self.names[i] for i in rows], boxes=boxes, **arrays)

    def label_marks(self) -> list[str]:
        """A text per image that tells its label, for fingerprints."""
        return [""] * len(self) if self.labels is None else [f"\0{label}" for label in self.labels.tolist()]

    def describe(self, index: int) -> str:
        """What to call image `index` in a message."""
        return f"{self.name}/{self.names[index]}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec}: {len(self)} images>"


@dataclass(repr=False, eq=False)
class FileSource(Source):
    """Image files below `root`; `names` are their paths relative to it, with forward slashes. listed: the labels come
    from a file of their own, not from the names."""

    root: Path = field(kw_only=True)
    listed: bool = field(default=False, kw_only=True)

    def image(self, index: int) -> Image.Image:
        return decode_image(self.describe(index))

    def describe(self, index: int) -> str:
        return str(self.root / self.names[index])

    def clean_fingerprint(self) -> str:
        """Hash of the sorted relative names and file sizes: the same wherever the folder lies."""
        marks = self.label_marks() if self.listed else [""] * len(self)
        lines = (f"{name}\0{size}{mark}" for (name, size, _), mark in zip(self._files(), marks, strict=True))
        return sha256_of(sorted(lines))[:FINGERPRINT_DIGITS]

    def identity(self) -> list[str]:
        root = self.root.resolve()
        return [f"{root / name}\0{size}\0{changed}" for name, size, changed in self._files()]

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """(name, size, time of change) of each; -1 for one that is missing."""
        for name in self.names:
            try:
                stat = os.stat(os.path.join(self.root, name))
            except OSError:
                yield name, -1, -1
            else:
                yield name, stat.st_size, stat.st_mtime_ns


@dataclass(repr=False, eq=False)
class ArraySource(Source):
    """Small images held in memory: `pixels` uint8 [N,H,W,3]. `origin` identifies the file they came from, if any."""

    pixels: np.ndarray = field(kw_only=True)
    origin: str | None = None

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def clean_fingerprint(self) -> str:
        """Hash of the sorted names and of each image's pixels."""
        digests = (hashlib.sha256(np.ascontiguousarray(p).tobytes()).hexdigest() for p in self.pixels)
        lines = sorted(f"{name}\0{digest}" for name, digest in zip(self.names, digests, strict=True))
        return sha256_of(lines)[:FINGERPRINT_DIGITS]

    def identity(self) -> list[str] | None:
        return None if self.origin is None else [f"{self.origin}\0{name}" for name in self.names]


def sha256_of(lines: Iterable[Any]) -> str:
    """SHA-256 of lines of text, hex."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")).hexdigest()


def open_source(spec: str) -> Source:
    """Open a SOURCE (grammar at the top of this file). Lists names and labels; decodes no image.

    Raises UnknownNameError for an unknown kind, query key or embedded set, and QuantlensError, in one
    sentence with the cure, for a folder that is missing, empty or mislabelled, an empty slice, or a sample
    larger than what there is.
    """
    from quantlens.data.kinds import KINDS

    parsed = parse_spec(spec)
    source = KINDS[parsed.kind].open(parsed)
    source.corruption = parsed.corruption and (*parsed.corruption, parsed.seed)
    if not len(source):
        raise QuantlensError(f"source {spec!r} holds no images")
    if parsed.rows == slice(None) and parsed.sample is None:
        return source
    rows = np.arange(len(source))[parsed.rows]
    if not len(rows):
        raise QuantlensError(f"source {spec!r}: the slice is empty, there are {len(source)} images; choose other ends")
    if parsed.sample is not None:
        rows = _drawn(spec, rows, parsed.sample, parsed.seed)
    return source.select(rows)


def _drawn(text: str, rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """`n` of the rows, drawn with the seed. Raises QuantlensError where there are fewer."""
    if n > len(rows):
        raise QuantlensError(
            f"source {text!r} asks for {n} images and there are {len(rows)}; write n={len(rows)} or less"
        )
    return np.random.RandomState(seed % 2**32).permutation(rows)[:n]


@dataclass(frozen=True)
class SourceKind:
    """One KIND of the grammar: what PATH is, one line for `quantlens sources`, how it is opened, its own query keys."""

    what: str
    description: str
    open: Callable[[SourceSpec], Source]
    options: tuple[str, ...] = ()


def available_sources() -> dict[str, SourceKind]:
    """Kind -> description, in the order in which they are shown."""
    from quantlens.data.kinds import KINDS

    return dict(KINDS)


# ---- one image file --------------------------------------------------------------------------------------------------


def decode_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Read `file` completely and return it as an RGB image, upright: see :func:`as_rgb`. JPEG is decoded in full (no
    `draft`); of an animation the first picture is taken.

    Raises BadImageError with the reason alone (the caller names the file): empty, truncated, not an image,
    too many pixels (PIL's limit against decompression bombs), or numbers without a stated range (32-bit
    grey).
    """
    try:
        if isinstance(file, str | os.PathLike) and os.stat(file).st_size == 0:
            raise BadImageError("the file is empty")
        with Image.open(file) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > 2 * limit:
                raise Image.DecompressionBombError
            return as_rgb(image)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("it is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise BadImageError("it claims more pixels than an honest image has (a decompression bomb)") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        if isinstance(error, OSError) and error.strerror:
            raise BadImageError(f"it cannot be read: {error.strerror.lower()}") from error
        raise BadImageError(f"it is damaged: {str(error).strip().rstrip('.') or type(error).__name__}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as an RGB image, upright; the one way for files, data sets and PIL images.

    The orientation that EXIF states is applied, as viewers, Hugging Face `datasets` and OpenCV do, and as timm and
    torchvision do not: a camera's picture is not seen lying on its side. Modes are converted by PIL's
    `convert("RGB")` as timm and torchvision do (CMYK, palette and grey are converted, transparency is dropped);
    only 16-bit grey is scaled to 8 bits, where PIL clips everything above 255 to white. Raises BadImageError for
    grey values without a stated range.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise BadImageError(
                "its grey values do not fit in 16 bits, so their range is not known; save it with 8 bits"
            )
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImageError("its grey values are floating-point numbers of unknown range; save it with 8 bits")
    if image.mode != "RGB" and "transparency" in image.info:
        image = image.copy()
        image.info.pop("transparency")  # dropped anyway; PIL would warn about it in a palette
    image = image.convert("RGB") if turn is None else image.convert("RGB").transpose(turn)
    image.info = {}  # so that nothing turns it again
    return image


_TURN = Image.Transpose
_TURNS = dict(
    enumerate((_TURN.FLIP_LEFT_RIGHT, _TURN.ROTATE_180, _TURN.FLIP_TOP_BOTTOM, _TURN.TRANSPOSE, _TURN.ROTATE_270), 2)
) | {7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90}
"""EXIF orientation -> what puts the picture upright."""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image (Pillow has turned a TIFF by then); 1 where its EXIF is damaged."""
    try:
        return image.getexif().get(0x0112, 1)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, struct.error):
        return 1
