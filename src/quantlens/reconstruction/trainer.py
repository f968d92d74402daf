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


class Trainer:
    """Adam on groups of parameters, a learning rate for each.

    The losses are computed with gradients, also for a caller in ``no_grad`` or inference mode.
    """

    def __init__(self, groups: Sequence[Group]):
        self.groups = list(groups)
        self._optimiser = torch.optim.Adam([{"params": list(g.parameters), "lr": g.rate} for g in self.groups])

    def run(self, steps: int, loss: Callable[[float], Tensor], tell: Callable[[int], None] | None = None) -> None:
        """Take ``steps`` steps. loss: share of the steps done, in [0, 1) -> scalar, of a mini-batch of its own choice.
        tell: called with the number of steps done."""
        for step in range(steps):
            self._set_rates(step, steps)
            with torch.inference_mode(False), torch.enable_grad():
                value = loss(step / steps)
                self._optimiser.zero_grad(set_to_none=True)
                value.backward()
            self._optimiser.step()
            if tell is not None:
                tell(step + 1)

    def _set_rates(self, step: int, steps: int) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, state in zip(self.groups, self._optimiser.param_groups, strict=True):
            state["lr"] = group.rate * (cosine if group.falling else 1.0)
