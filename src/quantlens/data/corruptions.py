"""The corruptions of ImageNet-C: 15 and 4 extra ones, each at five severities.

After D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(ICLR 2019), with the constants of ImageNet-C, and of CIFAR-10-C for pictures whose shorter side is below 64 pixels. As
there, a picture is corrupted where it has the network's size, after the resize and the crop. Where this departs:

- pictures are not stored as JPEG of quality 85 afterwards, as the published files of ImageNet-C are;
- frost is a texture made by code, not a photograph (`corruption_weather`);
- the random numbers of a picture come from its content and a seed, the same ones at every severity;
- sizes of kernels are in pixels at any size of picture, but `elastic_transform`'s grow with the shorter side.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from quantlens.data.corruption_pixels import Generators, to_bytes
from quantlens.errors import QuantlensError, UnknownNameError

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64
"""Pictures with a shorter side below this get the constants of CIFAR-10-C."""
LEAST_SIDE = 16
_BLOCK = 1 << 19
"""Pixels that are corrupted at once, so that what is computed stays small."""


@dataclass(frozen=True)
class Corruption:
    """One corruption: its kind ("noise", "blur", "weather", "digital"), whether it is one of the 4 extra ones, what it
    does, the file that has its function, and the constants of the five severities, of ImageNet-C and of CIFAR-10-C."""

    name: str
    kind: str
    extra: bool
    what: str
    file: str
    large: tuple[Any, ...]
    small: tuple[Any, ...]

    def __call__(self, x: np.ndarray, severity: int, generators: Generators) -> np.ndarray:
        """Pictures (float64 [B, H, W, 3] in 0…1) corrupted: of the same kind, or uint8."""
        constants = (self.small if min(x.shape[1:3]) < SMALL_SIDE else self.large)[severity - 1]
        return getattr(import_module(f"quantlens.data.corruption_{self.file}"), self.name)(x, constants, generators)


# fmt: off
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("gaussian_noise", "noise", False, "normal noise", "pixels",
     (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.1)),
    ("shot_noise", "noise", False, "Poisson noise of few photons", "pixels",
     (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    ("impulse_noise", "noise", False, "values that become black or white", "pixels",
     (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    ("defocus_blur", "blur", False, "a disk, as of a lens out of focus", "blurs",
     ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
     ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    ("glass_blur", "blur", False, "pixels taken from nearby, as through frosted glass", "blurs",
     ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
     ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    ("motion_blur", "blur", False, "motion along a line of random direction", "blurs",
     ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    ("zoom_blur", "blur", False, "motion towards the picture", "blurs",
     ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
     ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))),
    ("snow", "weather", False, "falling snow, and colours that fade", "weather",
     ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
      (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
     ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
      (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
    ("frost", "weather", False, "ice on the lens: a texture made by code", "weather",
     ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
     ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5))),
    ("fog", "weather", False, "fog of a random density (diamond-square)", "weather",
     ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    ("brightness", "digital", False, "the value of HSV raised", "pixels",
     (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    ("contrast", "digital", False, "nearer to each channel's mean", "pixels",
     (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    ("elastic_transform", "digital", False, "stretched and bent", "blurs",
     tuple((a * 244 / 224, s * 244 / 224, r * 244 / 224) for a, s, r in
           ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))),
     ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
    ("pixelate", "digital", False, "large square pixels", "pixels",
     (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    ("jpeg_compression", "digital", False, "JPEG of low quality", "pixels",
     (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    ("speckle_noise", "noise", True, "normal noise, more where it is bright", "pixels",
     (0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)),
    ("gaussian_blur", "blur", True, "a Gaussian filter", "blurs",
     (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    ("spatter", "weather", True, "drops of water, at high severities mud", "weather",
     ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
      (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1)),
     ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
      (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1))),
    ("saturate", "digital", True, "the saturation of HSV lowered, then raised", "pixels",
     ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)), ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
)
# fmt: on

CORRUPTIONS = {row[0]: Corruption(*row) for row in _TABLE}
"""Name -> corruption: ImageNet-C's 15 in its order, then its 4 extra ones."""


def check_corruption(name: str, severity: Any) -> tuple[str, int]:
    """(name, severity), checked. Raises UnknownNameError or QuantlensError, which list what there is."""
    if name not in CORRUPTIONS:
        raise UnknownNameError("corruption", name, (), hint=f"there are {', '.join(CORRUPTIONS)}")
    if not re.fullmatch("[1-5]", str(severity)):
        raise QuantlensError(f"corruption {name}: severity {str(severity)!r} must be 1, 2, 3, 4 or 5; write {name}:3")
    return name, int(severity)


def parse_corruption(text: str) -> tuple[str, int]:
    """Read `NAME:SEVERITY`. Raises as :func:`check_corruption`."""
    name, _, severity = text.partition(":")
    return check_corruption(name, severity)


def corrupted_fingerprint(clean: str, corruption: tuple[str, int, int] | None) -> str:
    """The fingerprint of a set of images with that one, after the corruption (name, severity, seed), if any."""
    if corruption is None:
        return clean
    return hashlib.sha256(repr((clean, *corruption)).encode()).hexdigest()[: len(clean)]


def picture_seeds(pictures: np.ndarray, seed: int = 0) -> np.ndarray:
    """int64 [B]: a seed for every picture (uint8 [B, H, W, 3]) that its size, its pixels and `seed` decide."""
    start = f"{pictures.shape[1:]} {seed} ".encode()
    digests = (hashlib.blake2b(start + picture.tobytes(), digest_size=8).digest() for picture in pictures)
    return np.array([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=np.int64)


def corrupt(pictures: np.ndarray, name: str, severity: int, *, seeds: Any) -> np.ndarray:
    """Corrupted pictures, uint8 [B, H, W, 3] as those given: RGB, at least 16 pixels high and wide.

    seeds: one whole number per picture (:func:`picture_seeds`). A picture becomes the same whatever others are
    beside it. Raises UnknownNameError or QuantlensError, which list what there is, for another name or severity.
    """
    name, severity = check_corruption(name, severity)
    pictures, seeds = np.asarray(pictures), np.asarray(seeds)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise QuantlensError(
            f"{name}: pictures are {pictures.dtype} {list(pictures.shape)}; give uint8 [B, H, W, 3], red first"
        )
    side = min(pictures.shape[1:3])
    if side < LEAST_SIDE:
        raise QuantlensError(f"{name}: pictures of {side} pixels; corruptions need at least {LEAST_SIDE}")
    if seeds.shape != (len(pictures),) or seeds.dtype.kind not in "iu":
        raise QuantlensError(f"{name}: give one whole number as seed of each of the {len(pictures)} pictures")
    corruption, stream = CORRUPTIONS[name], zlib.crc32(name.encode())
    found = np.empty_like(pictures)
    rows = max(1, _BLOCK // (pictures.shape[1] * pictures.shape[2]))
    for start in range(0, len(pictures), rows):
        part = slice(start, start + rows)
        generators = [np.random.Generator(np.random.PCG64([int(s) % 2**64, stream])) for s in seeds[part]]
        made = corruption(pictures[part] / 255, severity, generators)
        found[part] = made if made.dtype == np.uint8 else to_bytes(made)
    return found
