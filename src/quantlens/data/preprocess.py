"""What a model expects of its images: size, crop, interpolation, mean and standard deviation.

The image part (resize, centre crop, uint8) is PIL arithmetic and is cached on disk; the normalisation is done
when a batch is used. Together they equal timm's evaluation transform
(`timm.data.create_transform(is_training=False)`) bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from quantlens.errors import BadImageError, QuantlensError, UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    import torch

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_CROP_PCT = 0.875  # timm's, for a configuration that states none

# A 1x60000 image resized to 248 on its shorter side would need 15 million columns; stop before the memory
# does.
MAX_RESIZED_PIXELS = 2**26


@dataclass(frozen=True)
class Preprocess:
    """Evaluation transform of one model.

    `input_size` is (3, H, W); `mean` and `std` are per channel in units of the 0..1 pixel range. `crop_mode`:

    - "center": the shorter side is resized to floor(side / crop_pct), then the centre is cropped;
    - "squash": both sides are resized to floor(side / crop_pct), aspect ratio lost, then the centre is
      cropped;
    - "border": the longer side is resized to floor(side / crop_pct), the rest is filled with the mean colour.

    An image smaller than the crop is padded with black (with the mean colour in "border"), as torchvision
    does.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = DEFAULT_CROP_PCT
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for field, kind in (("input_size", int), ("mean", float), ("std", float)):
            object.__setattr__(self, field, tuple(kind(v) for v in getattr(self, field)))
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        lengths = {len(self.input_size), len(self.mean), len(self.std)}
        if lengths != {3} or self.input_size[0] != 3 or min(self.input_size) < 1:
            raise UnsupportedError(
                f"preprocessing: input_size {self.input_size} must be (3, height, width) with positive sides, mean "
                f"{self.mean} and std {self.std} of three numbers; quantlens reads colour images"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise UnknownNameError("interpolation", self.interpolation, INTERPOLATIONS)
        if self.crop_mode not in CROP_MODES:
            raise UnknownNameError("crop mode", self.crop_mode, CROP_MODES)
        if not (math.isfinite(self.crop_pct) and self.crop_pct > 0):
            raise QuantlensError(f"preprocessing: crop_pct {self.crop_pct} must be a positive number such as 0.9")
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise QuantlensError(
                f"preprocessing: mean {self.mean} and std {self.std} must be finite, and std positive, in units of 0..1"
            )

    @classmethod
    def from_timm(cls, cfg: Mapping[str, Any]) -> Preprocess:
        """From a timm `pretrained_cfg` dict (or `resolve_data_config` result); what it does not state gets
        timm's default.
        """
        return cls(**{field.name: cfg[field.name] for field in fields(cls) if cfg.get(field.name)})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocess:
        """Inverse of `to_dict`. Raises UnknownNameError for a key that is none of the fields."""
        known = cls().to_dict()
        for key in data:
            if key not in known:
                raise UnknownNameError("preprocessing field", key, known)
        return cls(**data)

    def image_key(self) -> dict[str, Any]:
        """The fields that decide the uint8 pixels (the cache key); mean only where it fills a border."""
        without = ("std",) if self.crop_mode == "border" else ("std", "mean")
        return {key: value for key, value in self.to_dict().items() if key not in without}

    def resize_crop(self, image: Image.Image) -> np.ndarray:
        """RGB image -> uint8 [3,H,W]: resize (PIL, antialiased) and centre crop.

        Raises BadImageError where the resized image would have more than 2^26 pixels (a very long, thin
        image).
        """
        height, width = self.input_size[1:]
        target = self._resized(image.height, image.width)
        if target[0] * target[1] > MAX_RESIZED_PIXELS:
            raise BadImageError(
                f"is {image.width}x{image.height}, too long and thin to resize to {target[1]}x{target[0]}; crop it"
            )
        if target != (image.height, image.width):
            image = image.resize((target[1], target[0]), INTERPOLATIONS[self.interpolation])
        fill = tuple(round(255 * m) for m in self.mean) if self.crop_mode == "border" else (0, 0, 0)
        image = _centre(image, height, width, fill)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _resized(self, image_height: int, image_width: int) -> tuple[int, int]:
        """(height, width) after the resize, before the crop."""
        height, width = (math.floor(side / self.crop_pct) for side in self.input_size[1:])
        if self.crop_mode == "squash":
            return height, width
        if self.crop_mode == "center" and height == width:
            # torchvision's Resize with one number: the longer side is rounded down
            if image_width <= image_height:
                return int(width * image_height / image_width), width
            return height, int(height * image_width / image_height)
        ratios = (image_height / height, image_width / width)
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(1, round(image_height / ratio)), max(1, round(image_width / ratio))

    def normalize(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [...,3,H,W] -> float32: (x / 255 - mean) / std, in the order of ToTensor and Normalize."""
        import torch

        x = torch.from_numpy(np.array(pixels, copy=True)) if isinstance(pixels, np.ndarray) else pixels
        mean = torch.tensor(self.mean, dtype=torch.float32, device=x.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=x.device).view(3, 1, 1)
        return x.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Image (any PIL mode) -> normalised float32 [3,H,W]."""
        return self.normalize(self.resize_crop(image.convert("RGB")))


def _centre(image: Image.Image, height: int, width: int, fill: tuple[int, ...]) -> Image.Image:
    """Centre crop to height x width; a side that is too short is first padded, the odd pixel below and to the
    right.
    """
    missing_y, missing_x = max(0, height - image.height), max(0, width - image.width)
    if missing_x or missing_y:
        left, top = missing_x // 2, missing_y // 2
        image = ImageOps.expand(image, (left, top, missing_x - left, missing_y - top), fill)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
