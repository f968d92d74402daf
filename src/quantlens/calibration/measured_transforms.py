"""Exact transforms whose amounts are measured on calibration images: outlier channels, means of channels, pixels."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantlens.calibration.cache import return_memory
from quantlens.calibration.images import Calibration
from quantlens.calibration.passes import CalibrationPass, EdgeView
from quantlens.graph import Edge, Graph
from quantlens.transforms.heads import MeanSubtraction
from quantlens.transforms.layers import (
    RATIO,
    outlier_candidates,
    outlier_channels,
    pixel_readers,
    read_pixels,
    split_outliers,
)

ROWS = 256
"""Tokens that are summed together."""

NEAR = 1e-3
"""Images whose values lie this far (in units of 0 … 1) outside of a picture's, or off its 256 values, are none."""


def find_outlier_channels(graph: Graph, calibration: Calibration, ratio: float = RATIO) -> dict[str, Tensor]:
    """Outlier input channels of linear layers after activation functions: site name -> int64 [m]. One pass."""

    def outliers(_: Edge, view: EdgeView) -> Tensor:
        seen = view(axis=-1, sample=False)
        return outlier_channels(torch.maximum(seen.high.abs(), seen.low.abs()), ratio)

    edges = [site.edges["input"] for site in outlier_candidates(graph)]
    found = CalibrationPass(graph, calibration, sequential=False).run(edges, outliers)
    return {edge.site: channels for edge, channels in found.items() if len(channels)}


def split_outlier_channels(graph: Graph, calibration: Calibration, ratio: float = RATIO) -> list[str]:
    """Split every layer that :func:`find_outlier_channels` finds; returns one sentence per layer."""
    return split_outliers(graph, find_outlier_channels(graph, calibration, ratio))


def channel_means(graph: Graph, calibration: Calibration, keys: Iterable[str]) -> dict[str, Tensor]:
    """Mean of every channel (last dimension) of these edges over all images and tokens: key -> float64 [C]. One pass in
    float."""
    wanted, sums, counts = set(keys), dict[str, Tensor](), dict[str, int]()

    def hook(key: str, value: Tensor) -> Tensor:
        if key in wanted:
            rows = value.flatten(0, -2).split(ROWS)  # whole, they would be copied in float64
            part = torch.stack([part.sum(0, dtype=torch.float64) for part in rows]).sum(0)
            sums[key] = sums[key] + part if key in sums else part
            counts[key] = counts.get(key, 0) + value.numel() // value.shape[-1]
        return value

    nodes = [node for node in graph.fx.nodes if node.op == "call_function"]
    for chunk in calibration:
        graph.run(nodes, {graph.input: chunk}, hook=hook)
    return_memory()
    return {key: total / counts[key] for key, total in sums.items()}


def subtract_means(
    graph: Graph, calibration: Calibration, also: Iterable[str] = (), *, only_keys: bool = False
) -> tuple[list[str], dict[str, Tensor]]:
    """Take means of channels out wherever the graph proves it exact. only_keys: of the keys of attentions alone.
    Returns one sentence, or nothing where there is nothing; and the means of the edges ``also``, found in the same pass
    (float64 [C] each)."""
    places, others = MeanSubtraction.find(graph), list(also)
    if only_keys:
        places = replace(places, norms={}, outputs={})
    means = channel_means(graph, calibration, (*places.edges, *others))
    return places.apply(graph, means), {key: means[key] for key in others}


def read_as_pixels(graph: Graph, preprocess: Any, calibration: Calibration) -> list[str]:
    """Let the convolutions that read the image read pixel/255; returns the keys of their input edges, none where that
    would not be exact or the calibration images are no normalised pictures (random tensors, synthetic images).

    preprocess: mean and std per channel, in units of 0 … 1.
    """
    readers = pixel_readers(graph, len(preprocess.mean))
    if not readers or not all(_are_pictures(images, preprocess) for images in calibration):
        return []
    return read_pixels(graph, readers, preprocess.mean, preprocess.std)


def _are_pictures(images: Tensor, preprocess: Any) -> bool:
    """Whether every value is one of a picture's 256."""
    mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    pixels = (images * std + mean) * 255
    return bool(((pixels - pixels.round().clamp(0, 255)).abs() < 255 * NEAR).all())
