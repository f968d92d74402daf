"""Closed-form fitting of a layer's weights: ridge regression against quantized inputs, and rounding whose errors the
weights not yet rounded take up.

A layer is y = W·x with x its float input and x̄ what it reads once quantized. Everything here follows from second
moments over calibration rows (tokens, positions), :class:`Moments`:

* :func:`ridge`: the weights W' with the least ‖W'·X̄ − W·X‖² + λ‖W' − W‖². With X̄ = X they are W.
* :func:`round_columns`: rounding column by column; the error of each goes into the later columns so that the
  output ‖(Ŵ − W)·X̄‖² changes least (OBQ's update for all rows at once: Frantar et al., GPTQ, ICLR 2023, section 3).
* :func:`round_halves`: the same with the first half of what remains at a time, whose rounding :func:`refine` improves
  by flips to the other neighbour (Zhong et al., ERQ, ICML 2024, section 4.2).

Both kinds of rounding use the matrix U, upper triangular, with (X̄ᵀX̄ + λI)⁻¹ = UᵀU. If columns 0 … k − 1 are
off by δ (rounded less unrounded), the best change of all others is δ·U₁₁⁻¹·U₁₂, and what is left of the problem has the
factor U₂₂: one Cholesky factorisation serves every block of every size.

λ is ``damping`` times the mean of X̄ᵀX̄'s diagonal, so that it means the same for every layer and any number of rows, and
so that a few images, which leave directions unseen, suffice. All functions treat all rows of W at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlens.errors import UnsupportedError
from quantlens.formats import Quantizer, Uniform
from quantlens.formats.base import bounded_

BLOCK = 128
"""Columns whose errors reach the later columns in one product."""

FLIPS = 100
"""Most flips of :func:`refine` per row and block."""


@dataclass(frozen=True)
class Moments:
    """Moments of n rows of quantized inputs x̄ and float inputs x, float64.

    count: n. mean, float_mean [in]: of x̄ and x. gram [in, in]: Σ (x̄ − mean)(x̄ − mean)ᵀ. cross [in, in]: Σ (x̄ − mean)
    (x − float_mean)ᵀ.
    """

    count: int
    mean: Tensor
    float_mean: Tensor
    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, pieces: Iterable[tuple[Tensor, Tensor]]) -> Moments:
        """From pieces of rows (x̄ [m, in], x [m, in]); the same tensor twice where x̄ is x. Raises ValueError for no
        rows, or values that are not finite."""
        count = 0
        for quantized, plain in pieces:
            same = quantized is plain
            quantized, plain = quantized.float(), plain.float()
            if count == 0:
                width = quantized.shape[1]
                # rows are taken less a first guess of their mean, so that float32 products keep their digits
                guess, float_guess = (x.mean(0) for x in (quantized, plain))
                total, float_total = (quantized.new_zeros(width, dtype=torch.float64) for _ in range(2))
                gram, cross = (quantized.new_zeros(width, width, dtype=torch.float64) for _ in range(2))
            quantized = quantized - guess
            plain = quantized if same else plain - float_guess
            own = (quantized.T @ quantized).double()
            gram += own
            cross += own if same else (quantized.T @ plain).double()
            total += quantized.sum(0, dtype=torch.float64)
            float_total += plain.sum(0, dtype=torch.float64)
            count += len(quantized)
        if count == 0:
            raise ValueError("no rows to fit weights on")
        offset, float_offset = total / count, float_total / count
        gram -= count * torch.outer(offset, offset)
        cross -= count * torch.outer(offset, float_offset)
        if not bool(torch.isfinite(gram).all() & torch.isfinite(cross).all()):
            raise ValueError("values are not finite")
        return cls(count, guess.double() + offset, float_guess.double() + float_offset, gram, cross)

    @property
    def second(self) -> Tensor:
        """[in, in] Σ x̄x̄ᵀ, not centred: the Gram matrix of a layer whose bias stays."""
        return self.gram + self.count * torch.outer(self.mean, self.mean)

    def uncentred(self) -> Moments:
        """The moments about 0: for a layer whose bias must stay as it is."""
        cross = self.cross + self.count * torch.outer(self.mean, self.float_mean)
        zero = torch.zeros_like(self.mean)
        return Moments(self.count, zero, zero, self.second, cross)


@dataclass(frozen=True)
class Grid:
    """The levels of a weight's rows: scale·(low … high), [out, 1] each."""

    scale: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, quantizer: Quantizer) -> Grid:
        """Raises UnsupportedError for a format that is not uniform with a scale per tensor or output channel."""
        if not isinstance(quantizer, Uniform) or quantizer.axis not in (0, None):
            raise UnsupportedError(f"weights cannot be fitted to {quantizer.kind} codes, only to uniform ones per row")
        zero = quantizer.zero_point
        parts = (quantizer.scale, (quantizer.qmin - zero).float(), (quantizer.qmax - zero).float())
        return cls(*(p.reshape(-1, 1) for p in parts))

    def levels(self, weight: Tensor) -> Tensor:
        """Integers (float32) nearest to a weight [out, k]."""
        return bounded_((weight * (1.0 / self.scale)).round_(), self.low, self.high)

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values on the grid, [out, k]."""
        return self.levels(weight).mul_(self.scale)


# -- the matrices -------------------------------------------------------------------------------------------------
def damped(gram: Tensor, damping: float) -> Tensor:
    """gram + λI with λ = damping · mean of its diagonal; gram [in, in], float64. All zeros become the identity."""
    mean = gram.diagonal().mean()
    amount = damping * mean if bool(mean > 0) else torch.ones_like(mean)
    return gram + amount * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U [in, in], upper triangular, float64, with (gram + λI)⁻¹ = UᵀU.

    From the Cholesky factor of the matrix read backwards, gram + λI = VVᵀ with V upper triangular, U = V⁻¹; no inverse
    of the whole is formed. A damping too small for float64 is raised tenfold until the matrix is positive definite.
    """
    for _ in range(20):
        lower, info = torch.linalg.cholesky_ex(damped(gram, damping).flip(0, 1))
        if not bool(info.any()):
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        damping = max(10 * damping, 1e-12)
    raise ValueError("the second moments are not finite or not symmetric")


