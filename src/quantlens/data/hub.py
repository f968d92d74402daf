"""Source hf: data sets of Hugging Face by the library ``datasets``, from a folder or a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quantlens.data.labels import as_labels
from quantlens.data.sources import FINGERPRINT_DIGITS, Source, SourceSpec, sha256_of
from quantlens.data.tables import choose_columns, choose_split, class_names_of, picture
from quantlens.errors import QuantlensError, first_line


@dataclass(repr=False, eq=False)
class HubSource(Source):
    """Rows of a ``datasets.Dataset`` whose column `column` holds the pictures. mark: the fingerprint that the
    library gives it."""

    dataset: Any = field(kw_only=True)
    mark: str = field(kw_only=True)
    row: np.ndarray = field(kw_only=True)
    column: str = field(kw_only=True)

    def image(self, index: int) -> Image.Image:
        return picture(self.dataset[int(self.row[index])][self.column])

    def describe(self, index: int) -> str:
        return f"{self.name}, row {self.row[index]}"

    def clean_fingerprint(self) -> str:
        """Hash of the data set's own fingerprint (of its files and what was done to them) and of the rows."""
        lines = (line + mark for line, mark in zip(self.identity(), self.label_marks(), strict=True))
        return sha256_of(sorted(lines))[:FINGERPRINT_DIGITS]

    def identity(self) -> list[str]:
        return [f"{self.mark}\0{self.column}\0{row}" for row in self.row]


def open_hub(spec: SourceSpec) -> HubSource:
    """`hf:DIR` (written by ``save_to_disk``, or of pictures and tables that ``load_dataset`` reads) or `hf:USER/SET`.
    Of several splits one is taken as for parquet; `?config=`, `?image=`, `?label=` choose the rest. No code of a data
    set is run."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise QuantlensError(f"hf: sources need the library datasets ({error}); pip install 'quantlens[hf]'") from error
    folder = Path(spec.path).expanduser()
    local = folder.is_dir()
    try:
        if local and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
            if "config" in spec.options:
                raise ValueError("save_to_disk keeps one configuration; leave ?config= out")
            found = datasets.load_from_disk(str(folder))
        else:
            name, config = str(folder.resolve()) if local else spec.path.rstrip("/"), spec.options.get("config")
            split = spec.options.get("split")
            if split is None or local:
                found = datasets.load_dataset(name, config)
            else:
                found = {split: datasets.load_dataset(name, config, split=split)}
    except (OSError, ValueError, RuntimeError, NotImplementedError, DatasetsError) as error:
        reason = first_line(error).rstrip(".")
        where = "" if local else "; a data set on this machine is named by its folder, hf:DIR"
        raise QuantlensError(f"source {spec.text!r} cannot be opened: {reason}{where}") from error
    name, split = (folder.resolve().name if local else spec.path), ""
    if isinstance(found, Mapping):
        split = choose_split(spec, found)
        found, name = found[split], f"{name}/{split}"
    return of_dataset(found, spec, name)


def of_dataset(dataset: Any, spec: SourceSpec, name: str) -> HubSource:
    """The pictures of a ``datasets.Dataset``, with the labels of its column of labels, if there is one."""
    import datasets

    mark, features = str(dataset._fingerprint), dataset.features
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image) or _binary(kind)]
    image, label = choose_columns(spec, images, [key for key in features if key not in images])
    if isinstance(features[image], datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    what = f"source {spec.text!r}, column {label!r}"
    values = None if label is None else list(dataset.with_format(None)[label])
    feature = None if label is None else json.loads(json.dumps(features.to_dict()))[label]
    labels, class_names = as_labels(values, class_names_of(feature), what)
    return HubSource(
        spec.text,
        spec.kind,
        name,
        [f"{k:06d}" for k in range(len(dataset))],
        labels,
        class_names,
        dataset=dataset.select_columns([image]).with_format(None),
        mark=mark,
        row=np.arange(len(dataset)),
        column=image,
    )


def _binary(kind: Any) -> bool:
    if isinstance(kind, Mapping):
        return "bytes" in kind
    return getattr(kind, "dtype", None) in ("binary", "large_binary")
