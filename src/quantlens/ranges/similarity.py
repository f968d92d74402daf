"""Scale search by cosine similarity of a product: pure functions, no model and no sites.

A layer is a product of two operands that share their last dimension, out = A·Bᵀ: inputs [m, in] and weight [out, in]
of a linear layer, q and k, probs and vᵀ. With one operand fixed, the similarity of out and Âᵢ·B̂ᵀ for a candidate Âᵢ is

    Σ Âᵢ ∘ (out·B̂) / ( ‖Âᵢ·B̂ᵀ‖·‖out‖ ),     ‖Âᵢ·B̂ᵀ‖² = Σ Âᵢ ∘ (Âᵢ·B̂ᵀB̂)

exactly, so that ``out·B̂`` and ``B̂ᵀB̂`` are made once and the large output is never made for a candidate (unless that is
the cheaper way to the norm).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    def of(cls, values: Tensor, start: Tensor, low: int, high: int) -> Operand:
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
    if a.start is None or a.scale is None:
        return a
    fixed = b.quantized()
    expected = a.values @ b.values.mT
    pull = expected @ fixed
    gram = fixed.mT @ fixed if fixed.shape[-1] <= fixed.shape[-2] else None
    dims = (-1,) if a.per_row else tuple(range(a.values.dim()))
    whole = expected.square().sum(dims).double()
    best = a.scale
    highest = torch.full_like(whole, -torch.inf)
    for scale in (a.scale, *(a.start * factor for factor in factors)):
        values = a.quantized(scale)
        norm = ((values @ gram).mul_(values) if gram is not None else (values @ fixed.mT).square_()).sum(dims)
        found = _cosine(values.mul_(pull).sum(dims).double(), norm.double(), whole)
        best = torch.where(found > highest, scale, best)
        highest = torch.maximum(found, highest)
    return replace(a, scale=best)


def alternate(a: Operand, b: Operand, factors: list[float], rounds: int) -> tuple[Operand, Operand, list[float]]:
    """Search a's scale with b fixed, then b's with a fixed, until no scale changes or ``rounds`` are done.

    Returns both operands and the similarity of the whole product before the first step and after every step. It never
    falls: scales per row maximise their rows' similarities, and if that lowers the similarity of the whole, the step
    is not taken.
    """
    history = [similarity(a, b)]
    for _ in range(rounds):
        before = a, b
        tried = search(a, b, factors)
        history.append(found := similarity(tried, b))
        if found < history[-2]:
            tried, history[-1] = a, history[-2]
        a = tried
        tried = search(b, a, factors)
        history.append(found := similarity(a, tried))
        if found < history[-2]:
            tried, history[-1] = b, history[-2]
        b = tried
        if _same(before[0], a) and _same(before[1], b):
            break
    return a, b, history


def _same(old: Operand, new: Operand) -> bool:
    return old.scale is None or new.scale is None or bool(torch.equal(old.scale, new.scale))


def _cosine(dot: Tensor, norm: Tensor, other: Tensor) -> Tensor:
    """dot/√(norm·other), 0 where a norm is 0."""
    size = norm.clamp_min(0).sqrt() * other.sqrt()
    return torch.where(size > 0, dot / size.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(size))


__all__ = ["Operand", "alternate", "candidate_factors", "search", "similarity"]
