"""Where images come from: the SOURCE grammar, and the two kinds of source (files, arrays).

    KIND:PATH                    imagenet:DIR imagefolder:DIR images:DIR cifar10:DIR cifar100:DIR coco:DIR embedded:NAME
    KIND:PATH[a:b]               images a to b (b excluded) in sorted order, as in Python: ends may be open or negative
    KIND:PATH[a:b:s]             every s-th of them: [::2] and [1::2] are two halves that share no image
    KIND:PATH?n=200&seed=0       a random sample of 200 (seed 0 where none is given), from the slice if there is one
    KIND:PATH/                   a folder whose name ends like one of these: what stands before a slash is its name

Images are sorted by their path below DIR, compared character by character. A sample keeps the order in which
it was drawn, so that the sample of 32 images is the beginning of the sample of 64 with the same seed.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from quantlens.errors import QuantlensError, UnknownNameError

FINGERPRINT_DIGITS = 16
CALIBRATION_IMAGES = 32
"""The usual number of calibration images."""


@dataclass(frozen=True)
class SourceSpec:
    """A parsed SOURCE: `start`, `stop` and `step` as in a Python slice, `sample` images drawn with `seed`, options of
    the kind.
    """

    text: str
    kind: str
    path: str
    start: int | None = None
    stop: int | None = None
    step: int | None = None
    sample: int | None = None
    seed: int = 0
    options: tuple[tuple[str, str], ...] = ()


def parse_spec(text: str) -> SourceSpec:
    """Read `KIND:PATH[a:b]?n=200&seed=0`. Raises UnknownNameError (kind, query key) or QuantlensError (the
    rest).
    """
    from quantlens.data.kinds import KINDS  # the kinds need the classes below

    kind, colon, rest = text.partition(":")
    if not colon:
        raise QuantlensError(
            f"source {text!r} has no kind; write KIND:PATH, for example images:{text or 'DIR'} or embedded:digits-test"
        )
    if kind not in KINDS:
        raise UnknownNameError("source kind", kind, KINDS, hint="a source is written KIND:PATH")
    path, question, query = rest.rpartition("?") if "?" in rest.rpartition("/")[2] else (rest, "", "")
    sample, seed, options = _query(text, query if question else None, KINDS[kind].options)
    start = stop = step = None
    if (bracket := re.search(r"\[([^\[\]/\\]*)\]$", path)) and re.fullmatch(r"[-+\d:\s]*", bracket[1]):
        ends = re.fullmatch(r"\s*([-+]?\d+)?\s*:\s*([-+]?\d+)?\s*(?::\s*([1-9]\d*)?\s*)?", bracket[1])
        if ends is None:
            raise QuantlensError(
                f"source {text!r}: {bracket[0]} is not a slice; write [a:b] or [a:b:step], "
                "for example [0:400], [-100:] or [::2]"
            )
        start, stop, step = (int(end) if end else None for end in ends.groups())
        path = path[: bracket.start()]
    if not path:
        raise QuantlensError(f"source {text!r} names no {KINDS[kind].what}; write {kind}:{KINDS[kind].what.upper()}")
    return SourceSpec(text, kind, path, start, stop, step, sample, seed, tuple(sorted(options.items())))


def with_sample(text: str, n: int, seed: int) -> str:
    """The SOURCE of `n` images that `seed` draws from the SOURCE `text`, which must not draw a sample itself."""
    return f"{text}{'&' if parse_spec(text).options else '?'}n={n}&seed={seed}"


def open_calibration(text: str, n: int | None = None, seed: int = 0) -> Source:
    """The calibration images of a SOURCE: `n` that `seed` draws (by default 32, or all where there are fewer), unless
    it draws a sample itself. Raises QuantlensError where both say how many and differ, and as :func:`open_source`."""
    sample = parse_spec(text).sample
    if sample is not None and n not in (None, sample):
        raise QuantlensError(f"--n {n} and {text!r} ask for different numbers of images; leave one of them out")
    source = open_source(text)
    if sample is None:
        n = min(CALIBRATION_IMAGES, len(source)) if n is None else n
        source = source.select(_drawn(text, np.arange(len(source)), n, seed))
        source.spec = with_sample(text, n, seed)
    return source


def _query(text: str, query: str | None, options: Iterable[str]) -> tuple[int | None, int, dict[str, str]]:
    if query is None:
        return None, 0, {}
    known = ["n", "seed", *options]
    given: dict[str, str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise UnknownNameError(f"query key in source {text!r}:", key, known)
        if key in given:
            raise QuantlensError(f"source {text!r} gives {key} twice; give it once")
        given[key] = value
    numbers: dict[str, int] = {}
    for key, least in (("n", 1), ("seed", 0)):
        if key in given:
            value = given.pop(key)
            if not re.fullmatch(r"\d+", value) or int(value) < least:
                raise QuantlensError(f"source {text!r}: {key}={value!r} must be a whole number, at least {least}")
            numbers[key] = int(value)
    if not numbers and not given:
        raise QuantlensError(f"source {text!r} ends in '?' without a query; write ?n=200&seed=0 or leave it out")
    if "seed" in numbers and "n" not in numbers:
        raise QuantlensError(
            f"source {text!r} gives a seed but no number of images; write ?n=200&seed={numbers['seed']}"
        )
    return numbers.get("n"), numbers.get("seed", 0), given


class Source(ABC):
    """A list of images that can be read one by one.

    `spec` is the text it was opened from, `kind` and `name` are for people, `names` has one name per image,
    `labels` is int64 [N] or None, `class_names` is a list that `labels` index, or None. `group` is "id",
    "near" or "far" for embedded sets and None for the rest.
    """

    spec: str
    kind: str
    name: str
    names: Sequence[str]
    labels: np.ndarray | None
    class_names: list[str] | None
    group: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB. Raises BadImageError with the reason; `describe(index)` names the image."""

    @abstractmethod
    def select(self, indices: Sequence[int] | np.ndarray) -> Source:
        """The same kind of source with only these images, in this order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Short hash that changes when the images change (see the kinds)."""

    @abstractmethod
    def identity(self) -> list[str] | None:
        """One line per image that changes when the image's bytes may have changed; None: never cached on
        disk.
        """

    def describe(self, index: int) -> str:
        """What to call image `index` in a message."""
        return f"{self.name}/{self.names[index]}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec}: {len(self)} images>"


