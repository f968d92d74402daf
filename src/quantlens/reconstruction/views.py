"""Views of calibration images, for training on few images without labels: crops and mirror images stand for other
photographs of the same kind; images that no longer show anything known (tiles in another order, two images in one,
noise with an image's spectrum) stand for out-of-distribution images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantlens.calibration import Calibration

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


def with_views(calibration: Calibration, count: int, ood_share: float, seed: int) -> Calibration:
    """The calibration images, followed by ``count`` views of theirs (:func:`draw`), no image more often than another.
    They are kept in memory."""
    if count <= 0:
        return calibration
    generator, chunks = torch.Generator().manual_seed(seed), list(calibration)
    views: list[Tensor] = []
    while sum(map(len, views)) < count:
        views.append(draw(chunks[len(views) % len(chunks)], ood_share, generator))
    images = torch.cat([*chunks, *views])[: calibration.count + count]
    source = f"{calibration.source} and {count} views"
    return Calibration(images, len(images), source=source, fingerprint=None, device=calibration.device)
