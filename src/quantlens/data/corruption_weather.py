"""Weather: snow, frost, fog and spatter (arguments as in `corruption_pixels`).

Snow, fog and drops are random fields in ImageNet-C too; its frost is cut out of five photographs. Here frost is a
texture made by code with the photographs' means, spreads and spectra.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import fft, ndimage

from quantlens.data.corruption_blurs import moved, smoothed, zoomed
from quantlens.data.corruption_pixels import Generators, drawn, to_bytes

GREY = np.array([0.299, 0.587, 0.114])
WATER, MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255


def snow(x: np.ndarray, c: tuple[float, ...], generators: Generators) -> np.ndarray:
    """c: mean and spread of the noise, its zoom, the least that is snow, radius and sigma of its motion, how much of
    the picture's colours stays."""
    mean, spread, zoom, least, radius, sigma, kept = c
    layer = mean + spread * drawn(generators, lambda g: g.standard_normal(x.shape[1:3]))
    angles = drawn(generators, lambda g: g.uniform(-135, -45, 1))[:, 0]
    layer = zoomed(layer[..., None], zoom)
    layer = to_bytes(np.where(layer < least, 0, layer)) / 255
    layer = np.rint(np.clip(moved(layer, int(radius), sigma, angles), 0, 1) * 255) / 255
    grey = (x @ GREY)[..., None]
    x = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return x + layer + layer[:, ::-1, ::-1]


FROST = (  # of each texture: mean and spread of the channels, what joins the channels, exponent of the power spectrum
    ((78, 149, 166), (27, 16, 15), 0.85, -1.9),
    ((201, 205, 215), (21, 22, 23), 1.0, -1.75),
    ((201, 205, 215), (21, 22, 23), 1.0, -1.75),
    ((138, 153, 165), (28, 28, 30), 1.0, -1.3),
    ((112, 123, 135), (44, 43, 42), 1.0, -1.65),
)
FROST_SIDE = 512


@lru_cache(maxsize=len(FROST))
def frost_texture(which: int) -> np.ndarray:
    """uint8 [512, 512, 3], periodic: short needles in many directions, over a field with a spectrum that falls as a
    power, brighter and darker over long distances."""
    means, spreads, joined, exponent = FROST[which]
    rng = np.random.Generator(np.random.PCG64([FROST_SIDE, which]))
    fy, fx = fft.fftfreq(FROST_SIDE)[:, None], fft.rfftfreq(FROST_SIDE)
    radius = np.hypot(fx, fy)
    radius[0, 0] = np.inf
    fall = radius ** (exponent / 2) * np.exp(-(radius**2))

    def field(shape: np.ndarray) -> np.ndarray:
        real, imaginary = rng.standard_normal((2, *radius.shape))
        found = fft.irfft2((real + 1j * imaginary) * shape)
        return (found - found.mean()) / found.std()

    turns = (np.arange(8) + rng.uniform(size=8)) * np.pi / 8
    across = [np.exp(-(((fx * np.cos(turn) + fy * np.sin(turn)) / (0.2 * radius)) ** 2)) for turn in turns]
    needles = np.max([field(fall * one) for one in across], axis=0)  # of all directions, the brightest on top
    far = fall * (radius < 0.02)
    base = field(fall) + (needles - needles.mean()) / needles.std() + 1.3 * field(far)
    base /= base.std()
    channels = [joined * base + np.sqrt(1 - joined**2) * field(far) for _ in means]
    scaled = [mean + spread * one / one.std() for mean, spread, one in zip(means, spreads, channels, strict=True)]
    return np.clip(np.rint(np.stack(scaled, axis=-1)), 0, 255).astype(np.uint8)


