"""Sources cifar10 and cifar100: the binary version of the files, or the Python version through a narrow
unpickler.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.data.folders import existing_directory
from quantlens.data.sources import ArraySource, SourceSpec
from quantlens.errors import QuantlensError, UnknownNameError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    """Where one of the two data sets keeps its files, and how many label bytes stand before each binary
    record.
    """

    folders: tuple[str, ...]
    binary: dict[str, tuple[str, ...]]
    python: dict[str, tuple[str, ...]]
    label_bytes: int
    label_key: bytes
    names_text: str
    names_python: tuple[str, bytes]


_LAYOUTS = {
    "cifar10": _Layout(
        ("", "cifar-10-batches-bin", "cifar-10-batches-py"),
        {"test": ("test_batch.bin",), "train": tuple(f"data_batch_{k}.bin" for k in range(1, 6))},
        {"test": ("test_batch",), "train": tuple(f"data_batch_{k}" for k in range(1, 6))},
        1,
        b"labels",
        "batches.meta.txt",
        ("batches.meta", b"label_names"),
    ),
    "cifar100": _Layout(
        ("", "cifar-100-binary", "cifar-100-python"),
        {"test": ("test.bin",), "train": ("train.bin",)},
        {"test": ("test",), "train": ("train",)},
        2,
        b"fine_labels",
        "fine_label_names.txt",
        ("meta", b"fine_label_names"),
    ),
}


def open_cifar(spec: SourceSpec) -> ArraySource:
    """`cifar10:DIR`, `cifar100:DIR` (fine labels): the 10000 test images, or the training images with
    `?split=train`.
    """
    layout = _LAYOUTS[spec.kind]
    root = existing_directory(spec)
    split = dict(spec.options).get("split", "test")
    if split not in layout.binary:
        raise UnknownNameError(f"split in source {spec.text!r}:", split, layout.binary)
    for folder in (root / f for f in layout.folders):
        for files, read in ((layout.binary[split], _read_binary), (layout.python[split], _read_python)):
            paths = [folder / file for file in files]
            if not paths[0].is_file():
                continue
            missing = [p.name for p in paths if not p.is_file()]
            if missing:
                raise QuantlensError(
                    f"source {spec.text!r}: {missing[0]} is missing from {folder}; unpack the archive again"
                )
            parts = [read(path, layout) for path in paths]
            return _source(spec, layout, split, folder, paths, parts)
    raise QuantlensError(
        f"source {spec.text!r}: neither {layout.binary[split][0]} nor {layout.python[split][0]} is in "
        f"{root}; "
        f"unpack {layout.folders[1]}'s archive there"
    )


def _source(
    spec: SourceSpec,
    layout: _Layout,
    split: str,
    folder: Path,
    paths: list[Path],
    parts: list[tuple[np.ndarray, np.ndarray]],
) -> ArraySource:
    classes = 10 if spec.kind == "cifar10" else 100
    pixels = np.concatenate([p for p, _ in parts])
    labels = np.concatenate([y for _, y in parts])
    if len(pixels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise QuantlensError(
            f"source {spec.text!r}: {paths[0].name} has labels that are not among {classes} classes; is "
            "it the other CIFAR?"
        )
    names = [f"{split}/{k:05d}" for k in range(len(pixels))]
    origin = "\0".join(f"{p.resolve()}\0{p.stat().st_size}\0{p.stat().st_mtime_ns}" for p in paths)
    return ArraySource(
        spec.text,
        spec.kind,
        f"{spec.kind}/{split}",
        pixels,
        names,
        labels,
        _class_names(layout, folder, classes),
        origin=origin,
    )


def _images(flat: np.ndarray) -> np.ndarray:
    """uint8 [N,3072], channel by channel -> [N,32,32,3]."""
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_binary(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    data = np.fromfile(path, dtype=np.uint8)
    record = layout.label_bytes + PIXELS
    if not len(data) or len(data) % record:
        raise QuantlensError(
            f"{path} has {len(data)} bytes, which is no whole number of {record}-byte records; download it again"
        )
    records = data.reshape(-1, record)
    return _images(records[:, layout.label_bytes :]), records[:, layout.label_bytes - 1].astype(np.int64)


def _read_python(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    batch = load_restricted_pickle(path)
    try:
        data, labels = batch[b"data"], np.asarray(batch[layout.label_key], dtype=np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), PIXELS):
            raise ValueError(f"data {data.dtype} {data.shape}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuantlensError(f"{path} is not a CIFAR batch of the expected kind; download it again") from error
    return _images(data), labels


def _class_names(layout: _Layout, folder: Path, classes: int) -> list[str] | None:
    """The names in the text or pickle file beside the batches; None where there is neither."""
    text, (python, key) = folder / layout.names_text, layout.names_python
    names: list[str] = []
    if text.is_file():
        names = text.read_text(encoding="utf-8").split()
    elif (folder / python).is_file():
        meta = load_restricted_pickle(folder / python)
        found = meta.get(key, []) if isinstance(meta, dict) else []
        names = [n.decode("utf-8", "replace") for n in found if isinstance(n, bytes)]
    return names if len(names) == classes else None


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays, bytes, strings, numbers, lists and dicts; refuses to look up anything else by
    name.
    """

    def find_class(self, module: str, name: str) -> Any:
        where = module.replace("numpy._core", "numpy.core")
        if (where, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if (where, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (where, name) == ("numpy", "dtype"):
            return np.dtype
        if (where, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Python 3 writes bytes into an old pickle as a call of `codecs.encode(text, "latin1")`."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def load_restricted_pickle(path: Path) -> Any:
    """Read a pickle that may hold nothing but arrays, bytes, strings, numbers, lists and dicts.

    Raises QuantlensError for a damaged file and for one that asks for any other class or function (nothing is
    called).
    """
    try:
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise QuantlensError(
            f"{path} is not a plain CIFAR batch ({error}); use the binary version of the data set, or download it again"
        ) from error