def _pick_labels(labels: np.ndarray | None, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
    return None if labels is None else labels[np.asarray(indices, dtype=np.int64)]


@dataclass(repr=False, eq=False)
class FileSource(Source):
    """Image files below `root`; `names` are their paths relative to it, with forward slashes."""

    spec: str
    kind: str
    name: str
    root: Path
    names: list[str]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    group: str | None = None

    def image(self, index: int) -> Image.Image:
        from quantlens.data.decode import decode_image

        return decode_image(self.path(index))

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]

    def describe(self, index: int) -> str:
        return str(self.path(index))

    def select(self, indices: Sequence[int] | np.ndarray) -> FileSource:
        names = [self.names[i] for i in indices]
        labels = _pick_labels(self.labels, indices)
        return FileSource(self.spec, self.kind, self.name, self.root, names, labels, self.class_names, self.group)

    def fingerprint(self) -> str:
        """Hash of the sorted relative names and file sizes: the same wherever the folder lies."""
        lines = sorted(
            f"{name}\0{stat.st_size if stat else -1}" for name, stat in zip(self.names, self._stats(), strict=True)
        )
        return _hash(lines)

    def identity(self) -> list[str]:
        root = self.root.resolve()
        return [
            f"{root / name}\0{stat.st_size}\0{stat.st_mtime_ns}" if stat else f"{root / name}\0missing"
            for name, stat in zip(self.names, self._stats(), strict=True)
        ]

    def _stats(self) -> list[os.stat_result | None]:
        def stat(name: str) -> os.stat_result | None:
            try:
                return os.stat(os.path.join(self.root, name))
            except OSError:
                return None

        return [stat(name) for name in self.names]


@dataclass(repr=False, eq=False)
class ArraySource(Source):
    """Small images held in memory: `pixels` uint8 [N,H,W,3]. `origin` identifies the file they came from, if
    any.
    """

    spec: str
    kind: str
    name: str
    pixels: np.ndarray
    names: list[str]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    group: str | None = None
    origin: str | None = None

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def select(self, indices: Sequence[int] | np.ndarray) -> ArraySource:
        rows = np.asarray(indices, dtype=np.int64)
        names = [self.names[i] for i in rows]
        labels = _pick_labels(self.labels, rows)
        return ArraySource(
            self.spec,
            self.kind,
            self.name,
            self.pixels[rows],
            names,
            labels,
            self.class_names,
            self.group,
            self.origin,
        )

    def fingerprint(self) -> str:
        """Hash of the sorted names and of each image's pixels."""
        digests = (hashlib.sha256(np.ascontiguousarray(p).tobytes()).hexdigest() for p in self.pixels)
        return _hash(sorted(f"{name}\0{digest}" for name, digest in zip(self.names, digests, strict=True)))

    def identity(self) -> list[str] | None:
        return None if self.origin is None else [f"{self.origin}\0{name}" for name in self.names]


def _hash(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def open_source(spec: str) -> Source:
    """Open a SOURCE (grammar at the top of this file). Lists names and labels; decodes no image.

    Raises UnknownNameError for an unknown kind, query key or embedded set, and QuantlensError, in one
    sentence with the cure, for a folder that is missing, empty or mislabelled, an empty slice, or a sample
    larger than what there is.
    """
    from quantlens.data.kinds import KINDS

    parsed = parse_spec(spec)
    source = KINDS[parsed.kind].open(parsed)
    if parsed.start is parsed.stop is parsed.step is parsed.sample is None:
        return source
    rows = np.arange(len(source))[parsed.start : parsed.stop : parsed.step]
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
    """One KIND of the grammar: how it is opened, what PATH is, its own query keys, one line for `quantlens
    sources`.
    """

    name: str
    what: str
    description: str
    open: Callable[[SourceSpec], Source]
    options: tuple[str, ...] = ()


def available_sources() -> dict[str, SourceKind]:
    """Kind -> description, in the order in which they are shown."""
    from quantlens.data.kinds import KINDS

    return dict(KINDS)
