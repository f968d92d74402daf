"""Files of labels beside a flat folder of ImageNet images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantlens.errors import QuantlensError

USUAL_NAMES = (
    "val.txt",
    "val_labels.txt",
    "labels.txt",
    "labels.csv",
    "val.csv",
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)
"""Label files that are looked for in the folder, in the one that holds it, and in `data` or a devkit there."""

MAPPINGS = ("meta.mat", "map_clsloc.txt")
"""Files of a devkit that say which class its numbers stand for."""


def find_label_file(folder: Path) -> Path | None:
    """The label file of a folder of images, or None."""
    root = folder.resolve()
    near = [root, root.parent, *(p for name in ("data", "ILSVRC2012_devkit_t12/data") for p in (root.parent / name,))]
    return next((place / name for place in near for name in USUAL_NAMES if (place / name).is_file()), None)


def read_label_file(text: str, file: Path, names: Sequence[str], wnids: Mapping[str, int]) -> np.ndarray:
    """The class of each image, int64 [N], from a file of one of these kinds (`text`: the source, for errors):

    - lines "NAME CLASS" or "NAME,CLASS" (Caffe's val.txt, Kaggle's LOC_val_solution.csv), CLASS being a wnid or the
      rank of one, 0…999; images are found by name, with or without folder and ending;
    - 50000 lines of one wnid or one rank, for ILSVRC2012_val_00000001 and on;
    - the same with the devkit's own numbers 1…1000 (ground truth), where meta.mat or map_clsloc.txt lies beside it.

    Raises QuantlensError for another kind of file, and for images that have no label in it.
    """
    where = f"source {text!r}: {file}"
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = (getattr(error, "strerror", None) or "it is not a text file").lower()
        raise QuantlensError(f"{where} cannot be read: {reason}") from error
    rows = [re.split(r"[\s,;]+", line) for line in lines if line and not line.startswith("#")]
    if len(rows) > 1 and min(map(len, rows[:2])) > 1 and _class(rows[1][1]) is not None and _class(rows[0][1]) is None:
        rows = rows[1:]  # a line of titles
    if not rows:
        raise QuantlensError(f"{where} is empty; it must have a line for each image")
    if all(len(row) == 1 for row in rows):
        labels = _by_number(where, file, [row[0] for row in rows], names, wnids)
    else:
        labels = _by_name(where, rows, names, wnids)
    return np.array(labels, dtype=np.int64)


def _class(text: str) -> str | int | None:
    return int(text) if re.fullmatch(r"\d+", text) else text if re.fullmatch(r"n\d{8}", text) else None


def _rank(where: str, text: str, wnids: Mapping[str, int]) -> int:
    found = _class(text)
    rank = wnids.get(found) if isinstance(found, str) else found
    if rank is None or not 0 <= rank < len(wnids):
        raise QuantlensError(f"{where} has the class {text!r}; write a wnid of ImageNet-1k or its rank, 0 to 999")
    return rank


def _by_name(where: str, rows: list[list[str]], names: Sequence[str], wnids: Mapping[str, int]) -> list[int]:
    known = {_stem(row[0]): row[1] for row in rows if len(row) > 1}
    missing = [name for name in names if _stem(name) not in known]
    if missing:
        raise QuantlensError(
            f"{where} has no label for {len(missing)} of the {len(names)} images, the first is {missing[0]}; is it the "
            "label file of these images?"
        )
    return [_rank(where, known[_stem(name)], wnids) for name in names]


def _stem(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2].partition(".")[0]


def _by_number(where: str, file: Path, lines: list[str], names: Sequence[str], wnids: Mapping[str, int]) -> list[int]:
    numbers = [re.search(r"_(\d{8})$", _stem(name)) for name in names]
    if not all(numbers):
        raise QuantlensError(
            f"{where} has one label a line, which are those of ILSVRC2012_val_00000001 and on; "
            f"{names[numbers.index(None)]} is not named so: write lines NAME CLASS"
        )
    places = [int(number[1]) for number in numbers if number is not None]
    if max(places) > len(lines) or min(places) < 1:
        raise QuantlensError(
            f"{where} has {len(lines)} labels and image {names[int(np.argmax(places))]} is number {max(places)}"
        )
    whole = {line for line in lines if line.isdigit()}
    if whole and "0" not in whole:  # a devkit counts from 1, in an order of its own
        mapping = _devkit(where, file)
        unknown = next((line for line in whole if int(line) not in mapping), None)
        if unknown is not None:
            raise QuantlensError(f"{where} has the number {unknown}, which the devkit does not know")
        lines = [mapping[int(line)] if line.isdigit() else line for line in lines]
    return [_rank(where, lines[place - 1], wnids) for place in places]


def _devkit(where: str, file: Path) -> dict[int, str]:
    """The devkit's own number of each class -> its wnid. Raises QuantlensError where no file says so."""
    found = next((file.parent / name for name in MAPPINGS if (file.parent / name).is_file()), None)
    if found is None:
        raise QuantlensError(
            f"{where} has the numbers of ImageNet's devkit, whose order is not that of the classes; put the devkit's "
            f"{' or '.join(MAPPINGS)} beside it, or use a file with wnids (LOC_val_solution.csv) or ranks (val.txt)"
        )
    if found.suffix == ".txt":
        rows = [line.split() for line in found.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {int(row[1]): row[0] for row in rows if len(row) > 1 and row[1].isdigit()}
    from scipy.io import loadmat

    try:
        table: Any = loadmat(found, squeeze_me=True, struct_as_record=False)["synsets"]
        return {int(row.ILSVRC2012_ID): str(row.WNID) for row in np.atleast_1d(table)}
    except (KeyError, AttributeError, ValueError, TypeError, OSError) as error:
        raise QuantlensError(
            f"{where}: {found.name} beside it is not the devkit's ({error}); unpack it again"
        ) from error
