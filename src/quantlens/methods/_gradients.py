"""Losses whose gradient at a product's output says how much an error there matters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantlens.metrics.divergence import kl_of_logits


def fisher(logits: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
    """A linear function of the logits whose gradient v at them is random with E[v·vᵀ] = diag(p) − p·pᵀ, the Hessian of
    KL(p ‖ softmax(logits)): v = √p∘ξ − p·Σ√p∘ξ, ξ normal. At any value before the logits, the squared gradient is
    then the Fisher matrix's diagonal in expectation."""
    p = reference.softmax(-1)
    noise = torch.randn(p.shape, generator=generator).to(p) * p.sqrt()
    return (logits * (noise - p * noise.sum(-1, keepdim=True))).sum()


def divergence(logits: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
    """KL(softmax(reference) ‖ softmax(logits))."""
    return kl_of_logits(reference, logits, "sum")


def own_label(logits: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy against the float model's own top-1."""
    return nn.functional.cross_entropy(logits, reference.argmax(-1), reduction="sum")
