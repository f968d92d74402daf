"""Calibration images: where they come from, in chunks, checked."""

from __future__ import annotations

import hashlib
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
    """Calibration images in chunks of :data:`CHUNK`, with where they come from.

    Memory: images given as an image set are read chunk by chunk when they are needed; tensors stay where they are.
    """

    def __init__(self, images: Any, count: int, *, source: str, fingerprint: str | None, device: torch.device):
        self._images, self.count = images, count
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
            batches = [torch.as_tensor(b[0] if isinstance(b, list | tuple) else b) for b in images]
            images = torch.cat(batches or [torch.empty(0, *preprocess.input_size)])
        if isinstance(images, Tensor):
            _check(images, tuple(preprocess.input_size))
            content = images.detach().cpu().contiguous().float().numpy().tobytes()
            source, fingerprint = "tensor", hashlib.sha256(content).hexdigest()[:16]
        else:
            from quantlens.data import as_image_set
            from quantlens.data.sources import open_calibration

            if isinstance(images, str) and seed is not None:
                images = open_calibration(images, seed=seed)
            images = as_image_set(images, preprocess)
            source, fingerprint = str(images.source), images.fingerprint
        if len(images) == 0:
            raise QuantlensError("no calibration images: give at least one, 32 is the usual number")
        return cls(images, len(images), source=source, fingerprint=fingerprint, device=device)

    def __len__(self) -> int:
        return self.count

    @property
    def pieces(self) -> int:
        return math.ceil(self.count / CHUNK)

    def chunk(self, index: int) -> Tensor:
        """Chunk ``index`` on the device: float32 [≤ 32, 3, H, W], a tensor of its own."""
        start, stop = index * CHUNK, min((index + 1) * CHUNK, self.count)
        given = isinstance(self._images, Tensor)
        images = self._images[start:stop] if given else self._images.tensor(start, stop)
        # a method may write into what it is shown
        return images.to(self.device, torch.float32, copy=given, memory_format=torch.contiguous_format)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.chunk(i) for i in range(self.pieces))

    def head(self, count: int) -> Calibration:
        """The first ``count`` images (all, if there are fewer)."""
        fingerprint = None if count < self.count else self.fingerprint
        count = min(count, self.count)
        return Calibration(self._images, count, source=self.source, fingerprint=fingerprint, device=self.device)

    def info(self) -> dict[str, Any]:
        return {"source": self.source, "n": self.count, "fingerprint": self.fingerprint}


def _check(images: Tensor, size: tuple[int, ...]) -> None:
    if images.dim() != 4 or tuple(images.shape[1:]) != size or not images.is_floating_point():
        raise QuantlensError(
            f"calibration images have shape {list(images.shape)} and type {images.dtype}; the model wants float [N, "
            f"{', '.join(map(str, size))}], prepared with its own mean and deviation"
        )
    if not bool(torch.isfinite(images).all()):
        raise QuantlensError("calibration images hold NaN or infinity")
