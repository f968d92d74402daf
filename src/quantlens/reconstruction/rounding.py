"""AdaRound: the direction in which every weight is rounded, learned (Nagel et al., ICML 2020, section 3.3).

With u = w/s, a weight goes to the level below or to the one above, ⌊u⌋ + h, where h is a rectified sigmoid of a learned
number α (eq. 22, 23; ζ = 1.1, γ = −0.1):

    h(α) = clip(σ(α)·(ζ − γ) + γ, 0, 1),        ŵ = s·clip(⌊u⌋ + h(α), qmin − z, qmax − z)

α starts where h = u − ⌊u⌋, that is at the float weight. The regulariser Σ 1 − |2h − 1|^β (eq. 24), with β falling from
a large value to a small one (:func:`annealed_beta`), drives every h to 0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantlens.errors import UnsupportedError
from quantlens.formats import Quantizer, Uniform

ZETA, GAMMA = 1.1, -0.1
"""Ends of the stretched sigmoid: it reaches 0 and 1 at finite α (Louizos et al., 2018)."""


class AdaRound(nn.Module):
    """A weight whose rounding is learned, on the grid of a frozen :class:`~quantlens.formats.Uniform`.

    quantizer: uniform, symmetric or asymmetric, per tensor or per channel. weight: the float weight, float32, any shape
    that the quantizer fits. ``forward()`` gives the soft weight (same shape); :attr:`alpha` is what is learned.
    straight_through: the forward pass uses the rounded direction, h ≥ ½, and the gradient that of the soft one; the
    loss is then that of the hard weight at every step, and no regulariser is needed.

    Raises UnsupportedError for a format that is not uniform, ValueError for a weight that is not finite.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor, *, straight_through: bool = False):
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
        self.register_buffer("floor", levels.floor())
        self.alpha = nn.Parameter(torch.logit((levels - self.floor - GAMMA) / (ZETA - GAMMA)))

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
