"""Calibration images: where they come from, in chunks, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from quantlens.errors import QuantlensError
from quantlens.graph import Graph
from quantlens.graph.graph import VIEWS, op_name

CHUNK = 32
"""Images that go through the graph together."""


BACKWARD_MEMORY = 1 << 30
"""Bytes of activations that one backward pass may keep; they decide how many images go through together."""


def images_together(graph: Graph, passes: int) -> int:
    """Images whose activations fit into :data:`BACKWARD_MEMORY` ``passes`` times, at least 1."""
    shapes = (n.meta.get("shape") or () for n in graph.fx.nodes if n.op == "call_function" and op_name(n) not in VIEWS)
    values = sum(math.prod(d for d in shape if d is not None) for shape in shapes if shape)
    return max(1, BACKWARD_MEMORY // (4 * passes * max(values, 1)))


class Calibration:
    """Calibration images in chunks of :data:`CHUNK` (or ``size``), with where they come from.

    Memory: images given as an image set are read chunk by chunk when they are needed; tensors stay where they are.
    """

    def __init__(
        self,
        images: Any,
        count: int,
        *,
        source: str,
        fingerprint: str | None,
        device: torch.device,
        size: int | None = None,
    ):
        self._images, self.count, self.size = images, count, CHUNK if size is None else size
        self.source, self.fingerprint, self.device = source, fingerprint, device

    @classmethod
    def of(
        cls, images: Any, preprocess: Any, *, device: torch.device | str = "cpu", seed: int | None = None
    ) -> Calibration:
        """From a float tensor [N, 3, H, W], an iterable of tensors or (tensor, labels) batches, an image set, or a
        source. seed: draws the images of a SOURCE text, 32 unless it says how many; None takes all.

        Raises QuantlensError: no images, wrong shape, values that are not finite.
        """
        device = torch.device(device)
        if isinstance(images, Calibration):
            return images
        if isinstance(images, Iterable) and not isinstance(images, str | Tensor) and not hasattr(images, "batches"):
            batches = [b[0] if isinstance(b, list | tuple) else b for b in images]
            images = (
                torch.cat([torch.as_tensor(b) for b in batches]) if batches else torch.empty(0, *preprocess.input_size)
            )
        if isinstance(images, Tensor):
            _check(images, tuple(preprocess.input_size))
            return cls(images, len(images), source="tensor", fingerprint=_fingerprint(images), device=device)
        from quantlens.data import as_image_set
        from quantlens.data.sources import open_calibration

        if isinstance(images, str) and seed is not None:
            images = open_calibration(images, seed=seed)
        found = as_image_set(images, preprocess)
        if len(found) == 0:
            raise QuantlensError("no calibration images: give at least one, 32 is the usual number")
        return cls(found, len(found), source=str(found.source), fingerprint=found.fingerprint, device=device)

    def __len__(self) -> int:
        return self.count

    @property
    def pieces(self) -> int:
        return math.ceil(self.count / self.size)

    def chunk(self, index: int) -> Tensor:
        """Chunk ``index`` on the device: float32 [≤ size, 3, H, W], a tensor of its own."""
        start, stop = index * self.size, min((index + 1) * self.size, self.count)
        given = isinstance(self._images, Tensor)
        images = self._images[start:stop] if given else self._images.tensor(start, stop)
        # a method may write into what it is shown
        return images.to(self.device, torch.float32, copy=given, memory_format=torch.contiguous_format)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.chunk(i) for i in range(self.pieces))

    def head(self, count: int) -> Calibration:
        """The first ``count`` images (all, if there are fewer)."""
        return self._same(count=min(count, self.count), fingerprint=None if count < self.count else self.fingerprint)

    def in_chunks(self, size: int) -> Calibration:
        """The same images in chunks of another size."""
        return self._same(size=size)

    def _same(self, **changes: Any) -> Calibration:
        same = {"count": self.count, "source": self.source, "fingerprint": self.fingerprint, "device": self.device}
        return Calibration(self._images, **{**same, "size": self.size, **changes})

    def info(self) -> dict[str, Any]:
        return {"source": self.source, "n": self.count, "fingerprint": self.fingerprint}


def _check(images: Tensor, size: tuple[int, ...]) -> None:
    if len(images) == 0:
        raise QuantlensError("no calibration images: give at least one, 32 is the usual number")
    if images.dim() != 4 or tuple(images.shape[1:]) != size or not images.is_floating_point():
        raise QuantlensError(
            f"calibration images have shape {list(images.shape)} and type {images.dtype}; the model wants float [N, "
            f"{', '.join(map(str, size))}], prepared with its own mean and deviation"
        )
    if not bool(torch.isfinite(images).all()):
        raise QuantlensError("calibration images hold NaN or infinity")


def _fingerprint(images: Tensor) -> str:
    import hashlib

    return hashlib.sha256(images.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()[:16]
