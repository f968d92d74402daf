"""Source parquet, and what it shares with other tables with a column of pictures (data sets of Hugging Face).

A picture is a struct {bytes, path} (the layout of Hugging Face), encoded bytes, or nested lists [H, W] or [H, W, 3] of
0…255. A label is a whole number, a name (its label is then its rank among the names), or a list of either kind of
0/1 or of classes (several labels per picture).
"""

from __future__ import annotations

import json
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quantlens.data.labels import as_labels
from quantlens.data.sources import FINGERPRINT_DIGITS, Source, SourceSpec, as_rgb, decode_image, sha256_of
from quantlens.errors import BadImageError, QuantlensError, UnknownNameError

IMAGE_COLUMNS = ("image", "img", "pixel_values", "pixels", "pixel", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "class_id", "target", "targets", "category", "y")
SPLITS = ("test", "validation", "valid", "val", "dev", "eval", "train")
"""The splits looked for, in the order in which one is taken where a source names none."""
HELD_BYTES = 256 << 20
"""Encoded pictures of parquet row groups that are held at once, at most."""


# ---- parquet ---------------------------------------------------------------------------------------------------------


@dataclass(repr=False, eq=False)
class ParquetSource(Source):
    """Rows of parquet files: image k is row `row[k]` of file `file[k]`, in the column `column`. Row groups are read
    when they are needed; of each, the pictures of this source are held for a while."""

    files: list[Path] = field(kw_only=True)
    file: np.ndarray = field(kw_only=True)
    row: np.ndarray = field(kw_only=True)
    column: str = field(kw_only=True)

    def __post_init__(self) -> None:
        self._lock, self._held = threading.Lock(), OrderedDict[tuple[int, int], dict[int, Any]]()
        self._open: tuple[int, Any, list[int]] | None = None

    def image(self, index: int) -> Image.Image:
        file, row = int(self.file[index]), int(self.row[index])
        with self._lock:
            opened, ends = self._opened(file)
            group = bisect_right(ends, row)
            held = self._held.get((file, group)) or self._read(opened, ends, file, group)
            self._held.move_to_end((file, group))
            value = held[row]
        return picture(value, self.files[file].parent)

    def _opened(self, file: int) -> tuple[Any, list[int]]:
        """A file, and where its row groups end; one is open at a time."""
        if self._open is None or self._open[0] != file:
            if self._open is not None:
                self._open[1].close()
            opened = _pyarrow("parquet").ParquetFile(self.files[file])
            sizes = (opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups))
            self._open = file, opened, list(accumulate(sizes))
        return self._open[1:]

    def _read(self, opened: Any, ends: list[int], file: int, group: int) -> dict[int, Any]:
        """The pictures of this source in a row group, by their row in the file; older groups make room."""
        start, stop = ends[group - 1] if group else 0, ends[group]
        rows = self.row[(self.file == file) & (self.row >= start) & (self.row < stop)]
        column = opened.read_row_group(group, columns=[self.column]).column(self.column)
        held = {int(row): column[int(row) - start].as_py() for row in rows}
        size = sum(map(_size, held.values()))
        while self._held and size + sum(sum(map(_size, other.values())) for other in self._held.values()) > HELD_BYTES:
            self._held.popitem(last=False)
        self._held[file, group] = held
        return held

    def describe(self, index: int) -> str:
        return f"{self.files[self.file[index]]}, row {self.row[index]}"

    def clean_fingerprint(self) -> str:
        """Hash of the files' names and footers (sizes and statistics of every column), and of the rows."""
        marks = {file: sha256_of([self.files[file].name, _footer(self.files[file])]) for file in set(self.file)}
        rows = zip(self.file, self.row, self.label_marks(), strict=True)
        lines = (f"{marks[file]} {row}{mark}" for file, row, mark in rows)
        return sha256_of([self.column, *sorted(lines)])[:FINGERPRINT_DIGITS]

    def identity(self) -> list[str]:
        return [
            f"{mark}\0{self.column}\0{row}"
            for mark, row in zip(file_marks(self.files, self.file), self.row, strict=True)
        ]


