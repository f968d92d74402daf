"""Tensors of the network that are trained themselves: a float weight, straight through its quantizer if it has one, and
a vector (bias, LayerNorm's scale or shift)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.formats import Uniform
from quantlens.graph import Graph
from quantlens.graph.graph import op_name
from quantlens.graph.sites import dynamic_nodes
from quantlens.reconstruction.scales import fake_quantize

AFFINE = ("aten.layer_norm.default", "aten.linear.default", "aten.conv2d.default")
"""Operations whose vectors (biases, scale and shift) are trained."""


class Latent(nn.Module):
    """A trained float weight.

    quantizer: of the weight, or None for a weight that stays in float. weight: where it starts, float32. :attr:`step`
    is the parameter: the distance from the start in units of the quantizer's scale, or of the weight's standard
    deviation for a format without one scale or no quantizer, so that one learning rate suits weights of any size.
    """

    scale: Tensor
    start: Tensor

    def __init__(self, quantizer: Any, weight: Tensor):
        super().__init__()
        self.quantizer = quantizer
        scale = quantizer.spread(quantizer.scale, weight.dim()) if isinstance(quantizer, Uniform) else weight.std()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("start", weight.detach().clone())
        self.step = nn.Parameter(torch.zeros_like(weight))

    def latent(self) -> Tensor:
        """The float weight now."""
        return self.start + self.step * self.scale

    def forward(self) -> Tensor:
        """The weight as the layer uses it, with its gradient."""
        return self.latent() if self.quantizer is None else fake_quantize(self.quantizer, self.latent())

    @torch.no_grad()
    def harden(self) -> Tensor:
        """The weight as the layer uses it: on the grid of its quantizer, or in float without one."""
        return self.latent() if self.quantizer is None else self.quantizer(self.latent())


class Vector(nn.Module):
    """A trained vector: its start plus :attr:`step` times its root mean square (1 for a vector of zeros)."""

    scale: Tensor
    start: Tensor

    def __init__(self, vector: Tensor):
        super().__init__()
        size = vector.square().mean().sqrt()
        self.register_buffer("scale", torch.where(size > 0, size, torch.ones_like(size)))
        self.register_buffer("start", vector.detach().clone())
        self.step = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> Tensor:
        return self.start + self.step * self.scale


def trained_vectors(graph: Graph) -> list[fx.Node]:
    """Float vectors (biases, LayerNorms' scale and shift) that one operation of :data:`AFFINE` alone reads."""
    dynamic = dynamic_nodes(graph)
    uses: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            uses.setdefault(str(node.target), []).append(node)
    found = []
    for name, nodes in uses.items():
        tensor = graph.tensor(name)
        readers = [u for n in nodes for u in n.users]
        if tensor.dim() != 1 or not tensor.is_floating_point() or len(nodes) != 1 or len(readers) != 1:
            continue
        if readers[0] in dynamic and op_name(readers[0]) in AFFINE and bool(torch.isfinite(tensor).all()):
            found.append(nodes[0])
    return found
