"""Sources cifar10 and cifar100: the binary version of the files, or the Python version through a narrow
unpickler.
"""

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
    """Where one of the two data sets keeps its files (of the binary version they end in .bin), how many label bytes
    stand before each binary record, and where labels and names are in the Python version.
    """

    folders: tuple[str, ...]
    files: dict[str, list[str]]
    classes: int
    label_bytes: int
    label_key: bytes
    names_text: str
    names_python: str
    names_key: bytes


_LAYOUTS = {
    "cifar10": _Layout(
        ("", "cifar-10-batches-bin", "cifar-10-batches-py"),
        {"test": ["test_batch"], "train": [f"data_batch_{k}" for k in range(1, 6)]},
        10,
        1,
        b"labels",
        "batches.meta.txt",
        "batches.meta",
        b"label_names",
    ),
    "cifar100": _Layout(
        ("", "cifar-100-binary", "cifar-100-python"),
        {"test": ["test"], "train": ["train"]},
        100,
        2,
        b"fine_labels",
        "fine_label_names.txt",
        "meta",
        b"fine_label_names",
    ),
}


def open_cifar(spec: SourceSpec) -> ArraySource:
    """`cifar10:DIR`, `cifar100:DIR` (fine labels): the 10000 test images, or the training images with
    `?split=train`.
    """
    layout, root, split = _LAYOUTS[spec.kind], existing_directory(spec), spec.options.get("split", "test")
    if split not in layout.files:
        raise UnknownNameError(f"split in source {spec.text!r}:", split, layout.files)
    python, binary = layout.files[split], [f"{file}.bin" for file in layout.files[split]]
    for folder in layout.folders:
        for files, read in ((binary, _read_binary), (python, _read_python)):
            paths = [root / folder / file for file in files]
            if all(path.is_file() for path in paths):
                pixels, labels = map(np.concatenate, zip(*(read(path, layout) for path in paths), strict=True))
                return _source(spec, layout, split, paths, pixels, labels)
    if any(root.glob("*.parquet")):
        raise QuantlensError(f"source {spec.text!r}: {root} holds parquet files; write parquet:{spec.path}")
    raise QuantlensError(
        f"source {spec.text!r}: neither {', '.join(binary)} nor {', '.join(python)} is in {root}; "
        f"unpack {layout.folders[1]}'s archive there"
    )


def _source(
    spec: SourceSpec, layout: _Layout, split: str, paths: list[Path], pixels: np.ndarray, labels: np.ndarray
) -> ArraySource:
    """pixels: uint8 [N,3072], channel by channel."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= layout.classes:
        raise QuantlensError(
            f"source {spec.text!r}: {paths[0].name} has labels that are not among {layout.classes} classes; is "
            "it the other CIFAR?"
        )
    origin = "\0".join(f"{p.resolve()}\0{p.stat().st_size}\0{p.stat().st_mtime_ns}" for p in paths)
    return ArraySource(
        spec.text,
        spec.kind,
        f"{spec.kind}/{split}",
        [f"{split}/{k:05d}" for k in range(len(pixels))],
        labels,
        _class_names(layout, paths[0].parent),
        pixels=np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)),
        origin=origin,
    )


def _read_binary(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    data, record = np.fromfile(path, dtype=np.uint8), layout.label_bytes + PIXELS
    if not len(data) or len(data) % record:
        raise QuantlensError(
            f"{path} has {len(data)} bytes, which is no whole number of {record}-byte records; download it again"
        )
    records = data.reshape(-1, record)
    return records[:, layout.label_bytes :], records[:, layout.label_bytes - 1].astype(np.int64)


def _read_python(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    batch = load_restricted_pickle(path)
    try:
        data, labels = batch[b"data"], np.asarray(batch[layout.label_key], dtype=np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), PIXELS):
            raise ValueError(f"data {data.dtype} {data.shape}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuantlensError(f"{path} is not a CIFAR batch of the expected kind; download it again") from error
    return data, labels


def _class_names(layout: _Layout, folder: Path) -> list[str] | None:
    """The names in the text or pickle file beside the batches; None where there is neither."""
    names: list[str] = []
    if (folder / layout.names_text).is_file():
        names = (folder / layout.names_text).read_text(encoding="utf-8").split()
    elif (folder / layout.names_python).is_file():
        meta = load_restricted_pickle(folder / layout.names_python)
        found = meta.get(layout.names_key, []) if isinstance(meta, dict) else []
        names = [n.decode("utf-8", "replace") for n in found if isinstance(n, bytes)]
    return names if len(names) == layout.classes else None


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): str.encode,  # bytes in an old pickle: `codecs.encode(text, "latin1")`
}
"""What a pickle may name."""


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays, bytes, strings, numbers, lists and dicts; refuses to look up anything else by
    name.
    """

    def find_class(self, module: str, name: str) -> Any:
        where = (module.replace("numpy._core", "numpy.core"), name)
        if where not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[where]


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
