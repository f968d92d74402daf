"""An image at 8 bits, exactly: a picture has 256 values per channel to begin with.

Models read (pixel/255 − mean)/std. One scale for that tensor lies between the pixels' own values: with mean = std = 0.5
the zero point 127.5 is rounded, and every value is half a step off. Here the graph computes pixel/255 again (one
multiplication and one sum per channel in front of the patch embedding, undone in its weight and bias), and the codes
of pixel/255 with scale 1/255 and zero point 0 are the pixels: nothing is lost. Measured, SQNR of the logits with this
tensor alone at 8 bits, 50 images: DeiT-Tiny 31.2 dB, ViT-Tiny 27.8 before; 111 and 114 (float rounding) after.
"""

from __future__ import annotations

from typing import Any

import torch

from quantlens.calibration import Calibration
from quantlens.formats import Uniform
from quantlens.graph import Graph
from quantlens.graph.sites import Site
from quantlens.transforms import rescale_input
from quantlens.transforms.rewrites import alone, pads

NEAR = 1e-3
"""Images whose values lie this far (in units of 0 … 1) outside of a picture's, or off its 256 values, are none."""


def pixel_quantizer(device: torch.device | str = "cpu") -> Uniform:
    """pixel/255 in 0 … 1 -> codes 0 … 255, the pixels."""
    return Uniform(torch.tensor(1 / 255, device=device), torch.tensor(0, device=device), 8, signed=False)


def read_pixels(graph: Graph, preprocess: Any, calibration: Calibration) -> list[str]:
    """Let the convolutions that read the image read pixel/255; returns the keys of their input edges, none where it
    would not be exact: a convolution with padding or groups, or calibration images that are not normalised pictures
    (random tensors, synthetic images).

    The function of the graph is unchanged. preprocess: mean and std per channel, in units of 0 … 1.
    """
    readers = [s for s in graph.sites.of_kind("conv") if s.edges["input"].value is graph.input]
    readers = [s for s in readers if _plain(graph, s, len(preprocess.mean))]
    if not readers or not _are_pictures(preprocess, calibration):
        return []
    mean, std = (torch.tensor(v, dtype=torch.float64, device=graph.device) for v in (preprocess.mean, preprocess.std))
    for site in readers:
        rescale_input(graph, site, 1.0 / std, -mean)
    graph.invalidate()
    return [f"{site.name}.input" for site in readers]


def _plain(graph: Graph, site: Site, channels: int) -> bool:
    """Whether a convolution with a weight of its own sees all channels and pads nothing."""
    return alone(graph, site) and not pads(site) and graph.tensor(str(site.weight)).shape[1] == channels


def _are_pictures(preprocess: Any, calibration: Calibration) -> bool:
    """Whether every value is one of a picture's 256."""
    for images in calibration:
        mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
        pixels = (images * std + mean) * 255
        if not bool(((pixels - pixels.round().clamp(0, 255)).abs() < 255 * NEAR).all()):
            return False
    return True
