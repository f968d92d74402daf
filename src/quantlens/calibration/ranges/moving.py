"""Statistics that move from batch to batch: the exponential moving average of ranges."""

from __future__ import annotations

from torch import Tensor

SIGMA = 0.01
"""Weight of the newest batch in the code of FQ-ViT."""


def moving_average(batches: Tensor, sigma: float = SIGMA) -> Tensor:
    """Exponential moving average over the first dimension, [T, ...] -> [...]: a₁ = x₁, a_t = a_{t−1} + σ(x_t − a_{t−1})
    (Jacob et al., CVPR 2018, section 3.1)."""
    average = batches[0]
    for batch in batches[1:]:
        average = average + sigma * (batch - average)
    return average
