"""The corruptions against the package imagecorruptions, a copy of ImageNet-C's code by other people."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("corruptions_worker.py")
SHARED = Path(os.environ.get("QUANTLENS_DATA", WORKER.parents[2] / "shared" / "data"))
APART = {
    "frost": "photographs there, a texture made by code here",
    "elastic_transform": "without ImageNet-C's movement of three points there, and with other constants",
}
"""Corruptions that are not the same thing in the package, of which moments are compared: in what they differ."""


def pictures(count: int, side: int) -> np.ndarray:
    """uint8 [count, side, side, 3]: real photographs where they are, else smooth noise."""
    from PIL import Image

    files = sorted((SHARED / "imagenet_val").rglob("*.JPEG"))[::30][:count]
    if len(files) == count:
        opened = [Image.open(file).convert("RGB") for file in files]
    else:
        rng = np.random.default_rng(0)
        opened = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(count)]
    return np.stack([np.asarray(one.resize((side, side), Image.Resampling.BICUBIC)) for one in opened])


def moments(found: np.ndarray, given: np.ndarray) -> str:
    """Mean and standard deviation of the difference, and the exponent of its power spectrum."""
    apart = found.astype(float) - given
    grey = apart.mean(axis=-1)
    grey = (grey - grey.mean(axis=(1, 2), keepdims=True)) * np.outer(*[np.hanning(grey.shape[1])] * 2)
    power = (np.abs(np.fft.fft2(grey)) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(grey.shape[1])] * 2))
    ends = 2.0 ** np.arange(-6, 0)
    bands = [power[(frequency >= low) & (frequency < 2 * low)].mean() for low in ends[:-1]]
    slope = np.polyfit(np.log(ends[:-1]), np.log(bands), 1)[0]
    return f"{apart.mean():.1f} ± {apart.std():.1f}, spectrum f^{slope:.1f}"


def corruptions(count: int = 20, side: int = 224) -> dict[str, Any]:
    """Every corruption at severities 1, 3 and 5 against imagecorruptions: pixels, both drawing the same random numbers;
    of the two that the package has otherwise, moments. And the processor seconds of 100 pictures.

    $QUANTLENS_IMAGECORRUPTIONS: the Python that has the package (by default this one), or "none" for the times alone.
    """
    from quantlens.data.corruptions import CORRUPTIONS, corrupt, picture_seeds

    given = pictures(count, side)
    seeds = picture_seeds(given)
    python = os.environ.get("QUANTLENS_IMAGECORRUPTIONS", sys.executable)
    cases = [f"{name} {severity}" for name in CORRUPTIONS for severity in (1, 3, 5)]
    theirs: dict[str, np.ndarray] = {}
    if python != "none":
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/in.npz", pictures=given, seeds=seeds, cases=np.array(cases))
            subprocess.run([python, str(WORKER), f"{folder}/in.npz", f"{folder}/out.npz"], check=True)
            with np.load(f"{folder}/out.npz") as found:
                theirs = {case: found[case] for case in cases}
    out: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in CORRUPTIONS:
        corrupt(given[:1], name, 1, seeds=seeds[:1])  # imports, and tables that are kept
        start, ours = time.process_time(), {s: corrupt(given, name, s, seeds=seeds) for s in (1, 3, 5)}
        seconds[name] = (time.process_time() - start) / 3 * 100 / count
        said = []
        for severity, found in ours.items():
            other = theirs.get(f"{name} {severity}")
            if other is None:
                continue
            apart = np.abs(found.astype(int) - other)
            equal = f"{100 * np.mean(apart == 0):.1f} % equal, {100 * np.mean(apart <= 1):.2f} % within 1"
            same = f"{moments(found, given)} (there {moments(other, given)})"
            said.append(f"{severity}: {same if name in APART else equal}")
        out[name] = "; ".join([f"{seconds[name]:.2f} s per 100", *said])
    out["19 corruptions x 3 severities x 300 pictures, processor s"] = round(sum(seconds.values()) * 9, 1)
    return out
