"""Scale search by the similarity of a product: pure functions, no model and no sites.

A layer is a product of two operands that share their last dimension, out = A·Bᵀ: inputs [m, in] and weight [out, in]
of a linear layer, q and k, probs and vᵀ. With one operand fixed, the similarity of out and Âᵢ·B̂ᵀ for a candidate Âᵢ is

    Σ Âᵢ ∘ (out·B̂) / ( ‖Âᵢ·B̂ᵀ‖·‖out‖ ),     ‖Âᵢ·B̂ᵀ‖² = Σ Âᵢ ∘ (Âᵢ·B̂ᵀB̂)

exactly, so that ``out·B̂`` and ``B̂ᵀB̂`` are made once and the large output is never made for a candidate (unless that is
the cheaper way to the norm).

The same holds for the Pearson correlation, the cosine of centred outputs: Σ Âᵢ·B̂ᵀ is linear in Âᵢ, and so is what an
offset of the output channels (a bias correction) adds to its sum, its norm and its product with out. :class:`Objective`
is that correlation, averaged over samples, with a ranking loss beside it (Liu et al., NeurIPS 2021, eq. 10 to 12).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operand:
    """One side of a product.

    values [..., rows, k]: float. start: scale that the candidates multiply, [] or [rows] (one scale per row; then
    there are no leading dimensions); ``None`` leaves the operand in float. scale: the current one. low, high: bounds
    of the codes.
    """

    values: Tensor
    start: Tensor | None = None
    scale: Tensor | None = None
    low: int = 0
    high: int = 0

    @classmethod
    def of(cls, values: Tensor, start: Tensor, low: int, high: int) -> "Operand":
        return cls(values, start, start, low, high)

    @property
    def per_row(self) -> bool:
        return self.start is not None and self.start.dim() == 1

    def quantized(self, scale: Tensor | None = None) -> Tensor:
        """The values on the grid of ``scale`` (the current one)."""
        scale = self.scale if scale is None else scale
        if scale is None:
            return self.values
        step = scale[:, None] if scale.dim() else scale
        return (self.values / step).round_().clamp_(self.low, self.high).mul_(step)


def candidate_factors(alpha: float, beta: float, count: int) -> list[float]:
    """α + i(β − α)/n, i = 0 … n − 1."""
    return [alpha + i * (beta - alpha) / count for i in range(count)]


def _cheapest(moving: Operand, factors: list[float], cost: Callable[[Tensor], Tensor]) -> Operand:
    """The operand with the scale, or one scale per row, whose quantized values cost least: the current one, or
    factor·start."""
    scales = torch.stack([moving.scale, *(moving.start * factor for factor in factors)])  # type: ignore[operator]
    least = torch.stack([cost(moving.quantized(scale)) for scale in scales]).argmin(0, keepdim=True)
    return replace(moving, scale=scales.gather(0, least)[0])


def similarity(a: Operand, b: Operand) -> float:
    """Cosine of the float product and the product of the quantized operands, over all elements; 0 if either is 0."""
    expected, got = a.values @ b.values.mT, a.quantized() @ b.quantized().mT
    return float(
        _cosine((expected * got).sum().double(), got.square().sum().double(), expected.square().sum().double())
    )


def search(a: Operand, b: Operand, factors: list[float]) -> Operand:
    """``a`` with the scale factor·start that makes Â·B̂ᵀ most similar to A·Bᵀ, B̂ being fixed.

    One scale per row: every row's own similarity is maximised. The current scale competes, and wins a tie.
    """
    if a.scale is None:
        return a
    fixed, expected = b.quantized(), a.values @ b.values.mT
    pull = expected @ fixed
    gram = fixed.mT @ fixed if fixed.shape[-1] <= fixed.shape[-2] else None
    dims = (-1,) if a.per_row else tuple(range(a.values.dim()))
    whole = expected.square().sum(dims).double()

    def cosine(values: Tensor) -> Tensor:
        norm = ((values @ gram).mul_(values) if gram is not None else (values @ fixed.mT).square_()).sum(dims)
        return _cosine(values.mul_(pull).sum(dims).double(), norm.double(), whole)

    return _cheapest(a, factors, lambda values: -cosine(values))


def alternate(a: Operand, b: Operand, factors: list[float], rounds: int) -> tuple[Operand, Operand, list[float]]:
    """Search a's scale with b fixed, then b's with a fixed, until no scale changes or ``rounds`` are done.

    Returns both operands and the similarity of the whole product before the first step and after every step. It never
    falls: scales per row maximise their rows' similarities, and if that lowers the similarity of the whole, the step
    is not taken.
    """
    pair, history = [a, b], [similarity(a, b)]
    for _ in range(rounds):
        before = list(pair)
        for i in range(2):
            tried = list(pair)
            tried[i] = search(pair[i], pair[1 - i], factors)
            found = similarity(*tried)
            if found >= history[-1]:
                pair = tried
            history.append(max(found, history[-1]))
        if all(old.scale is None or torch.equal(old.scale, new.scale) for old, new in zip(before, pair, strict=True)):
            break
    return pair[0], pair[1], history


def _cosine(dot: Tensor, norm: Tensor, other: Tensor) -> Tensor:
    """dot/√(norm·other), 0 where a norm is 0."""
    size = norm.clamp_min(0).sqrt() * other.sqrt()
    return torch.where(size > 0, dot / size.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(size))


# -- correlation and order ---------------------------------------------------------------------------------------------
TOLERANCE = 1e-3
"""A round of :func:`alternate_pair` that lowers the objective by less than this share of it is the last one."""


@dataclass(frozen=True)
class Ranking:
    """The ranking loss (Liu et al., eq. 10) against fixed float rows, as a mean over rows and pairs.

    first, second: [P] columns of the pairs. sign [P, R]: sign of float column ``first`` less ``second``. margin: θ, in
    the unit of the rows. rows: [R] which rows of the flattened output are compared; ``None`` for all. weight: γ.

    The mean is the paper's sum over the number of rows and pairs, so that γ does not depend on the sequence's length.
    """

    first: Tensor
    second: Tensor
    sign: Tensor
    margin: float
    rows: Tensor | None = None
    weight: float = 1.0

    @classmethod
    def of(
        cls,
        expected: Tensor,
        margin: float,
        *,
        pairs: int | None = None,
        rows: Tensor | None = None,
        weight: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> "Ranking":
        """The loss against ``expected`` [..., w]: over all w(w − 1)/2 pairs of columns, or over ``pairs`` pairs drawn
        with ``generator`` (with repetition, the same for all rows; its expectation is the loss over all pairs)."""
        columns = _columns(expected, rows)
        count = len(columns)
        if pairs is None or count < 2 or pairs >= count * (count - 1) // 2:
            first, second = torch.triu_indices(count, count, 1)
        else:
            first = torch.randint(count, (pairs,), generator=generator)
            second = (first + torch.randint(1, count, (pairs,), generator=generator)) % count
        first, second = first.to(columns.device), second.to(columns.device)
        return cls(first, second, (columns[first] - columns[second]).sign_(), float(margin), rows, weight)

    def loss(self, got: Tensor) -> Tensor:
        """[] mean hinge of ``got``, shaped as the float output was; 0 if there is no pair."""
        if self.sign.numel() == 0:
            return got.new_zeros(())
        columns = _columns(got, self.rows)
        hinge = (columns[self.second] - columns[self.first]).mul_(self.sign).add_(self.margin).clamp_(min=0)
        return hinge.mean()


def _columns(values: Tensor, rows: Tensor | None) -> Tensor:
    """[w, R] columns of some (None: all) rows of values [..., w]: a pair of them is two contiguous rows."""
    flat = values.flatten(0, -2)
    return (flat if rows is None else flat[rows]).T.contiguous()


class Objective:
    """γ·L_ranking + mean over samples of 1 − Γ (Liu et al., eq. 11, plus one): what a pair of scales costs.

    expected [s, m, n]: float outputs of s samples. similarity: whether Γ, the Pearson correlation of a sample's float
    and quantized output over all its m·n elements (eq. 12), takes part. ranking: the ranking loss, if it takes part.
    A sample whose float or quantized output is constant has Γ = 0.
    """

    def __init__(self, expected: Tensor, *, similarity: bool = True, ranking: Ranking | None = None):
        self.similarity, self.ranking = similarity, ranking
        self.centred = expected - expected.mean((-2, -1), keepdim=True)
        self.size = _dot(self.centred, self.centred)
        self.count = expected.shape[-1] * expected.shape[-2]

    def of(self, got: Tensor, offset: Tensor | None = None) -> Tensor:
        """[] float64 cost of quantized outputs [s, m, n], which are overwritten, less an offset [n]."""
        if offset is not None:
            got.sub_(offset)
        cost = torch.zeros((), dtype=torch.float64, device=got.device)
        if self.similarity:
            total = got.sum((-2, -1)).double()
            cost = cost + self._distance(_dot(self.centred, got), total, _dot(got, got))
        if self.ranking is not None:
            cost = cost + self.ranking.weight * self.ranking.loss(got).double()
        return cost

    def _distance(self, shared: Tensor, total: Tensor, norm: Tensor) -> Tensor:
        """Mean of 1 − Γ from Σ (O − Ō)·Ô, Σ Ô and Σ Ô² of each sample [s], float64."""
        spread = norm - total.square() / self.count
        # what rounding leaves of a constant output is no signal
        spread = torch.where(spread > norm * torch.finfo(self.centred.dtype).eps, spread, torch.zeros_like(spread))
        return (1 - _cosine(shared, spread, self.size)).mean()


Side = Literal["left", "right"]


def search_side(
    objective: Objective, left: Operand, right: Operand, side: Side, factors: list[float], offset: Tensor | None = None
) -> Operand:
    """The operand on ``side`` with the scale factor·start that costs least, the other one fixed.

    left [s, m, k], right [s, n, k] or [n, k] (the same for all samples): the output is left·rightᵀ − offset. offset:
    [n]. One scale per operand. The current scale competes, and wins a tie.
    """
    moving = left if side == "left" else right
    if moving.scale is None:
        return moving
    judge = _through_gram(objective, left, right, offset) if side == "left" else None
    if judge is None:
        fixed = right.quantized() if side == "left" else left.quantized()

        def judge(values: Tensor) -> Tensor:
            return objective.of(values @ fixed.mT if side == "left" else fixed @ values.mT, offset)

    return _cheapest(moving, factors, judge)


def _through_gram(
    objective: Objective, left: Operand, right: Operand, offset: Tensor | None
) -> Callable[[Tensor], Tensor] | None:
    """The cost of quantized left values [s, m, k] without their outputs; ``None`` where that is dearer or not to be
    had."""
    if objective.ranking is not None or not objective.similarity or right.values.shape[-1] >= right.values.shape[-2]:
        return None
    fixed = right.quantized()
    pull, gram, sums = objective.centred @ fixed, fixed.mT @ fixed, fixed.sum(-2, keepdim=True)
    rows = left.values.shape[-2]
    if offset is None:
        offset = fixed.new_zeros(fixed.shape[-2])
    back = offset @ fixed  # [k] or [s, k]
    known_shared = (objective.centred.sum(-2) * offset).sum(-1).double()
    known_total, known_norm = rows * offset.sum().double(), rows * offset.square().sum().double()

    def judge(values: Tensor) -> Tensor:
        column = values.sum(-2)
        shared = _dot(values, pull) - known_shared
        total = (column * sums.squeeze(-2)).sum(-1).double() - known_total
        norm = _dot(values @ gram, values) - 2 * (column * back).sum(-1).double() + known_norm
        return objective._distance(shared, total, norm)

    return judge


def alternate_pair(
    objective: Objective,
    left: Operand,
    right: Operand,
    factors: list[float],
    rounds: int,
    *,
    first: Side = "right",
    correct: Callable[[Operand, Operand], Tensor] | None = None,
) -> tuple[Operand, Operand, list[float]]:
    """Search both scales in turn, ``first`` first, until a round lowers the cost by less than :data:`TOLERANCE` of it,
    or ``rounds`` are done (Liu et al., section 3.2).

    correct: called after each round with both operands, gives the offset [n] that the outputs of the next round are
    corrected by. Returns the operands of the best round, and the cost before the first and after every round: a round
    that costs more than the one before is not taken, so that it never rises.
    """
    order: tuple[Side, Side] = ("right", "left") if first == "right" else ("left", "right")

    def measured(a: Operand, b: Operand) -> tuple[float, Tensor | None]:
        offset = None if correct is None else correct(a, b)
        return float(objective.of(a.quantized() @ b.quantized().mT, offset)), offset

    reached, offset = measured(left, right)
    history = [reached]
    for _ in range(rounds):
        a, b = left, right
        for side in order:
            found = search_side(objective, a, b, side, factors, offset)
            a, b = (found, b) if side == "left" else (a, found)
        reached, offset = measured(a, b)
        if not reached < history[-1]:
            break
        left, right = a, b
        history.append(reached)
        if history[-2] - reached < TOLERANCE * history[-2]:
            break
    return left, right, history


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[s] float64 inner products of samples [s, m, n]."""
    return torch.linalg.vecdot(a.flatten(-2), b.flatten(-2)).double()
