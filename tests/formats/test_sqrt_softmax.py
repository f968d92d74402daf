"""Rows of probabilities as squares of integers: their codes say all, and no row depends on another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from quantlens.calibration import Observation
from quantlens.calibration.ranges import affine, clipping, log_by_quantile
from quantlens.formats import SqrtSoftmax, restore

SEEDS = st.integers(0, 10_000)


def rows(seed: int, count: int = 6, length: int = 40) -> torch.Tensor:
    """Softmax rows from flat to peaked."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.logspace(-1, 1, count)[:, None]
    return (sharpness * torch.randn(count, length, generator=generator)).softmax(-1)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(2, 10))
def test_codes_decide_the_values(seed, bits):
    p, q = rows(seed), SqrtSoftmax(bits)
    codes, value = q.encode(p), q(p)
    assert torch.equal(value, q.decode(codes))
    assert torch.equal(codes.amax(-1), torch.full((len(p),), q.qmax, dtype=codes.dtype))
    torch.testing.assert_close(value.sum(-1), torch.ones(len(p)))
    order = p.argsort(-1)
    assert bool((value.gather(-1, order).diff(dim=-1) >= 0).all()), "a larger probability has no smaller value"
    # the root is off by half a step, and by what dividing by the sum of squares moves all of them
    step, peak = 1 / q.qmax, p.amax(-1, keepdim=True)
    roots = (codes.float() / q.qmax - (p / peak).sqrt()).abs()
    assert float(roots.max()) <= 0.5 * step + 1e-5


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_rows_are_apart_and_scale_free(seed):
    p, q = rows(seed), SqrtSoftmax(4)
    together = q(p)
    for i in range(len(p)):
        assert torch.equal(q(p[i : i + 1]), together[i : i + 1])
    torch.testing.assert_close(q(0.25 * p), together)


@pytest.mark.parametrize("bits", [3, 4])
def test_what_a_product_with_it_loses_is_less_than_with_one_scale(bits):
    p = rows(0, 400, 197)
    values = 1 + torch.randn(197, 16, generator=torch.Generator().manual_seed(1))
    seen = Observation.of(p.reshape(1, -1), 0.01)

    def error(quantized: torch.Tensor) -> float:
        return float(((quantized - p) @ values).square().sum())

    others = (affine(*clipping(seen, bits), bits), log_by_quantile(seen, bits))
    assert error(SqrtSoftmax(bits)(p)) < 0.2 * min(error(q(p)) for q in others)


def test_flat_rows_one_hot_rows_and_rows_of_nothing():
    q = SqrtSoftmax(3)
    flat = torch.full((1, 10), 0.1)
    torch.testing.assert_close(q(flat), flat)
    assert torch.equal(q(torch.eye(10)), torch.eye(10))
    assert torch.equal(q(torch.zeros(2, 10)), torch.zeros(2, 10))
    assert bool(torch.isfinite(q(torch.full((1, 4), torch.nan))).all())


def test_gradients_pass_and_plain_data_makes_it_again():
    p = rows(3).requires_grad_()
    weights = torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    q = restore(SqrtSoftmax(4).config(), SqrtSoftmax(4).tensors())
    (q(p) * weights).sum().backward()
    assert torch.equal(p.grad, weights)
    with torch.no_grad():
        torch.testing.assert_close(q(p), SqrtSoftmax(4)(p), rtol=0, atol=0)
