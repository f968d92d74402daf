"""Image processors of Hugging Face as :class:`~quantlens.data.Preprocess`: read from their attributes, then compared
with what the processor itself makes of a picture."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from quantlens.data import Preprocess
from quantlens.errors import QuantlensError, QuantlensWarning

TOLERATED = 3
"""Grey levels by which a resized pixel may differ: two resizes of the same kind round differently."""


def preprocess_of(processor: Any, *, square: bool = False) -> Preprocess | None:
    """What an image processor does, or None where its images have no fixed size (one warning says so). One that does
    something else to a picture than we understood is told in a warning, too. square: of a processor that keeps the
    aspect ratio, what it does when told to make squares (detectors)."""
    name = type(processor).__name__
    if hasattr(processor, "data_config"):  # timm's own, in a wrapper
        return Preprocess.from_timm(processor.data_config)
    if square:
        processor = _squared(processor)
    try:
        found = _read(processor)
        off = _difference(processor, found)
    except (QuantlensError, ValueError, TypeError, KeyError, RuntimeError) as error:
        text = f"the image processor {name} cannot be followed: {error}"
        warnings.warn(text, QuantlensWarning, stacklevel=2)
        return None
    if off > TOLERATED:
        text = (
            f"the image processor {name} does more than quantlens understood: a picture differs by up to {off:.0f} "
            "grey levels; give preprocess=, or tensors that the processor made"
        )
        warnings.warn(text, QuantlensWarning, stacklevel=2)
    return found


def _squared(processor: Any) -> Any:
    """A processor that keeps the aspect ratio of a picture, as one that makes squares of its shorter side: what a model
    computes of an image is then no matter of the others in its batch."""
    size = getattr(processor, "size", None)
    side = size.get("shortest_edge") if isinstance(size, Mapping) else getattr(size, "shortest_edge", None)
    if not side:
        return processor
    squared = copy.copy(processor)
    squared.size, squared.do_pad = {"height": side, "width": side}, False
    return squared


def _read(processor: Any) -> Preprocess:
    kinds = {kind.__name__.removesuffix("Fast").removesuffix("Pil") for kind in type(processor).__mro__}
    resize, crop = _sizes(processor, kinds)
    channels = 1 if _on(processor, "do_grayscale") else 3
    mean, std = _affine(processor, channels, kinds)
    fast = getattr(processor, "backend", None) == "torchvision" or type(processor).__name__.endswith("Fast")
    return Preprocess(
        (channels, *crop),
        mean=mean,
        std=std,
        interpolation=_interpolation(getattr(processor, "resample", None)),
        crop_pct=1.0,
        resize=resize,
        channels="bgr" if _on(processor, "do_flip_channel_order") else "rgb",
        resizer="torchvision" if fast else "pil",
    )


def _sizes(processor: Any, kinds: set[str]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(what is resized to, what is cropped) of a processor; see `Preprocess.resize`."""
    sides = _sides(getattr(processor, "size", None)) if _on(processor, "do_resize") else ()
    crop = _sides(getattr(processor, "crop_size", None)) if _on(processor, "do_center_crop") else ()
    if len(sides) == 1 and "ConvNextImageProcessor" in kinds:
        side = sides[0]
        sides = (side, side) if side >= 384 else (int(side / processor.crop_pct),)
        crop = crop or (side, side)
    elif len(sides) == 1 and "LevitImageProcessor" in kinds:
        sides = (int(256 / 224 * sides[0]),)
    elif sides and "PoolFormerImageProcessor" in kinds and processor.crop_pct is not None:
        sides = tuple(int(side / processor.crop_pct) for side in sides)
        sides = sides[:1] if len(set(sides)) == 1 else sides
    crop = crop or sides
    if len(crop) == 1 and _on(processor, "do_center_crop"):
        crop = crop * 2
    if len(crop) != 2:
        raise QuantlensError("its images have no fixed size")
    return sides, (crop[0], crop[1])


def _sides(size: Any) -> tuple[int, ...]:
    """(shorter side,) or (height, width) that a processor's ``size`` says."""
    if isinstance(size, int):
        return (size,)
    if isinstance(size, list | tuple):
        return tuple(int(side) for side in size)

    def get(name: str) -> int | None:
        return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)

    if get("height") and get("width"):
        return int(get("height") or 0), int(get("width") or 0)
    if get("shortest_edge") and not get("longest_edge"):
        return (int(get("shortest_edge") or 0),)
    raise QuantlensError(f"its size is {size}, which leaves the size of an image open")


def _affine(processor: Any, channels: int, kinds: set[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) in units of 0..1 of ((pixel · factor) − mean) / std, whatever the factor is."""
    factor = float(getattr(processor, "rescale_factor", 1 / 255)) if _on(processor, "do_rescale") else 1.0
    wide, plain = np.ones(channels), _on(processor, "do_normalize")
    mean = wide * np.asarray(processor.image_mean if plain else 0.0, dtype=float)
    std = wide * np.asarray(processor.image_std if plain else 1.0, dtype=float)
    if "EfficientNetImageProcessor" in kinds:
        mean = mean + 1 if _on(processor, "rescale_offset") and _on(processor, "do_rescale") else mean
        std = std * np.asarray(processor.image_std, dtype=float) if _on(processor, "include_top") else std
    scale = 1.0 if abs(255 * factor - 1) < 1e-6 else 255 * factor
    return tuple((mean / scale).tolist()), tuple((std / scale).tolist())


def _on(processor: Any, name: str) -> bool:
    return bool(getattr(processor, name, False))


def _interpolation(resample: Any) -> str:
    """Name of an interpolation that is PIL's number or torchvision's; bilinear where nothing is said."""
    if resample is None:
        return "bilinear"
    value = getattr(resample, "value", resample)
    return value if isinstance(value, str) else Image.Resampling(value).name.lower()


def _difference(processor: Any, found: Preprocess) -> float:
    """Grey levels between what a processor and its reading make of a picture; infinite for another shape."""
    height, width = found.input_size[1:]
    noise = np.random.default_rng(0).integers(0, 256, (height // 4 + 8, width // 3 + 8, 3), dtype=np.uint8)
    size = found.input_size[1:] if found.resize == () else (height * 3 // 2 + 3, width * 5 // 3 + 2)
    picture = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)
    theirs = np.asarray(processor(images=picture, return_tensors="pt")["pixel_values"], dtype=np.float64)
    ours = found(picture).numpy()[None]
    if theirs.shape != ours.shape:
        return float("inf")
    levels = np.abs(theirs - ours) * 255 * np.reshape(found.std, (1, -1, 1, 1))
    return float(levels.max())
