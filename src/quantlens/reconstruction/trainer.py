"""Adam, as everything here is trained with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate. falling: the rate falls to zero along a cosine; else it stays."""

    parameters: Sequence[Tensor]
    rate: float
    falling: bool = True


def train(
    groups: Sequence[Group], steps: int, loss: Callable[[float], Tensor], tell: Callable[[int], None] | None = None
) -> None:
    """Take ``steps`` steps of Adam. loss: share of the steps done, in [0, 1) -> scalar, of a mini-batch of its own
    choice; it is computed with gradients, also for a caller in ``no_grad`` or inference mode. tell: called with the
    number of steps done."""
    optimiser = torch.optim.Adam([{"params": list(g.parameters), "lr": g.rate} for g in groups])
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, state in zip(groups, optimiser.param_groups, strict=True):
            state["lr"] = group.rate * (cosine if group.falling else 1.0)
        with torch.inference_mode(False), torch.enable_grad():
            value = loss(step / steps)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
        optimiser.step()
        if tell is not None:
            tell(step + 1)
