"""Closed-form fitting of a layer's weights from second moments of its inputs over calibration rows (:class:`Moments`).

A layer is y = W·x with x its float input and x̄ what it reads once quantized.

* :func:`ridge`: the weights W' with the least ‖W'·X̄ − W·X‖² + λ‖W' − W‖². With X̄ = X they are W.
* :func:`round_columns`: column by column, the error of each taken up by later ones (Frantar et al., GPTQ, section 3).
* :func:`round_halves`: the first half of what remains at a time, improved by flips (Zhong et al., ERQ, section 4.2).

All use one Cholesky factorisation, :class:`Factor`: X̄ᵀX̄ + λI = VVᵀ with V upper triangular, and treat all rows of W
at once. λ is ``damping`` times the mean of X̄ᵀX̄'s diagonal: it means the same for every layer and number of rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlens.errors import UnsupportedError
from quantlens.formats import Blocks, FloatingPoint, Quantizer, Uniform, bounded_
from quantlens.formats.elements import ELEMENTS, Element

BLOCK = 64
"""Columns whose errors reach the columns after them in one product."""

FLIPS = 100
"""Most flips of :func:`refine` per row and block."""

ROWS, TOGETHER, SQUARE = 2048, 8192, 192
"""Rows of inputs that are multiplied together; rows whose products are summed in float32; columns of a Gram matrix, of
whose two equal halves one is computed."""


@dataclass(frozen=True)
class Moments:
    """Moments of n rows of quantized inputs x̄ and float inputs x, float64, about their means.

    count: n. mean, float_mean [in]: of x̄ and x. gram [in, in]: Σ x̄x̄ᵀ. error: Σ (x − x̄)x̄ᵀ [in, in]; or of the outputs
    of a weight W, Σ W(x − x̄)·x̄ᵀ [out, in], with ``weight`` W; ``None`` where x̄ is x.
    """

    count: int
    mean: Tensor
    float_mean: Tensor
    gram: Tensor
    error: Tensor | None = None
    weight: Tensor | None = None

    @classmethod
    def of(cls, pieces: Iterable[tuple[Tensor, Tensor]], weight: Tensor | None = None) -> "Moments":
        """From pieces of rows (x̄ [m, in], x [m, in]); the same tensor twice where x̄ is x.

        weight [out, in]: the only one that the moments are for; if it has far fewer rows than columns, less is computed
        and kept. Raises ValueError for no rows, or values that are not finite.
        """
        sums: _Sums | None = None
        for quantized, plain in pieces:
            sums = sums or _Sums(quantized, plain, weight)
            sums.add(quantized, plain)
        if sums is None or sums.count == 0:
            raise ValueError("no rows to fit weights on")
        return sums.result()

    @property
    def second(self) -> Tensor:
        """[in, in] Σ x̄x̄ᵀ, not about the mean: the Gram matrix of a layer whose bias stays."""
        return self.gram + self.count * torch.outer(self.mean, self.mean)

    def uncentred(self) -> "Moments":
        """The moments about 0: for a layer whose bias must stay as it is."""
        shift, zero = self.float_mean - self.mean, torch.zeros_like(self.mean)
        shift = shift if self.weight is None else self.weight.double() @ shift
        error = None if self.error is None else self.error + self.count * torch.outer(shift, self.mean)
        return Moments(self.count, zero, zero, self.second, error, self.weight)


class _Sums:
    """What :class:`Moments` are made of, while rows come: sums of x̄, of x − x̄ and of their products with x̄, less a
    first guess of both means, so that float32 products keep their digits."""

    def __init__(self, quantized: Tensor, plain: Tensor, weight: Tensor | None):
        width = quantized.shape[1]
        few = weight is not None and 2 * weight.shape[0] < width
        self.weight = weight.float() if few else None  # type: ignore[union-attr]
        self.guess = quantized.float().mean(0)
        self.error_guess = plain.float().mean(0) - self.guess
        self.count, self.waiting = 0, 0
        self.total, self.error_total = (self.guess.new_zeros(width, dtype=torch.float64) for _ in range(2))
        sizes = [width] if quantized is plain else [width, width if self.weight is None else len(self.weight)]
        self.products = [self.total.new_zeros(size, width) for size in sizes]  # of x̄, and of x − x̄ where it is not 0
        self.parts = [torch.zeros_like(product, dtype=torch.float32) for product in self.products]

    def add(self, quantized: Tensor, plain: Tensor) -> None:
        """Add rows."""
        for wide, exact in zip(quantized.split(ROWS), plain.split(ROWS), strict=True):
            rows = wide.float() - self.guess
            self.total += rows.sum(0)
            for start in range(0, rows.shape[1], SQUARE):  # on and above the diagonal
                block = slice(start, start + SQUARE)
                self.parts[0][block, start:].addmm_(rows[:, block].T, rows[:, start:])
            if quantized is not plain:
                change = (exact.float() - wide.float()).sub_(self.error_guess)
                self.error_total += change.sum(0)
                self.parts[1].addmm_((change if self.weight is None else change @ self.weight.T).T, rows)
            self.count += len(rows)
            self.waiting += len(rows)
            if self.waiting >= TOGETHER:
                self._settle()

    def _settle(self) -> None:
        """Add the float32 products to their float64 sums."""
        for total, part in zip(self.products, self.parts, strict=True):
            total += part
            part.zero_()
        self.waiting = 0

    def result(self) -> Moments:
        self._settle()
        gram, error = self.products[0], self.products[1] if len(self.products) > 1 else None
        for start in range(SQUARE, len(gram), SQUARE):  # the half that was left out
            gram[start : start + SQUARE, :start] = gram[:start, start : start + SQUARE].T
        offset, error_offset = self.total / self.count, self.error_total / self.count
        gram.addr_(offset, offset, alpha=-self.count)
        if error is not None:
            shift = error_offset if self.weight is None else self.weight.double() @ error_offset
            error.addr_(shift, offset, alpha=-self.count)
        if not all(bool(torch.isfinite(x).all()) for x in (self.total, self.error_total, gram.diagonal())):
            raise ValueError("values are not finite")
        mean = self.guess.double() + offset
        float_mean = mean + self.error_guess.double() + error_offset
        return Moments(self.count, mean, float_mean, gram, error, None if error is None else self.weight)


@dataclass(frozen=True)
class Grid:
    """The levels of a weight's rows: scale·(low … high), [out, 1] each."""

    scale: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, quantizer: Quantizer) -> "Grid":
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

    def column(self, values: Tensor, place: int, out: Tensor) -> None:
        """What is nearest to a column [out], in units of the scale, into ``out``. place: which column it is."""
        bounded_(torch.round(values, out=out), self.low[:, 0], self.high[:, 0])


