"""What is learned of a quantizer: AdaRound, the rounding of a weight (below), and LSQ, the scale of an activation
quantizer (Esser et al., ICLR 2020, section 2).

For a format whose values are proportional to one base scale s (uniform: x̂ = l·s with integers l = clamp(round(x/s)); a
power-of-two format: x̂ = l·s·2^α_c; blocks: x̂ = (l + ½)·s·rms), straight through the rounding,

    ∂x̂/∂s = (x̂ − x)/s   inside the range,   x̂/s   outside,        ∂x̂/∂x = 1 inside, 0 outside

which for one scale is LSQ's eq. 3: round(x/s) − x/s, or the outermost level; inside is qmin − z ≤ x/s ≤ qmax − z. The
gradient of s is multiplied by g = 1/√(N·qmax), N being the number of values that share the scale (section 2.2). Zero
points and exponents stay; zero points per channel move with the scale, so that the middles of the ranges stay.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from quantlens.errors import UnsupportedError
from quantlens.formats import PowerOfTwo, Quantizer, Uniform, bounded_, restore

SMALLEST, LARGEST = 0.05, 8.0
"""Bounds of the learned scale as multiples of the one it started from."""


class _Quantize(torch.autograd.Function):
    """x, s (the values' scale, spread), low and high level, kept (bool like x: left in float; or None) -> x̂."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        inverse: Tensor,
        low: Tensor | float,
        high: Tensor | float,
        kept: Tensor | None,
        factor: float,
    ) -> Tensor:
        levels = x * inverse
        clamped = bounded_(levels.clone(), low, high)
        # 1 inside, 0 outside, as float: comparisons that give bool, and products with bool, are ten times as slow
        inside = levels.eq_(clamped)
        value = clamped.round_().mul_(scale)
        if kept is not None:
            value = torch.where(kept, x, value)
            inside.masked_fill_(kept, 1.0)
        ctx.factor = factor
        ctx.save_for_backward(*((x, scale, value) if ctx.needs_input_grad[1] else (None, None, None)), inside)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, value, inside = ctx.saved_tensors
        through = grad * inside
        wanted = None
        if ctx.needs_input_grad[1]:
            # kept elements have value = x and inside = 1: they cancel
            wanted = grad * value
            wanted -= through * x
            shared = [d for d in range(grad.dim()) if scale.dim() == 0 or scale.shape[d] == 1]
            wanted = (wanted.sum(shared, keepdim=True) if scale.dim() else wanted.sum()) / scale
            wanted = wanted * ctx.factor
        return through, wanted, None, None, None, None, None


class LearnedScale(nn.Module):
    """An activation quantizer whose scale is learned; everything else of it stays.

    quantizer: :class:`~quantlens.formats.Uniform` (any granularity) or :class:`~quantlens.formats.PowerOfTwo`.
    :attr:`ratio` is the parameter: the scale as a multiple of the quantizer's own ([] or [n]), so that one learning
    rate suits tensors of any size. ``forward(x, kept=None)`` quantizes x exactly as the frozen quantizer would; where
    ``kept`` (bool, shape of x) is set, x passes in float (QDrop). :meth:`freeze` gives the quantizer.

    Raises UnsupportedError for another format: log and twin formats stay as they are.
    """

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        if not learnable(quantizer):
            raise UnsupportedError(f"the scale of {quantizer.kind} codes cannot be learned")
        self.quantizer: Any = quantizer
        self.ratio = nn.Parameter(torch.ones_like(quantizer.scale))  # type: ignore[arg-type]

    @property
    def scale(self) -> Tensor:
        """The base scale now, float32 [] or [n], with its gradient path to :attr:`ratio`."""
        return self.quantizer.scale * self.ratio.clamp(SMALLEST, LARGEST)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        scale = self.scale
        count = x.numel() // max(scale.numel(), 1)
        return _through(self.quantizer, x, kept, scale, 1.0 / math.sqrt(max(count, 1) * max(self.quantizer.qmax, 1)))

    @torch.no_grad()
    def freeze(self) -> Quantizer:
        """The quantizer with the scale as learned, of the same format, width and granularity."""
        tensors = {**self.quantizer.tensors(), "scale": self.scale}
        if isinstance(self.quantizer, PowerOfTwo):
            tensors["zero_point"] = moved_zero(self.quantizer, self.scale)
        return restore(self.quantizer.config(), tensors)


def learnable(quantizer: Any) -> bool:
    """Whether :class:`LearnedScale` can hold this quantizer."""
    return isinstance(quantizer, Uniform | PowerOfTwo)


def _through(q: Any, x: Tensor, kept: Tensor | None, scale: Tensor, factor: float = 0.0) -> Tensor:
    """x̂ on the grid of a quantizer whose scale is ``scale``, straight through the rounding."""
    now, dims = scale.detach(), x.dim()
    inverse, ends = 1.0 / now, q.bounds(dims)
    if isinstance(q, PowerOfTwo):
        powers = torch.exp2(q.exponents.to(scale.dtype))
        scale, inverse = scale * powers, inverse / powers
        if q.zero_point.dim():
            zero = moved_zero(q, now).to(scale.dtype)
            ends = q.spread(q.qmin - zero, dims), q.spread(q.qmax - zero, dims)
    return _Quantize.apply(x, q.spread(scale, dims), q.spread(inverse, dims), *ends, kept, factor)


