"""Augmentation of a whole batch at once, on its device. Random numbers come from torch's default generator, those of
mixup and cutmix (timm's) from numpy's."""

from collections.abc import Callable

import torch
from timm.data.mixup import Mixup
from torch import Tensor

from quantlens.data.preprocess import Preprocess
from quantlens.zoo.recipes import Augmentation

ERASED = (0.02, 0.33)
"""The smallest and the largest area that is erased, as shares of the picture (Zhong et al., Random Erasing, 2020)."""
RATIO = 3.3
"""The largest ratio of an erased rectangle's sides, either way."""


def prepared(pixels: Tensor, how: Augmentation, preprocess: Preprocess) -> Tensor:
    """uint8 [B, 3, H, W] as the model gets it in training: moved, mirrored, coloured, normalised, partly erased."""
    moved = shifted(pixels, how.crop, how.flip)
    if how.colour:
        moved = coloured(moved / 255, how.colour) * 255
    images = preprocess.normalize(moved)
    return erased(images, how.erase) if how.erase else images


def mixing(how: Augmentation, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup, cutmix, or for each batch one of both: images, labels [B] -> images, probabilities [B, K]."""
    if not (how.mixup or how.cutmix):
        return None
    return Mixup(how.mixup, how.cutmix, label_smoothing=0.0, num_classes=num_classes)


def shifted(images: Tensor, most: int, flip: bool) -> Tensor:
    """[B, C, H, W], each moved by -most to most pixels either way (black moves in) and, with `flip`, half of them
    mirrored."""
    if not most and not flip:
        return images
    (b, _, h, w), device = images.shape, images.device
    rows = torch.arange(h, device=device) + torch.randint(-most, most + 1, (b, 1), device=device)
    columns = torch.arange(w, device=device) + torch.randint(-most, most + 1, (b, 1), device=device)
    if flip:
        columns = torch.where(torch.rand(b, 1, device=device) < 0.5, columns.flip(1), columns)
    seen = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    picture = torch.arange(b, device=device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[picture, rows.clamp(0, h - 1)[:, :, None], columns.clamp(0, w - 1)[:, None, :]]
    return (moved * seen[..., None]).permute(0, 3, 1, 2)


def coloured(images: Tensor, most: float) -> Tensor:
    """[B, 3, H, W] in 0..1, each with its brightness, contrast and saturation times 1 - most to 1 + most."""

    def factors() -> Tensor:
        return 1 + most * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)

    weights = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    images = (images * factors()).clamp(0, 1)
    middle = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = (middle + (images - middle) * factors()).clamp(0, 1)
    grey = (images * weights).sum(1, keepdim=True)
    return (grey + (images - grey) * factors()).clamp(0, 1)


def erased(images: Tensor, probability: float) -> Tensor:
    """Normalised images [B, C, H, W], some of them with a rectangle of zeros, which is the mean colour."""
    b, _, h, w = images.shape
    chance, area, ratio, top, left = torch.rand(5, b, 1, device=images.device)
    area = ERASED[0] + (ERASED[1] - ERASED[0]) * area
    side = (RATIO ** (2 * ratio - 1)).sqrt()
    high, wide = (area.sqrt() * side).clamp(max=1) * h, (area.sqrt() / side).clamp(max=1) * w
    rows = torch.arange(h, device=images.device) + 0.5 - top * (h - high)
    columns = torch.arange(w, device=images.device) + 0.5 - left * (w - wide)
    inside = ((rows > 0) & (rows < high))[:, :, None] & ((columns > 0) & (columns < wide))[:, None, :]
    return images.masked_fill((inside & (chance < probability)[:, :, None])[:, None], 0.0)
