"""Source webdataset: tar files of samples, read where they lie. Nothing is unpacked, unpickled or run.

A sample is the members that share a path up to the first dot of its last part: 0001.jpg and 0001.cls. Its label is
in KEY.cls (a whole number or a name), or in KEY.json under one of the keys in LABEL_KEYS.
"""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quantlens.data.labels import as_labels
from quantlens.data.sources import FINGERPRINT_DIGITS, IMAGE_SUFFIXES, Source, SourceSpec, decode_image, sha256_of
from quantlens.data.tables import LABEL_COLUMNS, file_marks
from quantlens.errors import QuantlensError

LABEL_KEYS = LABEL_COLUMNS
LARGEST_LABEL = 1 << 20  # bytes of a member that holds a label; a larger one is something else

Member = tuple[int, int]
"""Where a member's data begin in its tar file, and how many bytes they are."""


@dataclass(repr=False, eq=False)
class TarSource(Source):
    """Pictures inside tar files: image k is `size[k]` bytes at `offset[k]` of shard `shard[k]`."""

    shards: list[Path] = field(kw_only=True)
    shard: np.ndarray = field(kw_only=True)
    offset: np.ndarray = field(kw_only=True)
    size: np.ndarray = field(kw_only=True)

    def image(self, index: int) -> Image.Image:
        member = int(self.offset[index]), int(self.size[index])
        return decode_image(BytesIO(_read(self.shards[self.shard[index]], member)))

    def describe(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}, {self.names[index]}"

    def clean_fingerprint(self) -> str:
        """Hash of the sorted names, sizes and places of the members."""
        lines = zip(self._lines([shard.name for shard in self.shards]), self.label_marks(), strict=True)
        return sha256_of(sorted(line + mark for line, mark in lines))[:FINGERPRINT_DIGITS]

    def identity(self) -> list[str]:
        return self._lines(file_marks(self.shards, range(len(self.shards))))

    def _lines(self, marks: list[str]) -> list[str]:
        rows = zip(self.names, self.shard, self.offset, self.size, strict=True)
        return [f"{marks[shard]}\0{name}\0{offset}\0{size}" for name, shard, offset, size in rows]


def open_webdataset(spec: SourceSpec) -> TarSource:
    """`webdataset:FILE.tar`, `webdataset:shard-{0000..0099}.tar` or `webdataset:DIR` (every .tar in it). `?image=` is
    the ending of the pictures, where a sample has several; `?label=` that of the labels, or a key of the .json."""
    shards = _shards(spec)
    names, places, values = [], [], []
    for number, path in enumerate(shards):
        for key, members in _samples(path).items():
            ending = _picture(spec, members)
            if ending is None:
                continue
            names.append(f"{path.stem}/{key}.{ending}")
            places.append((number, *members[ending]))
            values.append(_label(spec, path, key, members))
    if not names:
        wanted = spec.options.get("image")
        what = f"whose name ends in .{wanted}" if wanted else f"({' '.join(IMAGE_SUFFIXES)})"
        raise QuantlensError(f"source {spec.text!r}: no picture {what} in {shards[0].name}; is it a WebDataset?")
    given = [value is not None for value in values]
    if any(given) and not all(given):
        first = names[given.index(False)]
        raise QuantlensError(
            f"source {spec.text!r}: {given.count(False)} of the {len(names)} samples have no label, the first is "
            f"{first}; give each a .cls, or name another ending with ?label="
        )
    if "label" in spec.options and not any(given):
        raise QuantlensError(f"source {spec.text!r}: no sample has a label {spec.options['label']!r}")
    labels, class_names = as_labels(values if all(given) else None, None, f"source {spec.text!r}")
    shard, offset, size = np.array(places, dtype=np.int64).T
    name = re.sub(r"[-_.]*\{.*", "", Path(spec.path).name).removesuffix(".tar") or spec.kind
    kinds = {"shards": shards, "shard": shard, "offset": offset, "size": size}
    return TarSource(spec.text, spec.kind, name, names, labels, class_names, **kinds)


def _shards(spec: SourceSpec) -> list[Path]:
    path = Path(spec.path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix == ".tar" and not p.name.startswith("."))
        if not found:
            raise QuantlensError(f"source {spec.text!r}: there is no .tar file in {path}")
        return found
    found = [path] if path.is_file() else [Path(text) for text in expand_braces(str(path))]
    missing = [p for p in found if not p.is_file()]
    if missing:
        raise QuantlensError(
            f"source {spec.text!r}: {len(missing)} of {len(found)} tar files are missing, the first is {missing[0]}; "
            "check the path"
        )
    return found


def expand_braces(text: str) -> list[str]:
    """`a-{00..02}.tar` and `{a,b}.tar` written out, as a shell does."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if found is None:
        return [text]
    first, last, listed = found.groups()
    if listed is None:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        parts = [f"{k:0{width}d}" for k in range(int(first), int(last) + step, step)]
    else:
        parts = listed.split(",")
    return [rest for part in parts for rest in expand_braces(text[: found.start()] + part + text[found.end() :])]


def _samples(path: Path) -> dict[str, dict[str, Member]]:
    """Key -> ending -> place, of every regular file of a tar file; of two alike the last counts, as in tar."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, file = member.name.rpartition("/")
                stem, dot, ending = file.partition(".")
                if member.isreg() and not member.issparse() and stem and dot:
                    samples.setdefault(f"{folder}{slash}{stem}", {})[ending.lower()] = member.offset_data, member.size
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        packed = path.open("rb").read(2) == b"\x1f\x8b"
        cure = "it is compressed: gunzip it, so that pictures can be read where they lie" if packed else "copy it again"
        raise QuantlensError(f"{path} cannot be read as a tar file ({error}); {cure}") from error
    return samples


def _picture(spec: SourceSpec, members: dict[str, Member]) -> str | None:
    """The ending of a sample's picture, or None: the one asked for, else the first that is of a picture."""
    wanted = spec.options.get("image")
    if wanted is not None:
        return wanted.lower() if wanted.lower() in members else None
    plain = [ending for ending in members if f".{ending}" in IMAGE_SUFFIXES]
    return next(iter(plain or [ending for ending in members if ending.endswith(IMAGE_SUFFIXES)]), None)


def _label(spec: SourceSpec, path: Path, key: str, members: dict[str, Member]) -> Any:
    """The label of a sample as it is written, or None."""
    wanted = spec.options.get("label")
    ending = "cls" if wanted is None else wanted
    if ending in members:
        if members[ending][1] > LARGEST_LABEL:
            raise QuantlensError(f"source {spec.text!r}: {key}.{ending} in {path.name} is no label, it is too long")
        text = _read(path, members[ending]).decode("utf-8", "replace").strip()
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else text or None
    if "json" in members and members["json"][1] <= LARGEST_LABEL:
        try:
            about = json.loads(_read(path, members["json"]))
        except ValueError as error:
            raise QuantlensError(f"source {spec.text!r}: {key}.json in {path.name} is not JSON ({error})") from error
        if isinstance(about, int | str) and wanted is None:
            return about
        if isinstance(about, dict):
            return next((about[name] for name in ([wanted] if wanted else LABEL_KEYS) if name in about), None)
    return None


def _read(path: Path, member: Member) -> bytes:
    offset, size = member
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)
