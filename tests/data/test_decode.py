"""Odd and damaged image files."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from quantlens.data.sources import as_rgb, decode_image
from quantlens.errors import BadImageError


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_modes_are_converted_as_pil_does(mode: str, tmp_path: Path, picture) -> None:
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    file = tmp_path / f"x.{suffix}"
    picture().convert(mode).save(file)
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB"))
    decoded = decode_image(file)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), expected)


def test_transparency_is_dropped_without_a_warning(tmp_path: Path, picture) -> None:
    file = tmp_path / "x.png"
    image = picture().quantize(16)
    image.save(file, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(file)
    assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 30 * 20).reshape(20, 30).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    decoded = np.asarray(decode_image(tmp_path / "x.png"))
    assert np.abs(decoded[..., 0] - values / 257).max() <= 0.5
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert np.array_equal(np.asarray(decode_image(tmp_path / "x.tif")), decoded)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, picture, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = tmp_path / f"x.{ending}"
    picture(40, 30).save(lying, exif=exif)
    decoded = decode_image(lying)
    with Image.open(lying) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))
    assert np.array_equal(np.asarray(as_rgb(decoded)), np.asarray(upright))
    with Image.open(lying) as image:  # what torchvision's ImageFolder hands out
        assert np.array_equal(np.asarray(as_rgb(image.convert("RGB"))), np.asarray(upright))


def test_a_damaged_exif_block_costs_no_picture(tmp_path: Path, picture) -> None:
    picture(40, 30).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00")
    assert decode_image(tmp_path / "x.jpg").size == (40, 30)


def test_float_grey_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(BadImageError, match="8 bits"):
        decode_image(tmp_path / "x.tif")


def test_broken_files_give_a_reason(tmp_path: Path, picture) -> None:
    picture(200, 200).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    cases = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "text": b"not an image at all",
        "head": data[:20],
    }
    for name, content in cases.items():
        file = tmp_path / f"{name}.jpg"
        file.write_bytes(content)
        with pytest.raises(BadImageError) as caught:
            decode_image(file)
        assert str(caught.value)
    with pytest.raises(BadImageError, match="the file is empty"):
        decode_image(tmp_path / "empty.jpg")
    with pytest.raises(BadImageError, match="truncated"):
        decode_image(tmp_path / "truncated.jpg")
    with pytest.raises(BadImageError, match="no such file"):
        decode_image(tmp_path / "absent.jpg")


def test_decompression_bomb_is_refused_without_being_unpacked(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(BadImageError, match="bomb"):
        decode_image(tmp_path / "bomb.png")
