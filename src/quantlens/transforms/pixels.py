"""An image read as pixel/255, exactly: a picture has 256 values per channel to begin with.

Models read (pixel/255 − mean)/std. One scale for that tensor lies between the pixels' own values: with mean = std = 0.5
the zero point 127.5 is rounded, and every value is half a step off. Here the graph computes pixel/255 again (one
multiplication and one sum per channel before the patch embedding, undone in its weight and bias), and the codes of
pixel/255 with scale 1/255 and zero point 0 are the pixels: nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantlens.graph import Graph
from quantlens.graph.sites import Site
from quantlens.transforms.layers import alone, pads, rescale_input


def pixel_readers(graph: Graph, channels: int) -> list[Site]:
    """The convolutions that read the image where pixel/255 is exact: with a weight of their own, that see all channels
    and pad nothing."""
    readers = [s for s in graph.sites.of_kind("conv") if s.edges["input"].value is graph.input]
    return [
        site
        for site in readers
        if alone(graph, site) and not pads(site) and graph.tensor(str(site.weight)).shape[1] == channels
    ]


def read_pixels(graph: Graph, readers: Sequence[Site], mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Let these convolutions read pixel/255; returns the keys of their input edges. mean and std: per channel, in units
    of 0 … 1, what images are normalised with. The function of the graph is unchanged."""
    centre, spread = (torch.tensor(v, dtype=torch.float64, device=graph.device) for v in (mean, std))
    for site in readers:
        rescale_input(graph, site, 1.0 / spread, -centre)
    graph.invalidate()
    return [f"{site.name}.input" for site in readers]
