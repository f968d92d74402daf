from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from quantlens.calibration.ranges.guided import (
    HEADS,
    OutputError,
    Side,
    adaptive,
    asymmetric,
    asymmetric_grid,
    losses,
    progressive,
)
from quantlens.formats import AdaLog, Uniform


def _operands(cols: int, seed: int = 0):
    """A [12, 20] and B [cols, 20] with columns of different size, and B coarsely rounded."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linspace(0.1, 3, 20)
    left, right = torch.randn(12, 20, generator=generator), torch.randn(cols, 20, generator=generator) * mix
    return left, right, (right / 1.5).round() * 1.5


def _side(values, bits=3, groups=None):
    rows = (
        values.reshape(1, -1)
        if groups is None
        else values
        if isinstance(groups, torch.Tensor)
        else values.movedim(1, 0).flatten(1)
    )
    candidates, spacing, start = asymmetric_grid(rows, bits, zeros=4)
    return Side(values, partial(asymmetric, bits=bits), candidates, start, groups), spacing


@pytest.mark.parametrize("cols", [8, 50])
def test_the_error_of_the_output_up_to_a_constant(cols):
    """Both with fewer and with more columns than k."""
    left, right, coded = _operands(cols)
    error = OutputError.of(left, coded, right)
    assert (error.gram is None) == (cols <= 20)
    found = []
    for scale in (0.4, 0.9):
        rounded = (left / scale).round() * scale
        expected = (rounded @ coded.T - left @ right.T).square().sum()
        found.append(float(error.exact(rounded - left).sum() - expected))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_rough_error_is_exact_where_columns_do_not_meet():
    left, _, _ = _operands(8)
    right = torch.diag(torch.linspace(1, 2, 20))
    coded = torch.diag(torch.linspace(1, 2, 20).round())
    error, change = OutputError.of(left, coded, right), torch.randn(12, 20)
    torch.testing.assert_close(error.rough(change).sum(), error.exact(change).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [None, "rows"])
def test_the_search_is_near_the_best_of_a_fine_grid(groups):
    left, right, coded = _operands(50)
    error = OutputError.of(left, coded, right)
    side, spacing = _side(left, groups=torch.arange(12) if groups else None)
    found = progressive(side, error, spacing)
    reached = losses(side, error.exact, found.current[None])[0]
    low, high = side.candidates[..., 0].amin(0), side.candidates[..., 0].amax(0)
    fine = torch.lerp(low, high, torch.linspace(0, 1, 300)[:, None])
    every = torch.stack([torch.stack([fine, torch.full_like(fine, float(z))], -1) for z in range(-4, 12)]).flatten(0, 1)
    best = losses(side, error.exact, every).amin(0)
    start = losses(side, error.exact, side.current[None])[0]
    assert bool((reached <= start).all())
    # of what there is to gain from the whole range
    assert float((start - reached).sum()) > 0.9 * float((start - best).sum())


def test_more_steps_are_never_worse():
    left, right, coded = _operands(50)
    error, rows = OutputError.of(left, coded, right), torch.arange(12)
    side, spacing = _side(left, groups=rows)
    found = [losses(side, error.exact, progressive(side, error, spacing, steps=n).current[None])[0] for n in (1, 3)]
    assert bool((found[1] <= found[0]).all())
    assert float(found[1].sum()) < float(found[0].sum())


def test_every_head_has_its_own():
    values = (
        torch.randn(4, 2, 30, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0])[:, None, None]
    )
    side, spacing = _side(values, groups=HEADS)
    scale = progressive(side, OutputError.own(), spacing).current[:, 0]
    assert 5 < float(scale[1] / scale[0]) < 20
    for head in range(2):
        alone, spacing = _side(values[:, head])
        found = progressive(alone, OutputError.own(), spacing).current[0]
        torch.testing.assert_close(found[0], scale[head], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8, 10])
def test_a_constant_stays_exact(bits):
    rows = torch.tensor([[2.5] * 9, [0.0] * 9, [-1e-3] * 9])
    candidates, spacing, start = asymmetric_grid(rows, bits, zeros=min(16, 2 ** (bits - 1)))
    side = Side(rows, partial(asymmetric, bits=bits), candidates, start, torch.arange(3))
    found = progressive(side, OutputError.own(), spacing)
    torch.testing.assert_close(found.quantized(), rows)


def test_grids_cover_ranges_that_exclude_zero():
    rows = torch.linspace(5, 6, 200)[None]
    candidates, spacing, start = asymmetric_grid(rows, 4, zeros=8)
    side = Side(rows, partial(asymmetric, bits=4), candidates, start)
    found = progressive(side, OutputError.own(), spacing)
    assert float((found.quantized() - rows).abs().max()) < 0.05


def test_values_are_those_of_the_quantizers():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    got = asymmetric(x, torch.tensor(0.2), torch.tensor(5.0), bits=4)
    torch.testing.assert_close(got, Uniform(torch.tensor(0.2), torch.tensor(5), 4, signed=False)(x))
    positive = x.abs() - 0.17
    got = adaptive(positive, torch.tensor(2.0), torch.tensor(14.0), bits=4, shift=0.17)
    expected = AdaLog(torch.tensor(2.0), 4, numerator=14, shift=0.17)(positive)
    torch.testing.assert_close(got, expected, rtol=0, atol=2 * 2**-8)


def test_an_operand_without_candidates_stays():
    left, right, coded = _operands(8)
    side = Side(left)
    assert progressive(side, OutputError.of(left, coded, right), torch.ones(1)) is side
    assert replace(side, values=right).current is None
