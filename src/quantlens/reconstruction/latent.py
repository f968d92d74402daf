"""A float weight that is trained itself, straight through its quantizer if it has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlens.quantizers import Uniform
from quantlens.reconstruction.scales import fake_quantize


class Latent(torch.nn.Module):
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
        scale = quantizer._spread(quantizer.scale, weight.dim()) if isinstance(quantizer, Uniform) else weight.std()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("start", weight.detach().clone())
        self.step = torch.nn.Parameter(torch.zeros_like(weight))

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
