"""Groups of channels, every token's, some (8) at a time, by their own smallest and largest value. For a group x with
values from l = min(x, 0) to h = max(x, 0), and q = 2ᵇ − 1,

    e = clamp(round(8·log₂(c·(h − l))) − t, −128, 127),   s = 2^(e/8)
    z = clamp(round(q/2 − (l + h)/2s), 0, q)
    k = clamp(round(x/s) + z, 0, q),                      x̂ = (k − z)·s

c, the step as a share of the range, is the only parameter, one per tensor. Of t = 0, 1, … a group takes that of the
least squared error. e is an integer of 8 bits and z one of b bits (8 codes of 4 bits, e and z: 5.5 bits per value).
Zero is a level: what a ReLU has made zero stays zero, and the codes of groups that are positive all lie above it.
"""

from typing import Any

import torch
from torch import Tensor

from quantlens.formats.base import needs_grad
from quantlens.formats.group_scaled import LEAST, MOST, Grouped, exponents_of


class _Through(torch.autograd.Function):
    """x, what it is rounded to, and where it lies inside the range (1, else 0): the second, with x's gradient there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None, None


class GroupAffine(Grouped):
    """Asymmetric uniform format with a scale and a zero point per group of channels, found at run time.

    scale: float32 [], the step in units of a group's range, positive. tries: scales that a group chooses from (t <
    tries). group_size, axis: see :class:`~quantlens.formats.group_scaled.Grouped`.

    ``encode`` gives, for C channels, integers of C + 2·C/group_size: codes in [0, 2ᵇ − 1], then e + 128 of all groups,
    then their z.
    """

    kind = "group-affine"
    settings = ("group_size", "tries")

    def __init__(self, scale: Tensor | float, bits: int, group_size: int, *, axis: int = -1, tries: int = 1):
        super().__init__(scale, bits, group_size, signed=False, axis=axis)
        if tries < 1:
            raise ValueError(f"scales to choose from: {tries}; at least 1")
        self.tries = tries

    # in here a group's channels are the first dimension: reductions over a short last one are slow
    def groups(self, x: Tensor) -> Tensor:
        """x [..., C, ...] as [group_size, ..., G, ...]."""
        return x.unflatten(self.axis, (-1, self.group_size)).movedim(self.axis, 0).contiguous()

    def whole(self, groups: Tensor) -> Tensor:
        """The inverse of :meth:`groups`."""
        return groups.movedim(0, self.axis).flatten(self.axis - 1, self.axis)  # type: ignore[operator]

    def terms(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e, z and s of every group [group_size, ..., G, ...]: float32 [..., G, ...] each, e and z integers."""
        low, high = groups.amin(0).clamp_max_(0.0), groups.amax(0).clamp_min_(0.0)
        largest = exponents_of((high - low).mul_(self.scale))
        middle = low.add_(high).mul_(-0.5)

        def candidate(smaller: int) -> tuple[Tensor, Tensor, Tensor]:
            exponents = (largest - smaller).clamp_(LEAST, MOST) if smaller else largest
            scales = self.scales(exponents)
            zeros = (middle * scales.reciprocal()).add_(0.5 * self.qmax).round_()
            return exponents, zeros.clamp_(0, self.qmax).nan_to_num_(0.0), scales

        found = candidate(0)
        if self.tries == 1:
            return found
        least = self._error(groups, *found)
        for smaller in range(1, self.tries):
            other = candidate(smaller)
            error = self._error(groups, *other)
            better = error < least
            least = torch.where(better, error, least)
            found = tuple(torch.where(better, new, old) for new, old in zip(other, found, strict=True))
        return found

    def _error(self, groups: Tensor, exponents: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
        """Squared error of every group [..., G, ...], in units of its values."""
        return self._rounded(groups, zeros, scales).sub_(groups).square_().sum(0)

    def _codes(self, groups: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
        return (groups * scales.reciprocal()).round_().add_(zeros).clamp_(0, self.qmax)

    def _rounded(self, groups: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
        return self._codes(groups, zeros, scales).sub_(zeros).mul_(scales)

    def forward(self, x: Tensor) -> Tensor:
        trained = needs_grad(x)
        with torch.no_grad():
            groups = self.groups(x)
            _, zeros, scales = self.terms(groups)
            value = self.whole(self._rounded(groups, zeros, scales))
            if not trained:
                return value
            ends = -zeros * scales, (self.qmax - zeros) * scales
            inside = self.whole(torch.minimum(groups.maximum(ends[0]), ends[1]).eq_(groups))
        return _Through.apply(x, value, inside)

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            groups = self.groups(x)
            exponents, zeros, scales = self.terms(groups)
            codes = self.whole(self._codes(groups, zeros, scales))
            return torch.cat([codes, exponents - LEAST, zeros], self.axis).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        count = codes.shape[self.axis] // (self.group_size + 2)
        parts = codes.float().split([count * self.group_size, count, count], self.axis)
        levels, exponents, zeros = self.groups(parts[0]), parts[1] + LEAST, parts[2]
        return self.whole(levels.sub_(zeros).mul_(self.scales(exponents)))