@dataclass(frozen=True)
class FloatGrid:
    """The values of a weight in a floating-point format with static scales: those of an element times ``steps`` [out,
    in]. scale: [out, 1], the unit of columns: 1."""

    element: Element
    steps: Tensor
    scale: Tensor

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values on the grid, [out, in]."""
        return self._nearest(weight, self.steps)

    def column(self, values: Tensor, place: int, out: Tensor) -> None:
        """What is nearest to a column [out], into ``out``. place: which column it is."""
        out.copy_(self._nearest(values, self.steps[:, place]))

    def _nearest(self, values: Tensor, steps: Tensor) -> Tensor:
        return self.element.round(values / torch.where(steps == 0, torch.inf, steps)).mul_(steps)


def grid_of(quantizer: Quantizer, weight: Tensor) -> Grid | FloatGrid:
    """The grid of a weight [out, …], rows by output channel. Raises UnsupportedError for a format that has none."""
    if isinstance(quantizer, FloatingPoint) and quantizer.axis in (0, None):
        steps = quantizer.scale.reshape(-1, 1).expand_as(weight.flatten(1))
    elif isinstance(quantizer, Blocks) and not quantizer.dynamic:
        steps = quantizer.each_scale(weight).flatten(1)
    else:
        return Grid.of(quantizer)
    return FloatGrid(ELEMENTS[quantizer.element], steps, torch.ones_like(steps[:, :1]))


# -- the matrices -------------------------------------------------------------------------------------------------
def _amount(diagonal: Tensor, damping: float) -> Tensor:
    """[] λ of a Gram matrix with this diagonal."""
    mean = diagonal.mean()
    return damping * mean if bool(mean > 0) else torch.ones_like(mean)


@dataclass(frozen=True)
class Factor:
    """The Cholesky factorisation of a damped Gram matrix whose columns stand in the order in which they are rounded.

    places int64 [in]: the columns, the last one to be rounded first. lower [in, in], float64, lower triangular: V of
    the matrix with its columns in order, both dimensions turned round.
    """

    places: Tensor
    lower: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: float, order: Tensor | None = None) -> "Factor":
        """order: int64 [in], the columns in the order in which they are rounded (as they stand by default). A damping
        too small for float64 is raised tenfold until the matrix is positive definite."""
        order = torch.arange(len(gram), device=gram.device) if order is None else order
        places = order.flip(0)
        turned = gram[places[:, None], places]
        diagonal = turned.diagonal().clone()
        for _ in range(20):
            turned.diagonal().copy_(diagonal + _amount(diagonal, damping))
            lower, info = torch.linalg.cholesky_ex(turned)
            if not bool(info.any()):
                return cls(places, lower)
            damping = max(10 * damping, 1e-12)
        raise ValueError("the second moments are not finite or not symmetric")

    def solve(self, right: Tensor) -> Tensor:
        """right·(gram + λI)⁻¹, [out, in] float64."""
        solved = torch.cholesky_solve(right.T[self.places], self.lower)
        return torch.empty_like(solved).index_copy_(0, self.places, solved).T

    def feedback(self, dtype: torch.dtype) -> Tensor:
        """V_ij / V_jj, [in, in] upper triangular, columns in order: which part of the error of column i is taken up by
        column j > i. With δ the error of a row, δ·(gram + λI)·δᵀ is Σ V_jj²·(δ_j + Σ_{i<j} δ_i·V_ij/V_jj)²."""
        made = self.lower.to(dtype)
        made /= made.diagonal().clone()
        return made.flip(0, 1)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U [in, in], upper triangular, float64, with (gram + λI)⁻¹ = UᵀU. See :class:`Factor`."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(Factor.of(gram, damping).lower.flip(0, 1), eye, upper=True)


def ridge(weight: Tensor, moments: Moments, damping: float, factor: Factor | None = None) -> Tensor:
    """W' [out, in] with the least ‖W'(X̄ − mean) − W(X − mean)‖² + λ‖W' − W‖², float32; the bias takes up the means (see
    :func:`output_shift`). weight: [out, in]. λ as in :func:`damped`. factor: that of ``moments.gram``, if there is one.
    """
    if moments.error is None:
        return weight.float()
    factor = Factor.of(moments.gram, damping) if factor is None else factor
    if moments.weight is None:  # the same for every weight
        return weight.float() + weight.float() @ factor.solve(moments.error).float()
    return (weight.double() + factor.solve(moments.error)).float()


def output_shift(weight: Tensor, fitted: Tensor, moments: Moments) -> Tensor:
    """[out] float64 mean of Ŵx̄ − Wx over the rows: what is to be subtracted from the bias. weight W, fitted Ŵ: [out,
    in]."""
    return fitted.double() @ moments.mean - weight.double() @ moments.float_mean


# -- rounding -----------------------------------------------------------------------------------------------------
def round_columns(
    weight: Tensor,
    gram: Tensor,
    grid: Grid | FloatGrid,
    *,
    damping: float,
    order: Tensor | None = None,
    block: int = BLOCK,
    factor: Factor | None = None,
) -> Tensor:
    """Ŵ [out, in] on the grid, column by column, each column's error taken up by those after it.

    weight: [out, in]. gram: [in, in] float64, Σ x̄x̄ᵀ (centred if the bias is fitted too). order: int64 [in], the columns
    in the order in which they are rounded (``gram.diagonal().argsort(descending=True)`` is GPTQ's act-order); as they
    stand by default. block: columns whose errors go to the rest together; the result does not depend on it. factor:
    that of ``gram`` in that order, if there is one.
    """
    factor = Factor.of(gram, damping, order) if factor is None else factor
    feedback, places = factor.feedback(weight.dtype), factor.places.flip(0)
    # columns are rows here, in units of the scale
    wanted, columns = (weight * (1.0 / grid.scale)).T[places], places.tolist()
    levels, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    for start in range(0, len(wanted), block):
        stop = min(start + block, len(wanted))
        local = torch.addmm(wanted[start:stop], feedback[:start, start:stop].T, errors[:start])
        for i in range(stop - start):
            level, error = levels[start + i], errors[start + i]
            grid.column(local[i], columns[start + i], level)
            torch.sub(wanted[start + i], level, out=error)
            local[i + 1 :].addr_(feedback[start + i, start + i + 1 : stop], error)
    return torch.empty_like(levels).index_copy_(0, places, levels).T * grid.scale


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