def moved_zero(quantizer: PowerOfTwo, scale: Tensor) -> Tensor:
    """The zero point for another base scale: one per channel moves so that the middle of the channel's range stays; a
    shared one stays itself. Learning one scale would otherwise push all channels off their centres."""
    if not quantizer.zero_point.dim():
        return quantizer.zero_point
    middle = (quantizer.qmin + quantizer.qmax) / 2
    return (middle + (quantizer.zero_point - middle) * (quantizer.scale / scale)).round()


def fake_quantize(quantizer: Any, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """``quantizer(x)`` with its straight-through gradient, lean in memory; elements where ``kept`` is set pass in
    float."""
    if learnable(quantizer):
        return _through(quantizer, x, kept, quantizer.scale)
    value = quantizer(x)
    return value if kept is None else torch.where(kept, x, value)


# -- rounding ------------------------------------------------------------------------------------------------------
# AdaRound: the direction in which every weight is rounded, learned (Nagel et al., ICML 2020, section 3.3).
#
# With u = w/s, a weight goes to the level below or to the one above, ⌊u⌋ + h, where h is a rectified sigmoid of a
# learned number α (eq. 22, 23; ζ = 1.1, γ = −0.1):
#
#     h(α) = clip(σ(α)·(ζ − γ) + γ, 0, 1),        ŵ = s·clip(⌊u⌋ + h(α), qmin − z, qmax − z)
#
# α starts where h = u − ⌊u⌋, that is at the float weight. The regulariser Σ 1 − |2h − 1|^β (eq. 24), with β falling
# from a large value to a small one (:func:`annealed_beta`), drives every h to 0 or 1.


ZETA, GAMMA = 1.1, -0.1
"""Ends of the stretched sigmoid: it reaches 0 and 1 at finite α (Louizos et al., 2018)."""

MARGIN = 0.05
"""How far from ½, at least, h starts where a weight is rounded already."""


class AdaRound(nn.Module):
    """A weight whose rounding is learned, on the grid of a frozen :class:`~quantlens.formats.Uniform`.

    quantizer: uniform, symmetric or asymmetric, per tensor or per channel. weight: the float weight, float32, any shape
    that the quantizer fits. ``forward()`` gives the soft weight (same shape); :attr:`alpha` is what is learned.
    straight_through: the forward pass uses the rounded direction, h ≥ ½, and the gradient that of the soft one; the
    loss is then that of the hard weight at every step, and no regulariser is needed. rounded: values on the grid that
    the hard weight starts from; the other level is then the next one towards ``weight``.

    Raises UnsupportedError for a format that is not uniform, ValueError for a weight that is not finite.
    """

    def __init__(
        self, quantizer: Quantizer, weight: Tensor, *, straight_through: bool = False, rounded: Tensor | None = None
    ):
        super().__init__()
        if not isinstance(quantizer, Uniform):
            raise UnsupportedError(
                f"the rounding of {quantizer.kind} codes cannot be learned, only that of uniform ones"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("the weight holds NaN or infinity")
        self.straight_through = straight_through
        weight = weight.detach().float()
        dims, spread = weight.dim(), quantizer.spread
        levels = weight * spread(1.0 / quantizer.scale, dims)
        self.register_buffer("scale", spread(quantizer.scale, dims).clone())
        self.register_buffer("low", spread((quantizer.qmin - quantizer.zero_point).float(), dims))
        self.register_buffer("high", spread((quantizer.qmax - quantizer.zero_point).float(), dims))
        floor, part = levels.floor(), levels - levels.floor()
        if rounded is not None:
            start = (rounded.detach().float() * spread(1.0 / quantizer.scale, dims)).round()
            floor = torch.minimum(torch.maximum(floor, start - 1), start)
            part = torch.where(
                start > floor, (levels - floor).clamp(0.5 + MARGIN, 1.0), (levels - floor).clamp(0.0, 0.5 - MARGIN)
            )
        self.register_buffer("floor", floor)
        self.alpha = nn.Parameter(torch.logit((part - GAMMA) / (ZETA - GAMMA)))

    def h(self) -> Tensor:
        """How far each weight is from the level below to the one above, in [0, 1]."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)

    def forward(self) -> Tensor:
        """The weight as rounded now: soft, or (``straight_through``) hard with the soft gradient."""
        h = self.h()
        if self.straight_through:
            h = h + ((h >= 0.5).to(h.dtype) - h).detach()
        return (self.floor + h).clamp(self.low, self.high) * self.scale

    def regulariser(self, beta: float) -> Tensor:
        """Σ 1 − |2h − 1|^β over all weights: float [], 0 when every direction is decided."""
        return (1.0 - (2.0 * self.h() - 1.0).abs().pow(beta)).sum()

    @torch.no_grad()
    def harden(self) -> Tensor:
        """The weight with every direction decided, on the grid and within the range of codes (float32): what the
        quantizer makes of it is itself, bit for bit."""
        return (self.floor + (self.h() >= 0.5)).clamp(self.low, self.high) * self.scale


def annealed_beta(progress: float) -> float | None:
    """β of the regulariser at ``progress`` (0 … 1 of the iterations): ``None`` in the first fifth, when the regulariser
    is off, then falling linearly from 20 to 2 (BRECQ's schedule)."""
    return None if progress < 0.2 else 20.0 - 18.0 * (progress - 0.2) / 0.8
