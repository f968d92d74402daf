"""Corruptions that move or mix pixels: blurs and elastic deformation (arguments as in `corruption_pixels`)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy import fft, ndimage

from quantlens.data.corruption_pixels import Generators, drawn, to_bytes


def smoothed(x: np.ndarray, sigma: float) -> np.ndarray:
    """Pictures [B, H, W, …] after a Gaussian filter in height and width, continued by their edges."""
    sigmas = (0, sigma, sigma, *(0 for _ in x.shape[3:]))
    return ndimage.gaussian_filter(x, sigmas, mode="nearest", truncate=4)


def gaussian_blur(x: np.ndarray, sigma: float, generators: Generators) -> np.ndarray:
    return smoothed(x, sigma)


def glass_blur(x: np.ndarray, c: tuple[float, int, int], generators: Generators) -> np.ndarray:
    """Blurred, pixels taken from nearby a few times, blurred. c: sigma, distance, times."""
    sigma, distance, times = c
    pixels = to_bytes(smoothed(x, sigma))
    flat = pixels.reshape(len(x), -1, 3)
    for _ in range(times):
        places = _nearby(pixels.shape[1], pixels.shape[2], distance, generators)
        flat = np.take_along_axis(flat, places[..., None], axis=1)
    return smoothed(flat.reshape(x.shape) / 255, sigma)


def _nearby(height: int, width: int, distance: int, generators: Generators) -> np.ndarray:
    """[B, H * W]: from which place every pixel comes.

    ImageNet-C goes from the last pixel to the first and writes "swap this one and one nearby"; on rows of an array
    that copies the other one and leaves it as it is. So a pixel takes what its neighbour was, or, where that one has
    been visited before, what it has become: chains, which are followed here by doubling the steps.
    """
    place = np.arange(height * width).reshape(height, width)
    inside = np.zeros((height, width), dtype=bool)
    inside[distance + 1 : height - distance + 1, distance + 1 : width - distance + 1] = True
    dx, dy = drawn(generators, lambda g: g.integers(-distance, distance, (2, height, width))).swapaxes(0, 1)
    taken = np.where(inside, place + dy * width + dx, place).reshape(len(generators), -1)
    visited = (taken > place.ravel()) & inside.ravel()[taken]
    ends = np.where(visited, taken, place.ravel())
    while True:
        further = np.take_along_axis(ends, ends, axis=1)
        if np.array_equal(further, ends):
            return np.take_along_axis(taken, ends, axis=1)
        ends = further


def convolved(x: np.ndarray, kernels: np.ndarray, mode: str) -> np.ndarray:
    """Sums over the places of a kernel, y[i] = sum_j kernel[j] x[i + j - centre], by Fourier transforms.

    x: [B, H, W, C]; kernels: [B or 1, k, k], k odd; mode: of `numpy.pad`, how pictures go on beyond their edges."""
    reach = kernels.shape[1] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode=mode)  # type: ignore[call-overload]
    sides = [fft.next_fast_len(side, real=True) for side in padded.shape[1:3]]
    spectrum = fft.rfft2(padded, sides, axes=(1, 2))
    spectrum *= fft.rfft2(kernels, sides, axes=(1, 2)).conj()[..., None]
    return fft.irfft2(spectrum, sides, axes=(1, 2))[:, : x.shape[1], : x.shape[2]]


@lru_cache(maxsize=16)
def _disk(radius: float, blur: float) -> np.ndarray:
    """[k, k]: a disk of equal weights, its rim smoothed by a Gaussian of 3 places (of 5 for a radius above 8)."""
    reach = 8 if radius <= 8 else math.ceil(radius)
    places = np.arange(-reach, reach + 1)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
    near = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    weights = np.exp(-(near**2) / (2 * blur**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, weights / weights.sum(), axis=axis, mode="mirror")
    return disk / (places[:, None] ** 2 + places**2 <= radius**2).sum()


def defocus_blur(x: np.ndarray, c: tuple[float, float], generators: Generators) -> np.ndarray:
    disk = _disk(*c)
    used = min(disk.shape[0] // 2, *(side - 1 for side in x.shape[1:3]))  # a mirror shows each pixel once
    cut = disk.shape[0] // 2 - used
    kernel = disk[cut : disk.shape[0] - cut, cut : disk.shape[0] - cut]
    return convolved(x, kernel[None] * (disk.sum() / kernel.sum()), "reflect")


def moved(x: np.ndarray, radius: int, sigma: float, angles: np.ndarray) -> np.ndarray:
    """Pictures [B, H, W, C] blurred along a line from each pixel, one angle in degrees per picture.

    As ImageMagick's motion blur: half a Gaussian over 2 radius + 1 places in that direction, each taken from the
    nearest pixel, edges continued."""
    length = 2 * radius + 1
    steps = np.arange(length)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    turned = np.deg2rad(angles)[:, None]
    dx, dy = (np.ceil(steps * along - 0.5).astype(np.int64) for along in (np.cos(turned), np.sin(turned)))
    kernels = np.zeros((len(x), 2 * length - 1, 2 * length - 1))
    np.add.at(kernels, (np.arange(len(x))[:, None], dy + length - 1, dx + length - 1), weights / weights.sum())
    return convolved(x, kernels, "edge")


def motion_blur(x: np.ndarray, c: tuple[int, float], generators: Generators) -> np.ndarray:
    angles = drawn(generators, lambda g: g.uniform(-45, 45, 1))[:, 0]
    return np.rint(np.clip(moved(x, *c, angles), 0, 1) * 255).astype(np.uint8)  # ImageMagick rounds


def zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of pictures [B, H, W, C], larger by a factor, linear between pixels, of the same size."""
    import torch

    sides = x.shape[1:3]
    cut = [math.ceil(side / factor) for side in sides]
    top, left = ((side - part) // 2 for side, part in zip(sides, cut, strict=True))
    middle = torch.from_numpy(x[:, top : top + cut[0], left : left + cut[1]]).permute(0, 3, 1, 2)
    size = [round(part * factor) for part in cut]
    large = torch.nn.functional.interpolate(middle, size, mode="bilinear", align_corners=True)
    y, z = ((whole - side) // 2 for whole, side in zip(size, sides, strict=True))
    return large[:, :, y : y + sides[0], z : z + sides[1]].permute(0, 2, 3, 1).numpy()


def zoom_blur(x: np.ndarray, c: tuple[float, float], generators: Generators) -> np.ndarray:
    """The mean of pictures zoomed by 1, 1 + step … (below the end), and once more the picture. c: end, step."""
    factors = np.arange(1, *c)
    total = x.copy()
    for factor in factors:
        total += zoomed(x, float(factor))
    return total / (len(factors) + 1)


def elastic_transform(x: np.ndarray, c: tuple[float, float, float], generators: Generators) -> np.ndarray:
    """Three points move and the picture with them, then every pixel by smoothed noise. c: strength and sigma of the
    noise and the points' reach, in shorter sides of the picture."""
    height, width = x.shape[1:3]
    side = min(height, width)
    strength, sigma, reach = (side * part for part in c)
    moves = drawn(generators, lambda g: g.uniform(-1, 1, (3, 2))) * reach
    noise = drawn(generators, lambda g: g.uniform(-1, 1, (2, height, width)))
    half, across = side // 3, np.array([width // 2, height // 2], dtype=np.float64)
    before = across + half * np.array([[1, 1], [1, -1], [-1, -1]])
    after = np.concatenate([before + moves, np.ones((len(x), 3, 1))], axis=2)
    back = np.linalg.solve(after, np.broadcast_to(before, moves.shape))  # [x, y, 1] of the result -> [x, y] before
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    grid = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back[:, None]
    x = _sampled(x, grid, corners=True)
    if strength == 0:
        return x
    fields = _smoothing(height, sigma) @ noise @ _smoothing(width, sigma).T * strength
    return _sampled(x, np.stack([columns + fields[:, 0], rows + fields[:, 1]], axis=-1), corners=False)


@lru_cache(maxsize=16)
def _smoothing(side: int, sigma: float) -> np.ndarray:
    """[side, side]: what multiplies a column to smooth it, mirrored at its ends."""
    return ndimage.gaussian_filter1d(np.eye(side), sigma, axis=0, mode="reflect", truncate=3)


def _sampled(x: np.ndarray, grid: np.ndarray, corners: bool) -> np.ndarray:
    """Pictures [B, H, W, C] at places [B, H, W, 2] (x, y), linear between pixels, mirrored about the middle of the
    outermost pixels (corners) or about their outer edge."""
    import torch

    sides = np.array(x.shape[2:0:-1])
    places = 2 * grid / (sides - 1) - 1 if corners else (2 * grid + 1) / sides - 1
    found = torch.nn.functional.grid_sample(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(places),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=corners,
    )
    return found.permute(0, 2, 3, 1).numpy()
