from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantlens.calibration import Observation
from quantlens.calibration.ranges import affine, minmax
from quantlens.errors import UnsupportedError
from quantlens.formats import Log, Uniform
from quantlens.reconstruction.closed_form import (
    Factor,
    Grid,
    Moments,
    inverse_factor,
    output_shift,
    refine,
    ridge,
    round_columns,
    round_halves,
)


def _problem(rows: int = 300, width: int = 24, out: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs with a mean, the same coarsely rounded, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.linspace(0.1, 2, width)
    inputs = torch.randn(rows, width, generator=generator) @ mix + 3 * torch.randn(width, generator=generator)
    return inputs, (inputs / 2).round() * 2, torch.randn(out, width, generator=generator)


def _grid(weight: Tensor, bits: int = 3) -> Grid:
    return Grid.of(affine(*minmax(Observation.of(weight)), bits, granularity="channel", axis=0))


def _second(inputs: Tensor) -> Tensor:
    return inputs.double().T @ inputs.double()


def _error(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    """[out] squared error of the outputs."""
    change = (rounded - weight).double()
    return ((change @ gram) * change).sum(1)


def _textbook(weight: Tensor, gram: Tensor, grid: Grid, damping: float) -> Tensor:
    """Optimal brain quantization column by column, every inverse made anew, one row at a time."""
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    rows = []
    for i, row in enumerate(weight.double()):
        row, done = row.clone(), torch.zeros(len(gram), dtype=torch.float64)
        own = Grid(grid.scale[i : i + 1], grid.low[i : i + 1], grid.high[i : i + 1])
        for j in range(len(gram)):
            inverse = torch.linalg.inv(damped[j:, j:])
            done[j] = own.round(row[j].reshape(1, 1).float())[0, 0]
            row[j:] -= (row[j] - done[j]) / inverse[0, 0] * inverse[0]
        rows.append(done)
    return torch.stack(rows).float()


# -- moments ------------------------------------------------------------------------------------------------------
def test_moments_in_pieces_are_those_of_the_whole():
    inputs, rough, _ = _problem()
    moments = Moments.of(zip(rough.split(70), inputs.split(70), strict=True))
    assert moments.count == len(inputs)
    x, y = (t.double() - t.double().mean(0) for t in (inputs, rough))
    torch.testing.assert_close(moments.gram, y.T @ y, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(moments.error, (x - y).T @ y, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(moments.second, _second(rough), rtol=1e-5, atol=1e-2)
    change = (inputs - rough).double()
    torch.testing.assert_close(moments.uncentred().error, change.T @ rough.double(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("outputs", [50, 300])
def test_moments_of_many_columns_for_one_weight(outputs):
    """Half of a large Gram matrix is computed, and for few outputs the products of their errors alone."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(n, 500, generator=generator) + 1 for n in (900, outputs))
    rough = (inputs * 2).round() / 2
    moments, general = Moments.of([(rough, inputs)], weight), Moments.of([(rough, inputs)])
    y = rough.double() - rough.double().mean(0)
    for one in (moments, general):
        torch.testing.assert_close(one.gram, y.T @ y, rtol=1e-5, atol=1e-2)
        torch.testing.assert_close(one.uncentred().gram, _second(rough), rtol=1e-5, atol=1e-2)
    for one, other in ((moments, general), (moments.uncentred(), general.uncentred())):
        torch.testing.assert_close(ridge(weight, one, 0.1), ridge(weight, other, 0.1), rtol=1e-5, atol=1e-5)
    gram, grid = general.gram, _grid(weight)
    order = gram.diagonal().argsort()
    factor = Factor.of(gram, 0.1, order)
    torch.testing.assert_close(ridge(weight, general, 0.1, factor), ridge(weight, general, 0.1), rtol=1e-5, atol=1e-5)
    alone = round_columns(weight, gram, grid, damping=0.1, order=order)
    assert torch.equal(round_columns(weight, gram, grid, damping=0.1, factor=factor), alone)


def test_moments_keep_their_digits_far_from_zero():
    inputs, _, _ = _problem()
    moved = inputs + 1000
    moments = Moments.of([(moved, moved)])
    x = moved.double() - moved.double().mean(0)
    torch.testing.assert_close(moments.gram, x.T @ x, rtol=1e-4, atol=1e-1)


def test_moments_refuse_what_is_nothing():
    with pytest.raises(ValueError, match="no rows"):
        Moments.of([])
    bad = torch.full((3, 2), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        Moments.of([(bad, bad)])


# -- the matrices -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [300, 5])
def test_inverse_factor(rows):
    """Also of fewer rows than columns, which the damping makes regular."""
    gram = _second(_problem(rows)[0])
    factor = inverse_factor(gram, 0.01)
    assert torch.equal(factor, factor.triu())
    whole = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    torch.testing.assert_close(factor.T @ factor @ whole, torch.eye(len(gram), dtype=torch.float64))


def test_a_singular_matrix_without_damping_is_damped():
    gram = _second(_problem(3)[0])
    assert bool(torch.isfinite(inverse_factor(gram, 0.0)).all())
    assert bool(torch.isfinite(inverse_factor(torch.zeros(4, 4, dtype=torch.float64), 0.01)).all())


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_ridge_is_least_squares(damping):
    """Against numpy: √λ·(W' − W) are further equations, the means belong to the bias."""
    inputs, rough, weight = _problem()
    moments = Moments.of([(rough, inputs)])
    found = ridge(weight, moments, damping)
    x, y = ((t - t.mean(0)).double().numpy() for t in (inputs, rough))
    root = np.sqrt(damping * np.mean(np.diag(y.T @ y)))
    left = np.concatenate([y, root * np.eye(y.shape[1])])
    right = np.concatenate([x @ weight.double().numpy().T, root * weight.double().numpy().T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_ridge_and_shift_bring_the_output_closer():
    inputs, rough, weight = _problem()
    moments = Moments.of([(rough, inputs)])
    fitted = ridge(weight, moments, 1e-3)
    outputs = inputs @ weight.T
    shift = output_shift(weight, fitted, moments).float()
    before, after = rough @ weight.T - outputs, rough @ fitted.T - shift - outputs
    centred = before - before.mean(0)
    assert float(after.square().sum()) <= float(centred.square().sum()), "least squares never lose to the start"
    torch.testing.assert_close(after.mean(0), torch.zeros(len(weight)), rtol=0, atol=1e-3)


def test_exact_inputs_need_no_change():
    inputs, _, weight = _problem()
    torch.testing.assert_close(ridge(weight, Moments.of([(inputs, inputs)]), 0.1), weight, rtol=1e-4, atol=1e-4)


# -- rounding -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [1, 5, 128])
def test_columns_are_those_of_the_textbook(block):
    inputs, _, weight = _problem()
    grid, gram = _grid(weight), _second(inputs)
    found = round_columns(weight, gram, grid, damping=0.01, block=block)
    torch.testing.assert_close(found, _textbook(weight, gram, grid, 0.01), rtol=1e-4, atol=1e-4)


def test_an_order_is_a_permutation_of_the_problem():
    inputs, _, weight = _problem()
    grid, gram = _grid(weight), _second(inputs)
    order = gram.diagonal().argsort(descending=True)
    found = round_columns(weight, gram, grid, damping=0.01, order=order)
    expected = round_columns(weight[:, order], gram[order][:, order], grid, damping=0.01)
    assert torch.equal(found[:, order], expected)


@pytest.mark.parametrize("how", [round_columns, round_halves])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compensated_rounding_beats_rounding_to_nearest(how, bits):
    inputs, _, weight = _problem(out=40)
    grid, gram = _grid(weight, bits), _second(inputs)
    found = how(weight, gram, grid, damping=0.01)
    assert torch.equal(grid.round(found), found), "every value is on the grid"
    nearest = _error(weight, grid.round(weight), gram).sum()
    assert float(_error(weight, found, gram).sum()) < float(nearest)


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    _, _, weight = _problem()
    grid, gram = _grid(weight), torch.diag(torch.linspace(1, 9, weight.shape[1], dtype=torch.float64))
    for how in (round_columns, round_halves):
        torch.testing.assert_close(how(weight, gram, grid, damping=0.01), grid.round(weight))


def test_flips_lower_the_error_of_a_half():
    inputs, _, weight = _problem(width=64, out=30)
    grid, gram = _grid(weight), _second(inputs)
    errors = []
    for flips in (0, 2, 100):
        error = refine(weight, grid, gram.float(), flips=flips)
        errors.append(float(((error @ gram.float()) * error).sum()))
    assert errors[0] > errors[1] > errors[2]


def test_halves_in_another_order_and_judged_by_their_own_error():
    inputs, _, weight = _problem(width=64, out=30)
    grid, gram = _grid(weight), _second(inputs)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    usual = round_halves(weight, gram, grid, damping=0.01)
    as_it_stands = round_halves(weight, gram, grid, damping=0.01, order=torch.arange(64))
    assert torch.equal(as_it_stands, usual)
    nearest = float(_error(weight, grid.round(weight), gram).sum())
    for how in ({"order": order}, {"own": True}, {"order": order, "own": True}):
        found = round_halves(weight, gram, grid, damping=0.01, **how)
        torch.testing.assert_close(grid.round(found), found)
        assert not torch.equal(found, usual)
        assert float(_error(weight, found, gram).sum()) < nearest


def test_refined_to_the_end_no_single_flip_is_better():
    inputs, _, weight = _problem(width=9)
    grid, gram = _grid(weight), _second(inputs).float()
    error = refine(weight, grid, gram, flips=1000)
    levels = ((weight + error) / grid.scale).round()
    reached = ((error @ gram) * error).sum(1)
    for column in range(9):
        # the two levels around the weight; the one that is not taken
        low = (weight[:, column : column + 1] / grid.scale).floor()
        other = torch.where(levels[:, column : column + 1] == low, low + 1, low).clamp(grid.low, grid.high)
        changed = error.clone()
        changed[:, column : column + 1] = other * grid.scale - weight[:, column : column + 1]
        assert bool((((changed @ gram) * changed).sum(1) >= reached * (1 - 1e-4)).all())


def test_only_uniform_rows_can_be_fitted():
    with pytest.raises(UnsupportedError, match="log"):
        Grid.of(Log(torch.tensor(1.0), 4))
    with pytest.raises(UnsupportedError, match="uniform"):
        Grid.of(Uniform(torch.ones(3), torch.zeros(3), 4, granularity="channel", axis=-1))
