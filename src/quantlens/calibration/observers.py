"""Observers: collect what a range rule needs, in bounded memory, from values that arrive in pieces.

An :class:`Observer` sees tensors; :meth:`Observer.result` gives an :class:`Observation`: rows of statistics, one row
per scale to be set (1 for a tensor, C for channels, H for heads). Extreme quantiles are exact: only the tails that
they need are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

VALUES = 1 << 19
"""Most values an observation keeps for error-minimising rules (2 MiB of float32); beyond it, a random sample."""

_PROBE = 1 << 16
_PIECE = 64


@dataclass(frozen=True)
class Observation:
    """What was seen, G rows.

    low, high: [G] smallest and largest value. count: values per row.
    values: [G, m] float32, the values themselves or (m < count) a random sample of them; m = 0 where none was asked
    for.
    lower, upper: [G, t] sorted extreme values, the ``t`` smallest ascending and the ``t`` largest descending.
    """

    low: Tensor
    high: Tensor
    count: int
    values: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, rows: Tensor, tail: float = 0.0) -> Observation:
        """Statistics of rows [G, n] held in memory; quantiles up to ``tail`` from either end are prepared."""
        lower, upper = _tails(rows, _tail_count(tail, rows.shape[1]))
        return cls(lower[:, 0], upper[:, 0], rows.shape[1], rows, lower, upper)

    def copy(self) -> Observation:
        """The same statistics in tensors of their own."""
        return replace(self, **{name: part.clone() for name, part in vars(self).items() if isinstance(part, Tensor)})

    def quantile(self, p: float) -> Tensor:
        """[G] quantile of order ``p`` in [0, 1], linear interpolation (as ``torch.quantile``), exact over all values
        seen.

        Raises ValueError if ``p`` lies deeper than the tails that were collected.
        """
        position = p * (self.count - 1)
        pair = []
        for index in (math.floor(position), math.ceil(position)):
            from_top = self.count - 1 - index
            if index < self.lower.shape[1]:
                pair.append(self.lower[:, index])
            elif from_top < self.upper.shape[1]:
                pair.append(self.upper[:, from_top])
            else:
                raise ValueError(f"quantile {p} was not prepared: observe with tail >= {min(p, 1 - p):g}")
        return torch.lerp(pair[0], pair[1], position - math.floor(position))


def _tail_count(tail: float, count: int) -> int:
    """How many extreme values quantiles up to ``tail`` from an end lie between; the extreme one alone for 0."""
    return min(count, math.ceil(tail * (count - 1)) + 2) if tail > 0 else 1


def _tails(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest (ascending) and k largest (descending) of each row of [G, n], exactly."""
    k = min(k, rows.shape[1])
    if k == 1:
        return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if rows.shape[0] == 1 and rows.shape[1] > 4 * _PROBE and k * 16 < rows.shape[1]:
        return _far(rows[0], k, largest=False)[None], _far(rows[0], k, largest=True)[None]
    return rows.topk(k, dim=1, largest=False).values, rows.topk(k, dim=1).values


def _far(flat: Tensor, k: int, *, largest: bool) -> Tensor:
    """The k most extreme of many values, the most extreme first. A threshold from a sample cuts the candidates before
    the exact selection: first pieces of :data:`_PIECE` values by their own extremes, then values."""
    step = max(1, flat.numel() // _PROBE) | 1
    probe = flat[::step]
    keep = min(probe.numel(), math.ceil(2 * k / flat.numel() * probe.numel()) + 16)
    threshold = probe.topk(keep, largest=largest).values[-1]
    beyond = torch.gt if largest else torch.lt
    pieces = flat[: flat.numel() // _PIECE * _PIECE].view(-1, _PIECE)
    ends = pieces.amax(1) if largest else pieces.amin(1)
    candidates = torch.cat([pieces[beyond(ends, threshold)].flatten(), flat[pieces.numel() :]])
    candidates = candidates[beyond(candidates, threshold)]
    if candidates.numel() < k and int(torch.count_nonzero(flat == threshold)) >= k - candidates.numel():
        candidates = torch.cat([candidates, threshold.expand(k)])  # a value that many share
    if candidates.numel() < k or bool(ends.isnan().any()):
        candidates = flat
    return candidates.topk(k, largest=largest).values


def as_rows(x: Tensor, axis: int | None) -> Tensor:
    """[…] -> [G, n]: one row per index of ``axis``, or a single row."""
    if axis is None:
        return x.reshape(1, -1)
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


class Observer:
    """Collects an :class:`Observation` over pieces.

    axis: dimension with a row per index, ``None`` for one row.
    tail: how deep from either end quantiles will be asked for (0.001 keeps a thousandth of the values on each side).
    pieces: how many pieces will come, none larger than the first; with one piece nothing is copied. sample: whether the
    rule reads ``values``. Memory is bounded by ``VALUES`` floats plus the tails.
    """

    def __init__(
        self, *, axis: int | None = None, tail: float = 0.0, pieces: int = 1, seed: int = 0, sample: bool = True
    ):
        self.axis, self.tail, self.pieces, self.sample = axis, tail, pieces, sample
        self._generator = torch.Generator().manual_seed(seed)
        self._keep = 0
        self._result: Observation | None = None

    def update(self, x: Tensor) -> None:
        """Take one piece [..., any shape with the same axis]. Raises ValueError on NaN or infinity."""
        rows = as_rows(x.detach().float(), self.axis)
        # every piece is given the tail of the whole, so that the merged tails are exact wherever the extremes fell
        k = self._keep = max(self._keep, _tail_count(self.tail, rows.shape[1] * self.pieces))
        lower, upper = _tails(rows, k)
        if not bool(torch.isfinite(lower[:, 0]).all() & torch.isfinite(upper[:, 0]).all()) or bool(upper.isnan().any()):
            raise ValueError("values are not finite")
        values = self._thin(rows) if self.sample else rows[:, :0].clone()
        count, old = rows.shape[1], self._result
        if old is not None:
            lower = torch.cat([old.lower, lower], 1).sort(dim=1).values[:, :k]
            upper = torch.cat([old.upper, upper], 1).sort(dim=1, descending=True).values[:, :k]
            values = self._merge(old, values, count) if self.sample else values
            count += old.count
        self._result = Observation(lower[:, 0], upper[:, 0], count, values, lower, upper)

    def result(self) -> Observation:
        if self._result is None:
            raise ValueError("nothing was observed")
        return self._result

    def _thin(self, rows: Tensor) -> Tensor:
        most = VALUES // rows.shape[0]
        if rows.shape[1] <= most:
            return rows
        index = torch.randint(rows.shape[1], (most,), generator=self._generator).to(rows.device)
        return rows.index_select(1, index)

    def _merge(self, old: Observation, sample: Tensor, new: int) -> Tensor:
        """A sample of everything from a sample of the past and one of the new piece, in proportion to their counts."""
        most = VALUES // sample.shape[0]
        share = max(min(round(most * new / (old.count + new)), sample.shape[1]), 1)
        rest = min(old.values.shape[1], most - share)
        return torch.cat([self._pick(old.values, rest), self._pick(sample, share)], 1)

    def _pick(self, rows: Tensor, k: int) -> Tensor:
        if k >= rows.shape[1]:
            return rows
        index = torch.randperm(rows.shape[1], generator=self._generator)[:k].to(rows.device)
        return rows.index_select(1, index)
