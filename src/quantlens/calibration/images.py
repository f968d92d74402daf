"""Calibration images: where they come from, in chunks, checked; and views of them."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.data import ImageSet, as_image_set
from quantlens.data.given import check_values, drawn
from quantlens.data.shared import content_digests
from quantlens.data.sources import NO_IMAGES, open_calibration
from quantlens.errors import QuantlensError
from quantlens.graph import VIEWS, Graph, op_name

CHUNK = 32
"""Images that go through the graph together."""


MOST = 1024
"""Images that are read of an iterable, at most: one may go on for ever."""

DIGESTS = 256
"""Images of which a checkpoint keeps a hash, at most: they tell whether it is evaluated on what it was made with."""

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
        self.content = ""
        self.others: Mapping[int, Tensor] = {}
        """What else the model takes, by the number of the graph's input; of a batch a row for each image."""

    @classmethod
    def of(
        cls, images: Any, preprocess: Any, *, device: torch.device | str = "cpu", seed: int | None = None
    ) -> "Calibration":
        """From whatever `data.as_image_set` accepts; from None (or "none") images that are made. seed: draws 32 images
        of a SOURCE text (unless it says how many) or of a map-style data set; None takes all. Of an iterable,
        :data:`MOST` images are read.

        Raises QuantlensError: no images, wrong shape, values that are not finite.
        """
        device = torch.device(device)
        if isinstance(images, Calibration):
            return images
        if images is None or (isinstance(images, str) and (seed is not None or images == NO_IMAGES)):
            images = open_calibration(images, seed=seed or 0)
        elif seed is not None:
            images = drawn(images, seed)
        size = tuple(preprocess.input_size)
        if not isinstance(images, Tensor) and not (isinstance(images, list | tuple) and not images):
            check = partial(_check_shape, size=size)
            found = as_image_set(images, preprocess, "calibration images", most=MOST, check=check)
            if found.values is not None and not isinstance(images, ImageSet):
                images = found.values
            else:
                images = found
                if found.values is not None:
                    check(found.values)
        if isinstance(images, Tensor):
            images = images.detach()
            _check_shape(images, size)
            check_values(images, "calibration images")
            if not bool(torch.isfinite(images).all()):
                raise QuantlensError("calibration images hold NaN or infinity")
            content = images.cpu().contiguous().float().numpy()
            source, fingerprint = "tensor", hashlib.sha256(content.data).hexdigest()[:16]
        elif len(images):
            source, fingerprint = str(images.source), images.fingerprint
        if len(images) == 0:
            raise QuantlensError(
                "no calibration images: give at least one (32 is the usual number), or None for made ones"
            )
        calibration = cls(images, len(images), source=source, fingerprint=fingerprint, device=device)
        calibration.content = "".join(content_digests(images, preprocess, DIGESTS))
        return calibration

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

    def inputs(self, graph: Graph, index: int) -> dict[fx.Node, Tensor]:
        """Chunk ``index`` of all that the graph takes."""
        found = {graph.input: self.chunk(index)}
        for number, value in self.others.items():
            node, rows = graph.inputs[number], slice(index * CHUNK, min((index + 1) * CHUNK, self.count))
            found[node] = (value[rows] if node.meta["shape"][:1] == (None,) else value).to(self.device)
        return found

    def __iter__(self) -> Iterator[Tensor]:
        return (self.chunk(i) for i in range(self.pieces))

    def head(self, count: int) -> "Calibration":
        """The first ``count`` images (all, if there are fewer)."""
        fingerprint = None if count < self.count else self.fingerprint
        count = min(count, self.count)
        found = Calibration(self._images, count, source=self.source, fingerprint=fingerprint, device=self.device)
        found.others = self.others
        return found

    def info(self, *, content: bool = False) -> dict[str, Any]:
        """Where the images come from; content: also hashes of the first :data:`DIGESTS`, in one text."""
        found = {"source": self.source, "n": self.count, "fingerprint": self.fingerprint}
        return {**found, "content": self.content} if content else found


def _check_shape(images: Tensor, size: tuple[int, ...]) -> None:
    if images.dim() != 4 or tuple(images.shape[1:]) != size or not images.is_floating_point():
        raise QuantlensError(
            f"calibration images have shape {list(images.shape)} and type {images.dtype}; the model wants float [N, "
            f"{', '.join(map(str, size))}], prepared with its own mean and deviation"
        )


# -- views of images -----------------------------------------------------------------------------------------------
# Views of calibration images, for training on few images without labels: crops and mirror images stand for other
# photographs of the same kind; images that no longer show anything known (tiles in another order, two images in one,
# noise with an image's spectrum) stand for out-of-distribution images.


SMALLEST = 0.35
"""Smallest area of a crop, as a share of the image (timm trains with 0.08; a crop that small shows another thing)."""

ASPECT = (3 / 4, 4 / 3)
"""Range of a crop's width over its height, relative to the image's."""

