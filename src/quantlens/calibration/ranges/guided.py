"""Searches of the parameters of a product's operands, guided by gradients or from coarse to fine: pure functions, no
model and no sites.

A layer is a product of two operands that share their last dimension, out = A·Bᵀ: inputs [rows, k] and weight [cols, k]
of a linear layer, q and k, probs and vᵀ. The loss of a pair Â, B̂ is

    Σ (g ∘ (Â·B̂ᵀ − A·Bᵀ))²,     g the gradient of the task's loss at the output, [..., rows, cols]

the diagonal of the second-order Taylor term with the Hessian replaced by the Fisher matrix (PTQ4ViT, section 3.3). The
weights g² belong to single outputs, so no Gram matrix of the operands gives the sum: a candidate costs one product, on
a sample of rows. :func:`sample_rows` draws rows in proportion to what they can add to the sum.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlens.formats import RESOLUTION, affine_parameters, bounded_, is_constant

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


# -- progressive search --------------------------------------------------------------------------------------------
# Fast progressive combining search (Wu et al., AdaLog, ECCV 2024, section 3.3): two parameters of a format together,
# from a coarse grid to fine steps around its best points. Pure functions, no model and no sites.
#
# A layer is a product of two operands that share their last dimension, out = A·Bᵀ. With B̂ fixed, the squared error
# of the output depends on the error e = â − a of A's rows alone:
#
#     ‖Â·B̂ᵀ − A·Bᵀ‖²  =  Σ over rows of  e·G·e + 2·e·p  + constant,      G = B̂ᵀB̂,   p = a·(B̂ − B)ᵀB̂
#
# (:class:`OutputError`), so that a candidate costs one product with a matrix that does not grow with the number of rows
# of B. The diagonal of G gives a rough value at a fraction of that; candidates are ranked by it, and the best eighth is
# judged exactly.


KEEP = 8
"""Points that the next, finer step starts from."""

EXACT = 8
"""One candidate in so many is judged exactly, and at least so many as are kept."""

CONVERGED = 5e-3
"""A step that lowers the error by less than this share of it is the last one."""


@dataclass(frozen=True)
class OutputError:
    """The squared error of a product's output as a function of one operand's error e [..., rows, k], the other operand
    as it is coded now.

    factor [..., k, m] with G = factor·factorᵀ, or gram G [..., k, k], whichever is smaller. pull p [..., rows, k].
    diagonal of G [..., 1, k].
    """

    pull: Tensor | None
    diagonal: Tensor | None
    factor: Tensor | None = None
    gram: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, fixed: Tensor, exact: Tensor) -> "OutputError":
        """values: A [..., rows, k]. fixed, exact: B̂ and B [..., cols, k]."""
        pull = values @ ((fixed - exact).mT @ fixed)
        diagonal = fixed.square().sum(-2, keepdim=True)
        if fixed.shape[-2] <= fixed.shape[-1]:
            return cls(pull, diagonal, factor=fixed.mT.contiguous())
        return cls(pull, diagonal, gram=fixed.mT @ fixed)

    @classmethod
    def own(cls) -> "OutputError":
        """The operand's own squared error Σ e²."""
        return cls(None, None)

    def rough(self, error: Tensor) -> Tensor:
        """Terms [..., rows, k] whose sum is the error with all of G but its diagonal left out."""
        if self.diagonal is None or self.pull is None:
            return error.square()
        return (error * self.diagonal).add_(self.pull, alpha=2).mul_(error)

    def exact(self, error: Tensor) -> Tensor:
        """Terms [..., rows, k or m] whose sum is the error, but for what does not depend on e."""
        if self.pull is None:
            return error.square()
        if self.gram is not None:
            return (error @ self.gram).add_(self.pull, alpha=2).mul_(error)
        bent = (error @ self.factor).square_().sum(-1, keepdim=True)
        return torch.cat([bent, (error * self.pull).sum(-1, keepdim=True).mul_(2)], -1)


