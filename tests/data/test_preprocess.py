"""The evaluation transform equals timm's, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from quantlens.data import Preprocess
from quantlens.data.sources import decode_image
from quantlens.errors import BadImageError, QuantlensError, UnknownNameError, UnsupportedError

SIZES = [(40, 30), (33, 33), (500, 375), (17, 200), (255, 257), (300, 16)]


def timm_transform(p: Preprocess):
    from timm.data import create_transform

    return create_transform(
        input_size=p.input_size,
        is_training=False,
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        crop_pct=p.crop_pct,
        crop_mode=p.crop_mode,
    )


def resizes_as_told(transform, interpolation: str) -> bool:
    """Whether timm's transform resizes with the interpolation it was given: older ones resize to a size that is not
    square bilinearly whatever they are told."""
    return all(
        getattr(step.interpolation, "value", step.interpolation) == interpolation
        for step in transform.transforms
        if hasattr(step, "interpolation")
    )


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0, 1.2])
def test_equals_timm_on_generated_images(crop_mode: str, crop_pct: float, picture) -> None:
    for size in [(3, 56, 56), (3, 48, 64), (3, 61, 61)]:
        for interpolation in ("bicubic", "bilinear"):
            p = Preprocess(size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode)
            theirs = timm_transform(p)
            if not resizes_as_told(theirs, interpolation):
                assert size[1] != size[2]
                continue
            for k, (width, height) in enumerate(SIZES):
                image = picture(width, height, seed=k)
                assert torch.equal(p(image), theirs(image)), (size, interpolation, width, height)


@pytest.mark.real
def test_equals_timm_on_real_jpegs(shared_data) -> None:
    files = sorted((shared_data / "imagenet").rglob("*.JPEG"))[::50]
    files += sorted((shared_data / "ood" / "places").iterdir())[:5]
    for p in (
        Preprocess(crop_pct=0.9),
        Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, crop_mode="border"),
    ):
        theirs = timm_transform(p)
        for file in files:
            with Image.open(file) as image:
                expected = theirs(image.convert("RGB"))
            pixels = p.resize_crop(decode_image(file))
            assert pixels.dtype == np.uint8
            assert torch.equal(p.normalize(pixels), expected), file


def test_normalize_of_a_batch_equals_normalize_of_each(picture) -> None:
    p = Preprocess((3, 32, 32))
    pixels = np.stack([p.resize_crop(picture(seed=k)) for k in range(3)])
    before = pixels.copy()
    batch = p.normalize(pixels)
    assert torch.equal(batch, torch.stack([p.normalize(x) for x in pixels]))
    assert np.array_equal(pixels, before)


def test_from_timm_takes_the_models_own_values() -> None:
    from timm.models import get_pretrained_cfg

    augreg = get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k_ft_in1k").to_dict()
    p = Preprocess.from_timm(augreg)
    assert p.mean == p.std == (0.5, 0.5, 0.5)
    assert (p.input_size, p.crop_pct, p.interpolation, p.crop_mode) == (
        (3, 224, 224),
        0.9,
        "bicubic",
        "center",
    )
    maxvit = Preprocess.from_timm(get_pretrained_cfg("maxvit_base_tf_384.in1k").to_dict())
    assert (maxvit.input_size[1], maxvit.crop_pct, maxvit.crop_mode) == (384, 1.0, "squash")
    assert Preprocess.from_timm({"crop_pct": None}).crop_pct == 0.875


def test_json_round_trip() -> None:
    p = Preprocess((3, 48, 64), mean=(0.1, 0.2, 0.3), crop_pct=0.95, crop_mode="border")
    assert Preprocess.from_dict(json.loads(json.dumps(p.to_dict()))) == p
    with pytest.raises(UnknownNameError, match="crop_pct"):
        Preprocess.from_dict({"croppct": 1.0})


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"interpolation": "bicubik"}, UnknownNameError),
        ({"crop_mode": "centre"}, UnknownNameError),
        ({"input_size": (1, 28, 28)}, UnsupportedError),
        ({"input_size": (3, 0, 28)}, UnsupportedError),
        ({"mean": (0.5,)}, UnsupportedError),
        ({"std": (0.5, 0.0, 0.5)}, QuantlensError),
        ({"crop_pct": float("nan")}, QuantlensError),
    ],
)
def test_impossible_values_are_refused(fields: dict, error: type) -> None:
    with pytest.raises(error):
        Preprocess(**fields)


def test_mean_belongs_to_the_cache_key_only_where_it_fills_a_border() -> None:
    a, b = (Preprocess(mean=(m,) * 3) for m in (0.4, 0.5))
    assert a.image_key() == b.image_key()
    a, b = (Preprocess(mean=(m,) * 3, crop_mode="border") for m in (0.4, 0.5))
    assert a.image_key() != b.image_key()


def test_a_very_thin_image_is_refused_before_memory_runs_out() -> None:
    with pytest.raises(BadImageError, match="too long and thin"):
        Preprocess().resize_crop(Image.new("RGB", (200000, 1)))
