"""What a model expects of its images: size, crop, interpolation, mean and standard deviation.

The image part (resize, centre crop, uint8) is PIL arithmetic and is cached on disk; the normalisation is done
when a batch is used. Together they equal timm's evaluation transform
(`timm.data.create_transform(is_training=False)`) bit for bit, and with `resize` given those of Hugging Face's image
processors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from quantlens.data.sources import as_rgb
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
CHANNELS = ("rgb", "bgr")
RESIZERS = ("pil", "torchvision")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_CROP_PCT = 0.875  # timm's, for a configuration that states none

# A 1x60000 image resized to 248 on its shorter side would need 15 million columns; stop before the memory
# does.
MAX_RESIZED_PIXELS = 2**26


@dataclass(frozen=True)
class Preprocess:
    """Evaluation transform of one model.

    `input_size` is (channels, H, W): 3 channels, 1 (pictures become grey), or another number, for tensors alone.
    `mean` and `std` are per channel, as the model has them, in units of the 0..1 pixel range. `crop_mode`:

    - "center": the shorter side is resized to floor(side / crop_pct), then the centre is cropped;
    - "squash": both sides are resized to floor(side / crop_pct), aspect ratio lost, then the centre is
      cropped;
    - "border": the longer side is resized to floor(side / crop_pct), the rest is filled with the mean colour.

    `resize`, in place of both: the shorter side (one number), height and width (two), or no resize (`()`); then the
    centre is cropped, its odd pixel as Hugging Face's processors have it. `channels`: "rgb" or "bgr". `resizer`: "pil",
    or "torchvision", whose resize of a tensor differs from PIL's in about one pixel of a thousand, by a grey level.

    An image smaller than the crop is padded with black (with the mean colour in "border"), as torchvision does.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = DEFAULT_CROP_PCT
    crop_mode: str = "center"
    resize: tuple[int, ...] | None = None
    channels: str = "rgb"
    resizer: str = "pil"

    def __post_init__(self) -> None:
        for field, kind in (("input_size", int), ("mean", float), ("std", float), ("resize", int)):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(kind(v) for v in getattr(self, field)))
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise UnsupportedError(
                f"preprocessing: input_size {self.input_size} must be (channels, height, width), all positive"
            )
        if {len(self.mean), len(self.std)} != {self.input_size[0]}:
            raise UnsupportedError(
                f"preprocessing: input_size {self.input_size} has {self.input_size[0]} channels; mean {self.mean} and "
                f"std {self.std} must have as many numbers"
            )
        choices = (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES), ("channels", CHANNELS))
        for field, known in (*choices, ("resizer", RESIZERS)):
            if getattr(self, field) not in known:
                raise UnknownNameError(field.replace("_", " "), getattr(self, field), known)
        if self.resize is not None and (len(self.resize) > 2 or min(self.resize, default=1) < 1):
            raise UnsupportedError(f"preprocessing: resize {self.resize} must be the shorter side, or height and width")
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
        names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return cls(**{name: cfg[name] for name in names if cfg.get(name)})

    def for_size(self, input_size: tuple[int, ...]) -> Preprocess:
        """The same for another input size: an explicit resize grows or shrinks with it; one mean for all channels where
        there are not three."""
        input_size = tuple(int(v) for v in input_size)
        changes: dict[str, Any] = {"input_size": input_size}
        if len(input_size) == 3 and input_size[0] != self.input_size[0]:
            changes |= {n: (fmean(getattr(self, n)),) * input_size[0] for n in ("mean", "std")} | {"channels": "rgb"}
        if self.resize and len(input_size) == 3:
            sides = self.input_size[1:] if len(self.resize) == 2 else (min(self.input_size[1:]),)
            new = input_size[1:] if len(self.resize) == 2 else (min(input_size[1:]),)
            changes["resize"] = tuple(round(r * n / s) for r, n, s in zip(self.resize, new, sides, strict=True))
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `resize`, `channels` and `resizer` where they are not the defaults."""
        later = {"resize": None, "channels": "rgb", "resizer": "pil"}  # earlier releases had none of them
        stated = {key: value for key, value in vars(self).items() if key not in later or value != later[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in stated.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocess:
        """Inverse of `to_dict`. Raises UnknownNameError for a key that is none of the fields."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise UnknownNameError("preprocessing field", key, known)
        return cls(**data)

    def image_key(self) -> dict[str, Any]:
        """The fields that decide the uint8 pixels (the cache key); mean only where it fills a border."""
        without = ("std",) if self.crop_mode == "border" else ("std", "mean")
        return {key: value for key, value in self.to_dict().items() if key not in without}

    def resize_crop(self, image: Image.Image) -> np.ndarray:
        """RGB image -> uint8 [channels,H,W]: resize (antialiased) and centre crop.

        Raises BadImageError where the resized image would have more than 2^26 pixels (a very long, thin
        image), UnsupportedError for a model that wants neither 1 nor 3 channels.
        """
        channels, height, width = self.input_size
        if channels not in (1, 3):
            raise UnsupportedError(
                f"the model wants images of {channels} channels; pictures have 3, so give it tensors"
            )
        target = self._resized(image.height, image.width)
        if target[0] * target[1] > MAX_RESIZED_PIXELS:
            raise BadImageError(
                f"is {image.width}x{image.height}, too long and thin to resize to {target[1]}x{target[0]}; crop it"
            )
        if channels == 1:
            image = image.convert("L")
        if target != (image.height, image.width):
            image = _RESIZE[self.resizer](image, target, self.interpolation)
        fill = tuple(round(255 * m) for m in self.mean) if self.crop_mode == "border" else (0,) * channels
        image = _centre(image, height, width, fill, "timm" if self.resize is None else self.resizer)
        pixels = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels[::-1] if self.channels == "bgr" else pixels)

    def _resized(self, image_height: int, image_width: int) -> tuple[int, int]:
        """(height, width) after the resize, before the crop."""
        if self.resize is not None:
            if len(self.resize) == 1:
                short, long = self.resize[0], max(image_height, image_width)
                long = int(short * long / min(image_height, image_width))
                return (long, short) if image_width <= image_height else (short, long)
            return self.resize if self.resize else (image_height, image_width)  # type: ignore[return-value]
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

        if isinstance(pixels, np.ndarray):
            return torch.from_numpy(self.normalized(pixels))
        x = pixels
        mean = torch.tensor(self.mean, dtype=torch.float32, device=x.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=x.device).view(-1, 1, 1)
        return x.to(torch.float32).div_(255).sub_(mean).div_(std)

    def normalized(self, pixels: np.ndarray) -> np.ndarray:
        """The same, bit for bit, as an array, without torch."""
        mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std))
        found = pixels.astype(np.float32)
        found /= np.float32(255)
        found -= mean
        found /= std
        return found

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Image (any PIL mode) -> normalised float32 [channels,H,W], upright (see `sources.as_rgb`)."""
        return self.normalize(self.resize_crop(as_rgb(image)))


def _pil(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    return image.resize(size[::-1], INTERPOLATIONS[interpolation])


def _torchvision(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """As torchvision resizes a uint8 tensor."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    mode = InterpolationMode(interpolation)
    pixels = functional.pil_to_tensor(image)
    return functional.to_pil_image(functional.resize(pixels, list(size), interpolation=mode, antialias=True))


_RESIZE = {"pil": _pil, "torchvision": _torchvision}


def _centre(image: Image.Image, height: int, width: int, fill: tuple[int, ...], rule: str) -> Image.Image:
    """Centre crop to height x width; a side that is too short is first padded.

    rule: whose, for an odd pixel. It is padded below and to the right, by "pil" above and to the left; half a pixel of
    a crop is rounded down, by "timm" to an even number.
    """
    missing_y, missing_x = max(0, height - image.height), max(0, width - image.width)
    if missing_x or missing_y:
        odd = rule == "pil"
        left, top = (missing_x + odd) // 2, (missing_y + odd) // 2
        image = ImageOps.expand(image, (left, top, missing_x - left, missing_y - top), fill if fill[1:] else fill[0])
    half = round if rule == "timm" else int
    top, left = half((image.height - height) / 2), half((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
