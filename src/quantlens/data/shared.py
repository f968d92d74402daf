"""Images that two sets share, found by what is in them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlens.data.images import TOLD, ImageSet
from quantlens.data.preprocess import Preprocess
from quantlens.errors import QuantlensWarning

if TYPE_CHECKING:
    import torch

COMPARED_BYTES = 4096
"""Pixels of an image that are compared: the rows in its middle, of the channel in the middle."""

DIGEST_BYTES = 8


def content_digests(
    images: ImageSet | torch.Tensor, preprocess: Preprocess | None, most: int | None = None
) -> list[str]:
    """A short hash of each image (the first `most`), as the model gets it: of its pixels, to which `preprocess` takes
    float values back where they were pixels, so that tensors and files of the same images agree."""
    pixels = images.pixels if isinstance(images, ImageSet) else None
    if pixels is None:
        values = images.values if isinstance(images, ImageSet) else images
        assert values is not None
        middle = _middle(values[:most]).detach().float().cpu().numpy()
        rows = (_as_pixels(row, preprocess, values.shape[1] // 2) for row in middle)
    else:
        rows = iter(_middle(pixels[:most]))
    return [hashlib.blake2b(row.tobytes(), digest_size=DIGEST_BYTES).hexdigest() for row in rows]


def _middle(images: Any) -> Any:
    """[N, rows, W] of images [N, C, H, W]."""
    channels, height, width = images.shape[1:]
    rows = max(1, min(height, COMPARED_BYTES // width))
    return images[:, channels // 2, (height - rows) // 2 : (height - rows) // 2 + rows]


def _as_pixels(row: np.ndarray, preprocess: Preprocess | None, channel: int) -> np.ndarray:
    if preprocess is None or channel >= len(preprocess.mean):
        return row
    found = (row.astype(np.float64) * preprocess.std[channel] + preprocess.mean[channel]) * 255
    whole = np.rint(found)
    near = np.abs(found - whole).max() < 0.02 and 0 <= whole.min() <= whole.max() <= 255
    return whole.astype(np.uint8) if near else row


def warn_shared(
    id: ImageSet, ood: Mapping[str, ImageSet], fit: ImageSet | None, calibration: Any, preprocess: Preprocess | None
) -> None:
    """One QuantlensWarning (each thing is said once of an ID set) where images that are learnt from are among those
    evaluated, or where an OOD set holds ID images. calibration: what a quantized model says of its calibration images,
    or None."""
    measured = {"the ID set": id, **{f"OOD set {name}": images for name, images in ood.items()}}
    found = {name: content_digests(images, preprocess) for name, images in measured.items()}
    known = set(found["the ID set"])
    said = [_shares(name, digests, "the ID set", known) for name, digests in list(found.items())[1:]]
    learnt = {} if fit is None else {"the fit set": set(content_digests(fit, preprocess))}
    if contents := (calibration or {}).get("content"):
        digits = 2 * DIGEST_BYTES
        learnt["the calibration images"] = {contents[k : k + digits] for k in range(0, len(contents), digits)}
    for other, digests in learnt.items():
        said += [_shares(name, images, other, digests) for name, images in found.items()]
    new = [text for text in said if text and text not in TOLD.setdefault(id, set())]
    if new:
        TOLD[id].update(new)
        warnings.warn(f"{'; '.join(new)}: what is measured on them misleads", QuantlensWarning, stacklevel=2)


def without_content(calibration: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a person wants to read of calibration images: all but the hashes."""
    return None if calibration is None else {key: value for key, value in calibration.items() if key != "content"}


def _shares(name: str, digests: list[str], other: str, known: set[str]) -> str:
    count = sum(digest in known for digest in digests)
    return f"{name} and {other} share {count} images ({count} of the {len(digests)} of {name})" if count else ""
