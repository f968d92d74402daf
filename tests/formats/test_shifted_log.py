"""Shift-uniform-log2: integer codes, levels a constant away from powers of two, more levels where values are small."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst

from quantlens.formats import ShiftedLog, restore


def _plain(x: float, eta: float, low: float, high: float, bits: int) -> float:
    """The definition, one value at a time."""
    step = (high - low) / (2**bits - 1)
    code = min(max(round((math.log2(x + eta) - low) / step), 0), 2**bits - 1)
    return 2.0 ** round(code * step + low) - eta


@settings(max_examples=200, deadline=None)
@given(
    npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32)),
    st.integers(2, 10),
    st.sampled_from([0.001, 0.03, 0.5]),
)
def test_codes(values, bits, eta):
    x = torch.from_numpy(values)
    q = ShiftedLog.covering(eta, torch.tensor([0.0, 0.9]), bits)
    codes = q.encode(x)
    assert torch.equal(q(x), q.decode(codes))
    assert codes.dtype == q.code_dtype
    assert 0 <= int(codes.min()) <= int(codes.max()) <= 2**bits - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_are_those_of_the_definition(bits):
    x = torch.rand(200, generator=torch.Generator().manual_seed(bits)).pow(4)
    q = ShiftedLog.covering(0.02, x, bits)
    low, high = float(q.low), float(q.high)
    expected = torch.tensor([_plain(float(v), 0.02, low, high, bits) for v in x])
    assert float(((q(x) - expected).abs() > 1e-5).float().mean()) < 0.02, "but for values on a boundary"
    torch.testing.assert_close(q(x).mean(), expected.mean(), rtol=1e-2, atol=1e-3)


def test_levels_are_shifts():
    q = ShiftedLog.covering(0.01, torch.tensor([0.0, 1.0]), 4)
    levels = q.decode(torch.arange(16)).double()
    powers = (levels + 0.01).log2()
    assert torch.equal(powers.round().int(), q.exponents)
    assert float((powers - powers.round()).abs().max()) < 1e-4
    assert bool((q.exponents.diff() >= 0).all())
    assert len(q.exponents.unique()) < 16, "log2(0.01) … 0 holds 8 integers"
    assert len(ShiftedLog.covering(1e-6, torch.tensor([0.0, 1.0]), 4).exponents.unique()) == 16


def test_small_values_are_nearer_than_with_a_uniform_format():
    from quantlens.calibration import Observation
    from quantlens.calibration.ranges import affine, mse

    x = torch.randn(64, 197, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    uniform = affine(*mse(Observation.of(x.reshape(1, -1)), 4), 4)
    small = x < 0.02
    q = ShiftedLog.covering(0.005, x, 4)
    assert float((q(x) - x)[small].square().mean()) < 0.3 * float((uniform(x) - x)[small].square().mean())


def test_gradient_passes_inside_the_range():
    x = torch.tensor([-0.1, 0.0, 0.3, 0.5, 0.9], requires_grad=True)
    q = ShiftedLog.covering(0.05, torch.tensor([0.0, 0.5]), 4)
    out = q(x)
    out.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    with torch.no_grad():
        assert torch.equal(q(x), out)


def test_plain_data_and_back():
    q = ShiftedLog.covering(0.04, torch.rand(50), 5)
    twin = restore(json.loads(json.dumps(q.config())), q.tensors())
    x = torch.rand(7, 9)
    assert torch.equal(twin(x), q(x))
    assert set(q.tensors()) == {"eta", "low", "high"}


def test_a_constant_has_one_level():
    q = ShiftedLog.covering(0.5, torch.full((4,), 0.5), 4)
    assert torch.equal(q(torch.full((4,), 0.5)), torch.full((4,), 0.5))


@pytest.mark.parametrize("given_", [(0.0, -1.0, 0.0), (0.1, 0.0, -1.0), (0.1, float("nan"), 0.0), (-1.0, 0.0, 1.0)])
def test_parameters_that_are_none(given_):
    with pytest.raises(ValueError, match=r"eta|low"):
        ShiftedLog(*map(torch.tensor, given_), 4)
