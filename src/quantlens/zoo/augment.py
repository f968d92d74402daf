"""Augmentation of small grey images as tensors: seeded, vectorised over the batch, for the recipes of the
zoo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes. Lengths are fractions of the image side, angles are in degrees."""

    rotate: float = 12.0
    shear: float = 0.2
    scale: float = 0.12
    translate: float = 0.06
    elastic: float = 0.05  # standard deviation of the displacement, a smooth field of 4x4 control points
    contrast: float = 0.2
    noise: float = 0.04  # standard deviation, in units of the image's 0..1 range
    cutout: float = 0.3  # probability of one black square, a quarter of the side wide
    mixup: float = 0.2  # alpha of the Beta distribution; 0 switches it off


def augment(images: torch.Tensor, how: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """float32 [B,C,H,W] in 0..1 -> the same shape, each image warped, changed in contrast, noised, perhaps
    cut out.
    """
    batch, _, height, width = images.shape
    warped = F.grid_sample(
        images,
        _grid(batch, height, width, how, generator),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    gain = 1 + how.contrast * _uniform((batch, 1, 1, 1), generator)
    noise = how.noise * torch.randn(batch, 1, height, width, generator=generator)
    changed = (warped * gain + noise).clamp_(0, 1)
    return changed * _kept(batch, height, width, how.cutout, generator)


def mix(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2018, equation 1): one weight lambda ~ Beta(alpha, alpha) a batch, partners drawn
    at random.

    `targets` are class probabilities [B,K].
    """
    if alpha <= 0:
        return images, targets
    # A Beta variable from two Gamma ones; torch's own sampler takes no generator, so its seed is drawn from
    # ours.
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        weight = float(torch.distributions.Beta(alpha, alpha).sample())
    partner = torch.randperm(len(images), generator=generator)
    return weight * images + (1 - weight) * images[partner], weight * targets + (1 - weight) * targets[partner]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform in -1..1."""
    return torch.rand(shape, generator=generator) * 2 - 1


def _grid(batch: int, height: int, width: int, how: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """Sampling grid [B,H,W,2] in -1..1: a random affine map plus a smooth random displacement."""
    angle = torch.deg2rad(how.rotate * _uniform((batch,), generator))
    cos, sin = angle.cos(), angle.sin()
    shear = how.shear * _uniform((batch,), generator)
    scale = 1 + how.scale * _uniform((batch, 2), generator)
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    stretch = torch.stack(
        [torch.stack([scale[:, 0], shear], -1), torch.stack([torch.zeros(batch), scale[:, 1]], -1)], 1
    )
    shift = 2 * how.translate * _uniform((batch, 2, 1), generator)
    grid = F.affine_grid(torch.cat([turn @ stretch, shift], -1), [batch, 1, height, width], align_corners=False)
    control = 2 * how.elastic * torch.randn(batch, 2, 4, 4, generator=generator)
    field = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
    return grid + field.permute(0, 2, 3, 1)


def _kept(batch: int, height: int, width: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Mask [B,1,H,W] of ones with, in a share `probability` of the images, one square of zeros a quarter of
    the side wide.
    """
    size = height // 4
    top = torch.randint(0, height - size + 1, (batch, 1), generator=generator)
    left = torch.randint(0, width - size + 1, (batch, 1), generator=generator)
    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    in_rows = (rows >= top) & (rows < top + size)
    in_columns = (columns >= left) & (columns < left + size)
    cut = torch.rand(batch, generator=generator) < probability
    hole = in_rows[:, :, None] & in_columns[:, None, :] & cut[:, None, None]
    return (~hole).to(torch.float32)[:, None]
