"""Gradient-guided scale search of a product: pure functions, no model and no sites.

A layer is a product of two operands that share their last dimension, out = A·Bᵀ: inputs [rows, k] and weight [cols, k]
of a linear layer, q and k, probs and vᵀ. The loss of a pair Â, B̂ is

    Σ (g ∘ (Â·B̂ᵀ − A·Bᵀ))²,     g the gradient of the task's loss at the output, [..., rows, cols]

the diagonal of the second-order Taylor term with the Hessian replaced by the Fisher matrix (PTQ4ViT, section 3.3). The
weights g² belong to single outputs, so no Gram matrix of the operands gives the sum: a candidate costs one product, on
a sample of rows. :func:`sample_rows` draws rows in proportion to what they can add to the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

HEADS = "heads"
"""Groups of an operand [pairs, heads, rows, k]: one per head."""

TOGETHER = 1 << 19
"""Elements of outputs that candidates are judged on together: small products are dispatched less often."""

NEAR = 10
"""Candidates on either side of the chosen one that are tried again in later rounds."""


@dataclass(frozen=True)
class Side:
    """One operand of a product and the parameters that its format may have.

    values [..., rows, k]: float32. candidates [C, G, P], current [G, P]: P parameters for each of G groups; ``None``
    leaves the operand in float. groups: what shares parameters: ``None`` for the whole tensor (G = 1), :data:`HEADS`,
    or the group of each row, int64 [rows]. place [G]: the candidate that is current, once one was chosen.
    quantize(values, p₁, … p_P) -> [n, ..., rows, k]: the values on n grids, parameters [n, …] that broadcast against
    the values.
    """

    values: Tensor
    quantize: Callable[..., Tensor] | None = None
    candidates: Tensor | None = None
    current: Tensor | None = None
    groups: str | Tensor | None = None
    place: Tensor | None = None

    def quantized(self, parameters: Tensor | None = None) -> Tensor:
        """[n, ..., rows, k]: the values on the grids of n sets of parameters [n, G, P]; without them, [..., rows, k] on
        the current grid."""
        if self.quantize is None or self.current is None:
            return self.values
        if parameters is None:
            return self.quantized(self.current[None])[0]
        if isinstance(self.groups, Tensor):
            spread = parameters[:, self.groups, None]
        elif self.groups == HEADS:
            spread = parameters[:, None, :, None, None]
        else:
            spread = parameters[:, 0].reshape(len(parameters), *[1] * self.values.dim(), -1)
        return self.quantize(self.values, *spread.unbind(-1))


def search(a: Side, b: Side, gradient: Tensor | None, *, near: int | None = None) -> Side:
    """``a`` with the parameters, group by group, that make the loss of Â·B̂ᵀ least, B̂ being fixed.

    gradient: g [..., rows of a, rows of b], ``None`` for 1. near: try only the candidates so many places around the one
    chosen before, and that one.
    """
    if a.candidates is None or a.current is None:
        return a
    fixed = b.quantized().mT
    expected = a.values @ b.values.mT
    each = torch.arange(len(a.current), device=a.values.device)
    if near is None or a.place is None:
        places = torch.arange(len(a.candidates), device=each.device)[:, None].expand(-1, len(each))
    else:
        around = torch.arange(-near, near + 1, device=each.device)[:, None]
        places = (a.place + around).clamp_(0, len(a.candidates) - 1)
    tried = a.candidates[places, each]
    losses = []
    for some in tried.split(max(1, TOGETHER // max(expected.numel(), a.values.numel()))):
        error = (a.quantized(some) @ fixed).sub_(expected)
        if gradient is not None:
            error.mul_(gradient)
        losses.append(by_group(error.square_(), a.groups, len(each)))
    least = torch.cat(losses).argmin(0)  # the first of equal ones
    return replace(a, current=tried[least, each], place=places[least, each])


def alternate(a: Side, b: Side, gradient: Tensor | None, rounds: int) -> tuple[Side, Side]:
    """Search a's parameters with b fixed, then b's with a fixed, until nothing changes or ``rounds`` are done: all
    candidates in the first round, then those :data:`NEAR` places around the chosen ones. The loss does not rise after
    the first round.

    gradient: g [..., rows of a, rows of b] or ``None``.
    """
    pair, gradients = [a, b], [gradient, None if gradient is None else gradient.mT.contiguous()]
    for step in range(2 * rounds):
        this, first_round = step % 2, step < 2
        found = search(pair[this], pair[1 - this], gradients[this], near=None if first_round else NEAR)
        old, pair[this] = pair[this], found
        if not first_round and (old.current is None or torch.equal(old.current, found.current)):  # type: ignore[arg-type]
            break  # the other one was searched with this one
    return pair[0], pair[1]


def by_group(terms: Tensor, groups: str | Tensor | None, count: int) -> Tensor:
    """Sums of terms [n, ..., rows, cols] per group, float64 [n, count]."""
    if isinstance(groups, Tensor):
        rows = terms.sum(-1).double()
        return rows.new_zeros(len(terms), count).index_add_(1, groups, rows)
    return (terms.sum((1, 3, 4)) if groups == HEADS else terms.flatten(1).sum(1, keepdim=True)).double()


# -- which rows ---------------------------------------------------------------------------------------------------
FLOOR = 0.1
"""Share of the mean importance that every row has besides its own."""


def sample_rows(importance: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A sample without repetition in which row i is with probability πᵢ ∝ importance (plus a floor), at most 1.

    importance: ≥ 0, [..., n]; all equal if it is zero everywhere or not finite. Returns indices int64 [..., m] in
    ascending order, m = min(most, n), and 1/π of the chosen, float32 [..., m]: Σ f/π over the sample estimates Σ f
    over all rows without bias. Systematic sampling (Madow, 1949), so neighbours (tokens of one image) share the sample
    evenly.
    """
    count = importance.shape[-1]
    if most >= count:
        index = torch.arange(count, device=importance.device).expand(importance.shape)
        return index, torch.ones(index.shape, device=index.device)
    score = importance.double()
    mean = score.mean(-1, keepdim=True)
    usable = (mean > 0) & torch.isfinite(mean)
    score = torch.where(usable, score / mean.where(usable, torch.ones_like(mean)) + FLOOR, torch.ones_like(score))
    chance = most * score / score.sum(-1, keepdim=True)
    while bool((chance > 1 + 1e-9).any()):
        certain = chance >= 1
        rest = most - certain.sum(-1, keepdim=True)
        others = score.masked_fill(certain, 0.0)
        chance = torch.where(certain, 1.0, rest * others / others.sum(-1, keepdim=True).clamp_min(1e-300))
    edges = chance.cumsum(-1)
    edges = edges * (most / edges[..., -1:])
    start = torch.rand((*importance.shape[:-1], 1), dtype=torch.float64, generator=generator).to(edges.device)
    points = start + torch.arange(most, dtype=torch.float64, device=edges.device)
    index = torch.searchsorted(edges, points, right=True).clamp_(max=count - 1)
    return index, (1.0 / chance.gather(-1, index)).float()