def losses(side: Side, terms: Callable[[Tensor], Tensor], tried: Tensor) -> Tensor:
    """[n, G] float64 error of candidates [n, G, P], group by group. terms: error [n, ..., rows, k] -> terms whose sum
    is the loss (:meth:`OutputError.rough`, :meth:`OutputError.exact`)."""
    parts = tried.split(max(1, TOGETHER // side.values.numel()))
    errors = (side.quantized(part).sub_(side.values) for part in parts)
    return torch.cat([by_group(terms(error), side.groups, tried.shape[1]) for error in errors])


def progressive(
    side: Side, error: OutputError, spacing: Tensor, *, children: int = 8, steps: int = 6, keep: int = KEEP
) -> Side:
    """``side`` with the parameters that make ``error`` least, group by group.

    side.candidates [C, G, P]: the grid of the first step; the current parameters compete. spacing [G]: distance of the
    grid along the first parameter, a scale > 0. Each further step gives every one of the ``keep`` best points
    ``children`` neighbours at s + spacing·(−½ … ½) and keeps the best of all; spacing then falls by children − ½. It
    ends after ``steps`` steps, or when one gains less than :data:`CONVERGED`. The error never rises.
    """
    if side.candidates is None or side.current is None:
        return side
    best, reached = ranked(side, error, torch.cat([side.current[None], side.candidates]), keep)
    rounding = error if error.pull is None else replace(error, pull=torch.zeros_like(error.pull))
    offsets = torch.linspace(-0.5, 0.5, children, device=best.device)[:, None] * spacing
    for _ in range(steps - 1):
        near = best[:, None].expand(-1, children, -1, -1).clone()
        near[..., 0] += offsets
        near[..., 0] = torch.where(near[..., 0] > 0, near[..., 0], best[:, None, :, 0])
        points, found = ranked(side, error, near.flatten(0, 1), keep)
        pool, old = torch.cat([best, points]), reached[0]
        reached, order = torch.cat([reached, found]).topk(min(keep, len(pool)), 0, largest=False)
        best = pool.gather(0, order[..., None].expand(-1, -1, pool.shape[-1]))
        # a gain is compared with the part of the loss that a rounding error makes
        if bool((old - reached[0]).sum() <= CONVERGED * losses(side, rounding.exact, best[:1]).sum()):
            break
        offsets = offsets / (children - 0.5)
    return replace(side, current=best[0], place=None)


def ranked(side: Side, error: OutputError, tried: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The ``keep`` best of candidates [n, G, P] and their losses [keep, G], best first."""

    def chosen(order: Tensor) -> Tensor:
        return tried.gather(0, order[..., None].expand(-1, -1, tried.shape[-1]))

    if error.pull is not None:
        few = min(len(tried), max(keep, len(tried) // EXACT))
        tried = chosen(losses(side, error.rough, tried).topk(few, 0, largest=False).indices)
    reached, order = losses(side, error.exact, tried).topk(min(keep, len(tried)), 0, largest=False)
    return chosen(order), reached


# -- candidates ---------------------------------------------------------------------------------------------------
def asymmetric(x: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> Tensor:
    """Values on asymmetric uniform grids; parameters that broadcast against x (zero: integers)."""
    return bounded_((x / scale).round_(), -zero, (2**bits - 1) - zero).mul_(scale)


def asymmetric_grid(rows: Tensor, bits: int, *, zeros: int, candidates: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zero points for rows [G, m], a group each (section 3.3): candidates [C, G, 2], the distance [G] of the
    scales, and a point [G, 2] to start at.

    candidates/zeros scales from (q₀.₉ − q₀.₁)/(2ᵇ − 1) to (max − min)/(2ᵇ − 1), and so many zero points around the one
    with which the codes cover that range. A group with a single value gets parameters that make it exact.
    """
    low, high = rows.aminmax(dim=1)
    places = [round(p * (rows.shape[1] - 1)) + 1 for p in (0.1, 0.9)]
    inner_low, inner_high = (rows.kthvalue(place, dim=1).values for place in places)
    share = torch.linspace(0, 1, max(candidates // zeros, 1), device=rows.device)[:, None]
    lows, highs = torch.lerp(inner_low, low, share), torch.lerp(inner_high, high, share)
    constant = is_constant(low, high, bits)
    floor = 1e-3 * (high - low)
    scale = torch.where(constant, affine_parameters(low, high, bits)[0], (highs - lows).maximum(floor) / (2**bits - 1))
    zero = torch.where(constant, affine_parameters(low, high, bits)[1].float(), (-lows / scale).round())
    moves = torch.arange(zeros, device=rows.device)[:, None, None] - zeros // 2
    zero = zero + torch.where(constant, 0.0, moves.to(rows.dtype))
    pairs = torch.stack([scale.expand_as(zero), zero], -1)
    spacing = (scale[-1] - scale[0]) / max(len(scale) - 1, 1)
    return pairs.flatten(0, 1), spacing, pairs[zeros // 2, -1]


def adaptive(x: Tensor, scale: Tensor, numerator: Tensor, *, bits: int, shift: float = 0.0) -> Tensor:
    """Values in AdaLog formats (:class:`quantlens.formats.AdaLog`, with exact powers for its table); parameters that
    broadcast against x."""
    last, octave = 2.0**bits - 2, RESOLUTION / numerator
    codes = (torch.log2(scale) - torch.log2(x + shift)).mul_(octave).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    gone = codes > last + octave
    levels = codes.round_().clamp_(0.0, last).div_(octave).neg_().exp2_().mul_(scale)
    return levels.masked_fill_(gone, 0.0).sub_(shift)
