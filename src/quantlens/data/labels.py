"""Labels as sources and people give them -> int64 [N], or int64 [N, L] of 0 and 1 where a picture has several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantlens.errors import QuantlensError


def as_labels(
    values: Sequence[Any] | None, class_names: list[str] | None, what: str
) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels, class names) of one value per picture: whole numbers; names, whose label is their rank (or their place
    in `class_names`); lists of 0/1 of one length, or of classes where `class_names` says how many there are.

    Labels that are all -1 are hidden ones: None. Raises QuantlensError, beginning with `what`, for anything else.
    """
    if values is None or not len(values):
        return None, class_names
    if missing := sum(value is None for value in values):
        raise QuantlensError(f"{what}: {missing} of the {len(values)} labels are missing; give a label to every image")
    if all(isinstance(value, str) for value in values):
        names = class_names or sorted(set(values))
        rank = {name: k for k, name in enumerate(names)}
        if unknown := next((value for value in values if value not in rank), None):
            raise QuantlensError(f"{what}: {unknown!r} is none of its class names")
        return np.array([rank[value] for value in values], dtype=np.int64), names
    if all(isinstance(value, list | tuple | np.ndarray) for value in values):
        return _several(values, class_names, what), class_names
    numbers = np.asarray(values)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iubf" or not np.array_equal(numbers, np.round(numbers)):
        raise QuantlensError(f"{what}: labels must be whole numbers or names, one for each image")
    labels = numbers.astype(np.int64)
    return (None if (labels == -1).all() else labels), class_names


def _several(values: Sequence[Any], class_names: list[str] | None, what: str) -> np.ndarray:
    """int64 [N, L] of 0 and 1."""
    lengths = {len(value) for value in values}
    count = len(class_names) if class_names else 0
    flat = {float(v) for value in values for v in value}
    hot = len(lengths) == 1 and flat <= {0.0, 1.0} and (not count or lengths == {count})
    if hot and lengths != {0}:
        return np.asarray(values).astype(np.int64)
    if not count or not flat <= set(map(float, range(count))):
        raise QuantlensError(
            f"{what}: lists of labels must be 0 or 1 for every class, or numbers of classes whose names are there"
        )
    labels = np.zeros((len(values), count), dtype=np.int64)
    for row, value in enumerate(values):
        labels[row, np.asarray(value, dtype=np.int64)] = 1
    return labels