def file_marks(files: Sequence[Path], which: Iterable[int]) -> list[str]:
    """For each of `which`, the path, size and time of change of that file."""
    stats = [file.stat() for file in files]
    marks = [f"{file.resolve()}\0{s.st_size}\0{s.st_mtime_ns}" for file, s in zip(files, stats, strict=True)]
    return [marks[k] for k in which]


def _size(value: Any) -> int:
    held = value.get("bytes") if isinstance(value, Mapping) else value
    return len(held) if isinstance(held, bytes) else 1024 * len(held) if isinstance(held, list) else 0


def _footer(path: Path) -> str:
    with path.open("rb") as stream:
        stream.seek(-8, os.SEEK_END)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, os.SEEK_END)
        return sha256_of([stream.read(length).hex()])


def _pyarrow(part: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise QuantlensError(f"parquet files need pyarrow ({error}); pip install 'quantlens[parquet]'") from error
    return getattr(pyarrow, part)


def open_parquet(spec: SourceSpec) -> ParquetSource:
    """`parquet:FILE` or `parquet:DIR` with one or several shards. Of a folder with several splits one is taken
    (`?split=`; else the first of :data:`SPLITS` that is there). `?image=` and `?label=` name the columns."""
    path = existing_path(spec)
    files = _shards(path) if path.is_dir() else {"": [path]}
    if not files:
        raise QuantlensError(f"source {spec.text!r}: there is no .parquet file below {path}; give their folder")
    split = choose_split(spec, files)
    shards = [_Shard.read(spec, file) for file in files[split]]
    column, label = choose_columns(spec, shards[0].images, shards[0].labels)
    for shard in shards:
        if column not in shard.images or (label is not None and label not in shard.labels):
            raise QuantlensError(
                f"source {spec.text!r}: {shard.path.name} has other columns than {shards[0].path.name}; give one file"
            )
    counts = [shard.rows for shard in shards]
    values = None if label is None else [v for shard in shards for v in shard.column(label)]
    labels, names = as_labels(values, shards[0].class_names(label), f"source {spec.text!r}, column {label!r}")
    name = f"{path.stem if path.is_file() else path.resolve().name}{f'/{split}' if split else ''}"
    return ParquetSource(
        spec.text,
        spec.kind,
        name,
        [f"{split or path.stem}/{k:06d}" for k in range(sum(counts))],
        labels,
        names,
        files=[shard.path for shard in shards],
        file=np.repeat(np.arange(len(shards)), counts),
        row=np.concatenate([np.arange(n) for n in counts]),
        column=column,
    )


def _shards(root: Path) -> dict[str, list[Path]]:
    """Split -> its parquet files below a folder, sorted; "" where neither file nor folder names one."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.parquet")):
        parts = path.relative_to(root).parts
        if any(part.startswith(".") for part in parts):
            continue
        numbered = re.fullmatch(r"(.+?)-\d{4,}-of-\d{4,}(-\w+)?", path.stem)
        words = [word for part in (path.stem, *reversed(parts[:-1])) for word in re.split(r"[\W_]+", part.lower())]
        split = numbered[1] if numbered else next((word for word in words if word in SPLITS), "")
        found.setdefault(split, []).append(path)
    return found


def choose_split(spec: SourceSpec, splits: Iterable[str]) -> str:
    """The split that a source asks for, the only one, or the first of :data:`SPLITS`. Raises where that leaves a
    choice."""
    known, asked = list(splits), spec.options.get("split")
    if asked is not None:
        if asked in known:
            return asked
        raise UnknownNameError(f"split in source {spec.text!r}:", asked, known)
    chosen = known if len(known) == 1 else [split for split in SPLITS if split in known]
    if not chosen:
        raise QuantlensError(f"source {spec.text!r} has the splits {', '.join(map(repr, known))}; write ?split=NAME")
    return chosen[0]


@dataclass
class _Shard:
    """One parquet file: which columns can be pictures and which labels, and what Hugging Face says of them."""

    path: Path
    rows: int
    images: list[str]
    labels: list[str]
    features: Mapping[str, Any]

    @classmethod
    def read(cls, spec: SourceSpec, path: Path) -> _Shard:
        parquet, types = _pyarrow("parquet"), _pyarrow("types")
        try:
            with parquet.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise QuantlensError(
                f"source {spec.text!r}: {path} is not a whole parquet file; copy it again (of a Git LFS pointer, fetch "
                "the file)"
            ) from error
        try:
            features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        except (ValueError, KeyError, TypeError):
            features = {}

        def pictured(kind: Any) -> bool:
            encoded = types.is_binary(kind) or types.is_large_binary(kind)
            struct = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            return encoded or struct or (_is_list(types, kind) and _is_list(types, kind.value_type))

        def labelled(kind: Any) -> bool:
            one = kind.value_type if _is_list(types, kind) else kind
            texts = types.is_string(one) or types.is_large_string(one) or types.is_dictionary(one)
            return texts or types.is_integer(one) or types.is_boolean(one) or types.is_floating(one)

        images = [field.name for field in schema if pictured(field.type)]
        return cls(path, rows, images, [field.name for field in schema if labelled(field.type)], features)

    def column(self, name: str) -> list[Any]:
        return _pyarrow("parquet").read_table(self.path, columns=[name]).column(0).to_pylist()

    def class_names(self, column: str | None) -> list[str] | None:
        return None if column is None else class_names_of(self.features.get(column))


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def class_names_of(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, also inside a list of them, as Hugging Face writes it in a schema."""
    if isinstance(feature, Sequence) and not isinstance(feature, str) and len(feature) == 1:
        feature = feature[0]
    if not isinstance(feature, Mapping):
        return None
    names = feature.get("names")
    if isinstance(names, Mapping):  # older files: {"0": "cat", …}
        names = [names[key] for key in sorted(names, key=int)]
    return list(map(str, names)) if names else class_names_of(feature.get("feature"))


def choose_columns(spec: SourceSpec, images: Sequence[str], labels: Sequence[str]) -> tuple[str, str | None]:
    """(column of pictures, column of labels or None): those asked for, else by their usual names, else the only one
    that can hold pictures."""
    image, label = spec.options.get("image"), spec.options.get("label")
    if image is None:
        image = next((name for name in IMAGE_COLUMNS if name in images), images[0] if len(images) == 1 else None)
        if image is None:
            raise QuantlensError(
                f"source {spec.text!r}: "
                + (f"the columns {', '.join(images)} may all hold pictures" if images else "no column holds pictures")
                + "; write ?image=COLUMN (encoded bytes, or {bytes, path} as Hugging Face has them)"
            )
    elif image not in images:
        raise UnknownNameError(f"column of pictures in source {spec.text!r}:", image, images)
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in labels and name != image), None)
    elif label not in labels:
        raise UnknownNameError(f"column of labels in source {spec.text!r}:", label, labels)
    return image, label


def picture(value: Any, folder: Path | None = None) -> Image.Image:
    """A cell of a table as an RGB image. Raises BadImageError with the reason."""
    if isinstance(value, Image.Image):
        return as_rgb(value)
    path = None
    if isinstance(value, Mapping):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return decode_image(BytesIO(value)) if value else _bad("it is empty")
    if value is None and path:
        return decode_image(Path(folder or "", path))
    if isinstance(value, list | np.ndarray):
        array = np.asarray(value)
        shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
        if shaped and array.size and array.dtype.kind in "iu" and 0 <= array.min() <= array.max() <= 255:
            return as_rgb(Image.fromarray(array.astype(np.uint8).squeeze()))
        return _bad(f"its numbers {list(array.shape)} are no picture [H, W] or [H, W, 3] of 0 to 255")
    return _bad("there is no picture in it")


def _bad(reason: str) -> Image.Image:
    raise BadImageError(reason)


def existing_path(spec: SourceSpec) -> Path:
    """The file or folder a spec names, `~` expanded. Raises QuantlensError where there is none."""
    path = Path(spec.path).expanduser()
    if not path.exists():
        raise QuantlensError(f"source {spec.text!r}: there is no {path}; check the path (seen from {Path.cwd()})")
    return path
