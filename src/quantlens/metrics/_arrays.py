"""Checked arrays, blocks of rows, and a softmax that stays exact near 0 and 1. Shared by the files of this
room.

Everything numerical here is float64. Large inputs are kept in their own dtype and turned to float64 one block
of rows at a time, so that 50 000 x 1000 float32 logits never stand in memory twice.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantlens.errors import QuantlensError

Float = NDArray[np.float64]
Int = NDArray[np.int64]

BLOCK_ELEMENTS = 1 << 21
"""Elements of one float64 block: 16 MB. A function holds a handful of such blocks at a time."""


def row_blocks(n_rows: int, row_elements: int) -> Iterator[slice]:
    """Slices that cut `n_rows` rows into blocks of at most BLOCK_ELEMENTS elements, at least one row each."""
    step = max(1, BLOCK_ELEMENTS // max(1, row_elements))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def per_row(matrix: np.ndarray, function: Callable[[Float], Float], row_elements: int = 0) -> Float:
    """`function` (float64 block [n, M] -> [n]) over blocks of rows, so that memory stays bounded."""
    n, width = matrix.shape
    out = np.empty(n)
    for rows in row_blocks(n, max(width, row_elements)):
        out[rows] = function(matrix[rows].astype(np.float64))
    return out


def as_matrix(values: ArrayLike, name: str) -> np.ndarray:
    """`values` as a real 2-D array [N, M] with M >= 1 and finite entries; floats keep their dtype.

    Raises QuantlensError, with `name` in the sentence, where the array is none of that.
    """
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] == 0:
        raise QuantlensError(f"the {name} have shape {array.shape}, but must be a matrix, one row per image")
    if array.dtype.kind not in "fiu":
        raise QuantlensError(f"the {name} are of type {array.dtype}, but must be real numbers")
    for rows in row_blocks(*array.shape):
        finite = np.isfinite(array[rows]).all(axis=1)
        if not finite.all():
            first = rows.start + int(np.argmin(finite))
            raise QuantlensError(
                f"the {name} of image {first} hold NaN or infinite values: the model overflows there, "
                "so look for broken weights or ranges"
            )
    return array


def as_vector(values: ArrayLike, name: str) -> Float:
    """`values` as a float64 vector [N], N >= 1, entries finite; QuantlensError, naming it, otherwise."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise QuantlensError(f"the {name} have shape {array.shape}, but must be one number per image")
    if array.size == 0:
        raise QuantlensError(f"there are no {name}: at least one image is needed")
    return as_matrix(array[:, None], name)[:, 0].astype(np.float64)


def as_labels(labels: ArrayLike, n_images: int, n_classes: int) -> Int:
    """`labels` as int64 [n_images], each in 0..n_classes-1; QuantlensError otherwise."""
    array = np.asarray(labels)
    if array.shape != (n_images,):
        raise QuantlensError(f"the labels have shape {array.shape}, but the logits are of {n_images} images")
    if array.dtype.kind == "f" and np.all(np.mod(array, 1) == 0):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise QuantlensError(f"the labels are of type {array.dtype}, but must be whole class numbers")
    wrong = (array < 0) | (array >= n_classes)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise QuantlensError(
            f"label {array[first]} of image {first} is outside 0..{n_classes - 1}, the classes of the model: "
            "give labels that belong to it"
        )
    return array.astype(np.int64)


def log_softmax(logits: np.ndarray) -> Float:
    """log p [N, K] of finite logits [N, K].

    The largest logit is taken out of the sum, log p_max = -log1p(sum of the others' exp(f - f_max)), so that
    1 - p_max = -expm1(log p_max) keeps its digits when p_max rounds to 1.
    """
    f = np.asarray(logits, dtype=np.float64)
    top = f.argmax(axis=1)[:, None]
    shifted = f - np.take_along_axis(f, top, axis=1)
    others = np.exp(shifted)
    np.put_along_axis(others, top, 0.0, axis=1)
    return shifted - np.log1p(others.sum(axis=1, keepdims=True))
