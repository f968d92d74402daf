"""Image sources, preprocessing, the decoded-image cache, and the image sets that ship with the package."""

from quantlens.data.cache import cache_directory
from quantlens.data.corruptions import CORRUPTIONS, Corruption, corrupt
from quantlens.data.embedded import EmbeddedInfo, available_embedded, load_embedded
from quantlens.data.given import as_image_set
from quantlens.data.images import ImageSet, load_images
from quantlens.data.preprocess import Preprocess
from quantlens.data.sources import (
    Source,
    SourceKind,
    as_rgb,
    available_sources,
    decode_image,
    open_source,
    with_corruption,
)

__all__ = [
    "CORRUPTIONS",
    "Corruption",
    "EmbeddedInfo",
    "ImageSet",
    "Preprocess",
    "Source",
    "SourceKind",
    "as_image_set",
    "as_rgb",
    "available_embedded",
    "available_sources",
    "cache_directory",
    "corrupt",
    "decode_image",
    "load_embedded",
    "load_images",
    "open_source",
    "with_corruption",
]