def ridge(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """W' [out, in] with the least ‖W'(X̄ − mean) − W(X − mean)‖² + λ‖W' − W‖², float32; the bias takes up the means (see
    :func:`output_shift`). weight: [out, in]. λ as in :func:`damped`.
    """
    left = damped(moments.gram, damping)
    change = torch.linalg.solve(left, moments.cross + (left - moments.gram))
    return (weight.double() @ change.T).float()


def output_shift(weight: Tensor, fitted: Tensor, moments: Moments) -> Tensor:
    """[out] float64 mean of Ŵx̄ − Wx over the rows: what is to be subtracted from the bias. weight W, fitted Ŵ: [out,
    in]."""
    return fitted.double() @ moments.mean - weight.double() @ moments.float_mean


# -- rounding -----------------------------------------------------------------------------------------------------
def round_columns(
    weight: Tensor, gram: Tensor, grid: Grid, *, damping: float, order: Tensor | None = None, block: int = BLOCK
) -> Tensor:
    """Ŵ [out, in] on the grid, column by column, each column's error taken up by the later ones.

    weight: [out, in]. gram: [in, in] float64, Σ x̄x̄ᵀ (centred if the bias is fitted too). order: int64 [in], the columns
    in the order in which they are rounded (``gram.diagonal().argsort(descending=True)`` is GPTQ's act-order); as they
    stand by default. block: columns whose errors go to the rest together; the result does not depend on it.
    """
    back = None
    if order is not None:
        weight, gram, back = weight[:, order], gram[order][:, order], order.argsort()
    factor = inverse_factor(gram, damping).to(weight.dtype)
    weight, rounded = weight.clone(), torch.empty_like(weight)
    diagonal = factor.diagonal().tolist()
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        local, inner = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.empty_like(local)
        for i in range(stop - start):
            column = local[:, i : i + 1]
            value = grid.round(column)
            rounded[:, start + i] = value[:, 0]
            errors[:, i] = (column - value)[:, 0] / diagonal[start + i]
            local[:, i + 1 :].addr_(errors[:, i], inner[i, i + 1 :], alpha=-1)
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return rounded if back is None else rounded[:, back]


def round_halves(
    weight: Tensor, gram: Tensor, grid: Grid, *, damping: float, order: Tensor | None = None, own: bool = False
) -> Tensor:
    """Ŵ [out, in] on the grid: half of the columns that remain are rounded and refined, the others take up their error,
    and so on to the last one (ERQ's weight error reduction).

    Arguments as of :func:`round_columns`. The rounding of a half is judged by what is left of its error once the other
    half has taken it up, or (own) by its error before that.
    """
    if order is not None:
        halves = round_halves(weight[:, order], gram[order][:, order], grid, damping=damping, own=own)
        return halves[:, order.argsort()]
    factor = inverse_factor(gram, damping).to(weight.dtype)
    weight, start, count = weight.clone(), 0, weight.shape[1]
    while start < count:
        stop = start + max((count - start) // 2, 1)
        inner = factor[start:stop, start:stop]
        upright = torch.linalg.solve_triangular(inner, torch.eye(stop - start).to(inner), upper=True)
        curvature = gram[start:stop, start:stop].to(weight) if own else upright @ upright.T
        error = refine(weight[:, start:stop], grid, curvature)
        taken = torch.linalg.solve_triangular(inner, error, upper=True, left=False)
        weight[:, stop:].addmm_(taken, factor[start:stop, stop:])
        weight[:, start:stop] += error
        start = stop
    return grid.round(weight)


def refine(weight: Tensor, grid: Grid, curvature: Tensor, flips: int = FLIPS) -> Tensor:
    """δ = rounded − weight [out, k], at first to nearest, then with single weights flipped to their other neighbour
    while that lowers δ·E·δ, row by row.

    curvature: E [k, k]. In every step each row flips the one weight that lowers its sum most; a row stops when there is
    none, or after ``flips`` steps.
    """
    levels = grid.levels(weight)
    error = levels * grid.scale - weight
    # the neighbour on the other side of the weight, if the grid has it
    other = torch.where(error > 0, levels - 1, levels + 1)
    inside = (other >= grid.low) & (other <= grid.high)
    change = torch.where(inside, (other - levels) * grid.scale, 0.0)
    slope, diagonal = error @ curvature, curvature.diagonal()
    rows = torch.arange(len(weight), device=weight.device)
    for _ in range(flips):
        gain = (change * diagonal).add_(slope, alpha=2).mul_(change)
        best, place = gain.min(1)
        active = best < -1e-6 * (error * slope).sum(1).clamp_min_(0) / max(weight.shape[1], 1)
        if not bool(active.any()):
            break
        at, step = place[active], rows[active]
        moved = change[step, at]
        error[step, at] += moved
        slope[step] += moved[:, None] * curvature[at]
        change[step, at] = -moved
    return error


__all__ = [
    "Grid",
    "Moments",
    "damped",
    "inverse_factor",
    "output_shift",
    "refine",
    "ridge",
    "round_columns",
    "round_halves",
]