def frost(x: np.ndarray, c: tuple[float, float, int], generators: Generators) -> np.ndarray:
    """c: shares of the picture and of the texture, and every how many pixels of the texture are taken."""
    kept, share, step = c
    which = drawn(generators, lambda g: g.integers(0, len(FROST), 1))[:, 0]
    starts = drawn(generators, lambda g: g.integers(0, FROST_SIDE // step, 2))
    rows, columns = ((starts[:, axis, None] + np.arange(x.shape[1 + axis])) * step % FROST_SIDE for axis in (0, 1))
    used, which = np.unique(which, return_inverse=True)
    textures = np.stack([frost_texture(int(k)) for k in used])
    cut = textures[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return kept * x + share * (cut / 255)


def fog(x: np.ndarray, c: tuple[float, float], generators: Generators) -> np.ndarray:
    """c: how much, and by what the fog's variation falls from each scale to the next."""
    amount, decay = c
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    side = 1 << (max(x.shape[1:3]) - 1).bit_length()
    field = plasma(side, decay, drawn(generators, lambda g: g.uniform(-1, 1, side * side)))
    return (x + amount * field[:, : x.shape[1], : x.shape[2], None]) * brightest / (brightest + amount)


def plasma(side: int, decay: float, noise: np.ndarray) -> np.ndarray:
    """[B, side, side] in 0…1: periodic fields by the diamond-square rule. side: a power of two; noise: [B, side²] in
    -1…1, of which every point takes one number, times a range that falls by `decay` squared with every scale."""
    field = np.zeros((len(noise), side, side))
    used, spread, step = 0, 1.0, side

    def new(sums: np.ndarray) -> np.ndarray:
        nonlocal used
        size = sums.shape[1] * sums.shape[2]
        used += size
        return sums / 4 + spread * noise[:, used - size : used].reshape(sums.shape)

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        field[:, half::step, half::step] = new(pairs + np.roll(pairs, -1, axis=2))
        middles = field[:, half::step, half::step]
        sides = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
        field[:, ::step, half::step] = new(sides)
        sides = middles + np.roll(middles, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
        field[:, half::step, ::step] = new(sides)
        step, spread = half, spread / decay**2
    field -= field.min(axis=(1, 2), keepdims=True)
    return field / field.max(axis=(1, 2), keepdims=True)


def spatter(x: np.ndarray, c: tuple[float, ...], generators: Generators) -> np.ndarray:
    """Drops of water, or mud. c: mean and spread of the noise, sigma of its blur, the least that is a drop, strength
    of the water or sigma of the mud's rim, and 1 for mud."""
    mean, spread, sigma, least, strength, mud = c
    layer = smoothed(mean + spread * drawn(generators, lambda g: g.standard_normal(x.shape[1:3])), sigma)
    if mud:
        cover = smoothed((layer > least).astype(np.float64), strength)
        cover = np.where(cover < 0.8, 0, cover)[..., None]
        return x * (1 - cover) + cover * MUD
    drops = to_bytes(np.where(layer < least, 0, layer))
    shine = drops * _relief(drops)
    shine /= np.maximum(shine.max(axis=(1, 2), keepdims=True), 1)
    return x + (shine * strength)[..., None] * WATER


def _relief(drops: np.ndarray) -> np.ndarray:
    """float64 [B, H, W]: how drops (uint8) look lit from a side, by their distance from the drops' edges."""
    edges = _edges(drops, 50, 150)
    far = np.concatenate([np.zeros((1, *drops.shape[1:])), ~edges])  # no edge at all is far from one
    nearest = ndimage.distance_transform_edt(far, (1000, 1, 1), return_distances=False, return_indices=True)[:, 1:]
    picture, row, column = nearest - np.indices(far.shape)[:, 1:]
    most, least = (choice(np.abs(row), np.abs(column)) for choice in (np.maximum, np.minimum))
    knight = np.minimum(least, most - least)  # steps of (2, 1); the others are straight, or diagonal
    distance = 2.1969 * knight + np.where(2 * least <= most, most - 2 * least, 1.4 * (2 * least - most))
    distance[picture != 0] = 20
    mean = ndimage.uniform_filter(np.minimum(distance, 20), (1, 3, 3), mode="mirror")
    equal = _equalised((mean + 1e-6).astype(np.uint8)).astype(np.float64)
    light = np.array([[[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]], dtype=np.float64)
    lit = np.clip(ndimage.correlate(equal, light, mode="mirror"), 0, 255)
    return np.rint(ndimage.uniform_filter(lit, (1, 3, 3), mode="mirror"))


def _equalised(values: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W] with every picture's histogram made flat; its least value becomes 0."""
    flat = values.reshape(len(values), -1).astype(np.int64)
    size = flat.shape[1]
    counts = np.bincount((flat + 256 * np.arange(len(flat))[:, None]).ravel(), minlength=256 * len(flat))
    sums = counts.reshape(-1, 256).cumsum(axis=1)
    least = np.take_along_axis(sums, flat.min(axis=1, keepdims=True), axis=1)
    table = np.rint(np.maximum(sums - least, 0) * 255 / np.maximum(size - least, 1))
    table = np.where(least == size, np.arange(256), table)  # all alike: as they are
    return np.take_along_axis(table, flat, axis=1).reshape(values.shape).astype(np.uint8)


def _edges(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """bool [B, H, W]: the edges of uint8 pictures by Canny's rule (Sobel 3x3, sum of absolute values)."""
    v = values.astype(np.int64)
    dx, dy = (
        ndimage.correlate1d(
            ndimage.correlate1d(v, [-1, 0, 1], axis, mode="nearest"), [1, 2, 1], 3 - axis, mode="nearest"
        )
        for axis in (2, 1)
    )
    size = np.abs(dx) + np.abs(dy)
    beyond = np.pad(size, ((0, 0), (1, 1), (1, 1)))

    def at(down: int, right: int) -> np.ndarray:
        return beyond[:, 1 + down : 1 + down + v.shape[1], 1 + right : 1 + right + v.shape[2]]

    slope = np.abs(dy) / np.maximum(np.abs(dx), 1e-9)
    flat, steep = slope < np.tan(np.pi / 8), slope > np.tan(3 * np.pi / 8)
    falling = (dx < 0) != (dy < 0)
    diagonal = np.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    straight = np.where(flat, (size > at(0, -1)) & (size >= at(0, 1)), (size > at(-1, 0)) & (size >= at(1, 0)))
    ridge = np.where(flat | steep, straight, diagonal) & (size > low)
    joined = np.zeros((3, 3, 3), dtype=int)
    joined[1] = 1  # within a picture
    parts, count = ndimage.label(ridge, joined)
    strong = np.zeros(count + 1, dtype=bool)
    strong[parts[ridge & (size > high)]] = True
    return strong[parts]
