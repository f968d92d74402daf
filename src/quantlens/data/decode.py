"""One image file -> one 8-bit RGB image, or one clear sentence.

As timm and torchvision do, the file is decoded in full (no JPEG `draft`), converted by PIL's `convert("RGB")`
(CMYK, palette and grey are converted, transparency is dropped), and the EXIF orientation is *not* applied.
Only where that conversion would lose the image is it replaced: 16-bit grey is scaled to 8 bits, where PIL
clips everything above 255 to white.
"""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from quantlens.errors import BadImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")


def decode_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Read `file` completely and return it as an RGB image.

    Raises BadImageError with the reason alone (the caller names the file): empty, truncated, not an image,
    too many pixels (PIL's limit against decompression bombs), or numbers without a stated range (32-bit
    grey).
    """
    try:
        if isinstance(file, str | os.PathLike) and os.stat(file).st_size == 0:
            raise BadImageError("the file is empty")
        with Image.open(file) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > 2 * limit:
                raise Image.DecompressionBombError
            return _rgb(image)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("it is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise BadImageError("it claims more pixels than an honest image has (a decompression bomb)") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        if isinstance(error, OSError) and error.strerror:
            raise BadImageError(f"it cannot be read: {error.strerror.lower()}") from error
        raise BadImageError(f"it is damaged: {str(error).strip().rstrip('.') or type(error).__name__}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise BadImageError(
                "its grey values do not fit in 16 bits, so their range is not known; save it with 8 bits"
            )
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImageError("its grey values are floating-point numbers of unknown range; save it with 8 bits")
    image.load()
    if image.mode != "RGB":
        image.info.pop("transparency", None)  # dropped anyway; PIL would warn about it in a palette
    return image.convert("RGB")