TILES = (2, 4, 7)
"""Tiles per side of images whose tiles are shuffled."""


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image cut at random (area :data:`SMALLEST` to 1, aspect :data:`ASPECT`), stretched to its old size, and
    mirrored or not: float [B, C, H, W]."""
    count = len(images)
    area, aspect, left, top, mirror = torch.rand(5, count, generator=generator)
    area = SMALLEST + (1 - SMALLEST) * area
    aspect = torch.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * aspect)
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = torch.where(mirror < 0.5, width, -width)
    transform[:, 1, 1] = height
    transform[:, 0, 2] = (2 * left - 1) * (1 - width)
    transform[:, 1, 2] = (2 * top - 1) * (1 - height)
    grid = nn.functional.affine_grid(transform.to(images), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image with its tiles in another order; how many tiles per side is drawn from those of :data:`TILES` that
    divide the image (none: the image as it is)."""
    count, _, height, width = images.shape
    fitting = [t for t in TILES if height % t == 0 and width % t == 0]
    if not fitting:
        return images
    side = fitting[int(torch.randint(len(fitting), (), generator=generator))]
    size = height // side, width // side
    tiles = nn.functional.unfold(images, size, stride=size)  # [B, values of a tile, tiles]
    order = torch.rand(count, side * side, generator=generator).argsort(1).to(images.device)
    return nn.functional.fold(tiles.gather(2, order[:, None].expand_as(tiles)), (height, width), size, stride=size)


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image mixed with the one before it in the batch, at most equally: λ·x + (1 − λ)·x', λ in ½ … 1."""
    share = (0.5 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator)).to(images)
    return share * images + (1 - share) * images.roll(1, 0)


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise with every image's spectrum: its Fourier amplitudes with the phases of white noise, equal in all channels,
    so that the colours stay."""
    shape = (len(images), 1, *images.shape[2:])
    phases = torch.fft.rfft2(torch.randn(shape, generator=generator)).angle().to(images.device)
    phases[..., 0, 0] = 0
    spectrum = torch.fft.rfft2(images)
    turned = torch.polar(torch.ones_like(phases), phases) * spectrum
    turned[..., 0, 0] = spectrum[..., 0, 0]  # the mean
    return torch.fft.irfft2(turned, s=images.shape[2:])


OOD_VIEWS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (shuffled, mixed, noise)
"""What makes an out-of-distribution image of an image."""


def composed(images: Tensor, generator: torch.Generator) -> Tensor:
    """What a detector could see as well: every image stretched, cut or shrunk (edges 0.4 to 1.3 of its own, mirrored
    beyond it), often with a part of another one put in, in other brightness and colours, now and then a negative."""
    count, _, height, width = images.shape

    def warped(seen: Tensor) -> Tensor:
        size, aspect, left, top = torch.rand(4, count, generator=generator)
        size, aspect = 0.4 * (1.3 / 0.4) ** size, torch.exp(0.4 * (aspect - 0.5))
        transform = torch.zeros(count, 2, 3)
        for axis, (edge, place) in enumerate(((size * aspect, left), (size / aspect, top))):
            transform[:, axis, axis], transform[:, axis, 2] = edge, (2 * place - 1) * (1 - edge).abs()
        grid = nn.functional.affine_grid(transform.to(seen), list(seen.shape), align_corners=False)
        return nn.functional.grid_sample(seen, grid, padding_mode="reflection", align_corners=False)

    order = torch.randperm(count, generator=generator).to(images.device)
    whole, part = warped(images), warped(images[order])
    inside = torch.rand(count, generator=generator)[:, None, None] < 0.6
    for edge, shape in ((width, (1, width)), (height, (height, 1))):
        size, place = torch.rand(2, count, generator=generator)
        first = place * (0.7 - 0.5 * size) * edge
        at = torch.arange(edge)
        inside = inside & ((at >= first[:, None]) & (at < (first + (0.3 + 0.5 * size) * edge)[:, None])).view(
            -1, *shape
        )
    seen = torch.where(inside[:, None].to(images.device), part, whole)
    gain, shift = torch.rand(2, count, images.shape[1], 1, 1, generator=generator)
    sign = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.15, -1.0, 1.0)
    changed = (seen * (0.7 + 0.6 * gain).to(seen) + (0.4 * shift - 0.2).to(seen)) * sign.to(seen)
    return changed.clamp(images.amin(), images.amax())


def draw(images: Tensor, ood_share: float, generator: torch.Generator) -> Tensor:
    """A view of every image [B, C, H, W]: with probability ``ood_share`` an out-of-distribution image made of a crop of
    it, each kind of :data:`OOD_VIEWS` equally often, else a crop. generator: on the CPU, so that all devices see the
    same."""
    chosen = torch.rand(len(images), generator=generator)
    kind = torch.randint(len(OOD_VIEWS), (len(images),), generator=generator)
    kind[chosen >= ood_share] = -1
    crops = cropped(images, generator)
    seen = crops
    for number, change in enumerate(OOD_VIEWS):
        # of all images, chosen or not: the others are what an image is mixed with
        where = (kind == number)[:, None, None, None].to(images.device)
        seen = torch.where(where, change(crops, generator), seen)
    return seen


def with_views(
    calibration: Calibration, count: int, seed: int, view: Callable[[Tensor, torch.Generator], Tensor]
) -> Calibration:
    """The calibration images, followed by ``count`` views of theirs, no image more often than another. They are kept in
    memory. view: (images, generator) -> images, such as :func:`composed`."""
    if count <= 0:
        return calibration
    generator, chunks = torch.Generator().manual_seed(seed), list(calibration)
    views: list[Tensor] = []
    while sum(map(len, views)) < count:
        views.append(view(chunks[len(views) % len(chunks)], generator))
    images = torch.cat([*chunks, *views])[: calibration.count + count]
    source = f"{calibration.source} and {count} views"
    return Calibration(images, len(images), source=source, fingerprint=None, device=calibration.device)
