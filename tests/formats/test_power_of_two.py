from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst

from quantlens.calibration import Observation
from quantlens.calibration.ranges.rules import power_of_two_factors, token_weights
from quantlens.formats import PowerOfTwo, Uniform, affine_parameters, restore
from quantlens.methods.aocq import add_alpha


def _uneven(seed: int = 0, channels: int = 24) -> torch.Tensor:
    """[600, C] values whose channels have ranges from 1 to 8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(600, channels, generator=generator) * torch.linspace(0, 3, channels).exp2()


def _noise(q, x) -> float:
    return float((q(x) - x).square().mean())


@settings(max_examples=150, deadline=None)
@given(
    npst.arrays(np.float32, (7, 5), elements=st.floats(-1e4, 1e4, width=32)),
    st.integers(2, 10),
    st.booleans(),
    st.lists(st.integers(0, 15), min_size=5, max_size=5),
    st.floats(1e-3, 10),
    st.integers(-3, 300),
)
def test_forward_is_decode_of_encode(values, bits, signed, exponents, scale, zero):
    x = torch.from_numpy(values)
    q = PowerOfTwo(torch.tensor(scale), torch.tensor(exponents), torch.tensor(zero), bits, signed=signed)
    codes, back = q.encode(x), q(x)
    assert torch.equal(back, q.decode(codes))
    assert q.qmin <= int(codes.min())
    assert int(codes.max()) <= q.qmax
    assert torch.equal(q(back), back)
    # the shifted integers that an integer kernel works on
    integers = (codes.to(torch.int64) - zero) << torch.tensor(exponents)
    assert torch.equal(integers.float() * q.scale, back)


@pytest.mark.parametrize("axis", [-1, 1, 0, -3])
def test_every_channel_is_uniform_with_its_own_scale(axis):
    x = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1)) * 5
    q = PowerOfTwo(torch.tensor(0.03), torch.tensor([0, 3, 1, 2]), torch.tensor(7), 4, axis=axis)
    assert torch.equal(q(x), q.decode(q.encode(x)))
    for i in range(4):
        one = Uniform(q.scales[i], torch.tensor(7), 4, signed=False)
        torch.testing.assert_close(q(x).select(axis, i), one(x.select(axis, i)), rtol=0, atol=0)


def test_it_survives_as_plain_data_with_small_exponents():
    q = PowerOfTwo(torch.tensor(0.1), torch.tensor([0, 3, 15]), torch.tensor(5), 6, axis=-3)
    again = restore(q.config(), q.tensors())
    x = torch.randn(3, 9, 9)
    assert torch.equal(again(x), q(x))
    assert set(q.tensors()) == {"scale", "exponents", "zero_point"}
    assert q.tensors()["exponents"].dtype == torch.uint8
    assert again.axis == -3


def test_wrong_parameters_are_refused():
    one, zero = torch.tensor(1.0), torch.tensor(0)
    for scale, exponents in ((one, [16]), (one, [-1]), (one * 0, [0]), (one[None], [0]), (one * torch.nan, [1])):
        with pytest.raises(ValueError, match=r"scale|exponents"):
            PowerOfTwo(scale, torch.tensor(exponents), zero, 8)
    with pytest.raises(ValueError, match="one zero point"):
        PowerOfTwo(one, torch.tensor([0, 1]), torch.tensor([0, 0, 0]), 8)


@pytest.mark.parametrize("axis", [-1, 1, -3])
def test_a_zero_point_per_channel(axis):
    """Every channel is the uniform format with its own scale and zero point, also where zero has no code."""
    x = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1)) * 5 + 4
    zeros = torch.tensor([0, 9, -40])
    q = PowerOfTwo(torch.tensor(0.06), torch.tensor([2, 3, 1]), zeros, 4, axis=axis)
    assert torch.equal(q(x), q.decode(q.encode(x)))
    assert int(q.encode(x).max()) <= 15
    again = restore(q.config(), q.tensors())
    assert torch.equal(again(x), q(x))
    x.requires_grad_(True)
    grads = torch.autograd.grad(q(x).sum(), x)[0]
    for i in range(3):
        one = Uniform(q.scales[i], zeros[i], 4, signed=False)
        part = x.detach().select(axis, i).requires_grad_(True)
        torch.testing.assert_close(q(x.detach()).select(axis, i), one(part.detach()), rtol=0, atol=0)
        torch.testing.assert_close(grads.select(axis, i), torch.autograd.grad(one(part).sum(), part)[0])


def test_gradient_is_straight_through_inside_and_zero_outside():
    x = torch.tensor([[0.6, 5.0], [9.0, 9.0]], requires_grad=True)
    q = PowerOfTwo(torch.tensor(0.5), torch.tensor([0, 3]), torch.tensor(0), 4)  # up to 7.5 and up to 60
    q(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0], [0.0, 1.0]]
    with torch.no_grad():
        assert torch.equal(q(x), q(x.detach()))


# -- the rule ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [4, 8])
def test_channels_of_different_range_gain(bits):
    x = _uneven()
    q = power_of_two_factors(Observation.of(x.T.contiguous()), bits)
    plain = Uniform(*affine_parameters(x.min(), x.max(), bits), bits, signed=False)
    assert _noise(q, x) < 0.55 * _noise(plain, x)
    assert q.exponents.min() == 0
    assert q.exponents.max() == 3
    assert bool((q.exponents.int().diff() >= -1).all()), "wider channels get larger exponents"
    small = x[:, :6]
    channel = PowerOfTwo(q.scale, q.exponents[:6], q.zero_point, bits)
    assert _noise(channel, small) < 0.1 * _noise(plain, small)


def test_exponents_have_the_least_error_of_all():
    x = _uneven(3, channels=6)
    q = power_of_two_factors(Observation.of(x.T.contiguous()), 5, largest=3)
    for channel in range(6):
        errors = [
            _noise(Uniform(q.scale * 2.0**k, q.zero_point, 5, signed=False), x[:, channel].contiguous())
            for k in range(4)
        ]
        assert int(q.exponents[channel]) == int(np.argmin(errors))


def test_one_massive_channel_does_not_take_the_others_sign():
    """A channel of 0 … 600 puts the range's zero point at 0: its neighbours would keep no code below zero."""
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] = torch.rand(2000, generator=torch.Generator().manual_seed(1)) * 600
    q = power_of_two_factors(Observation.of(x.T.contiguous()), 8, largest=7)
    rest = [c for c in range(16) if c != 3]
    assert float((q(x) - x)[:, rest].square().mean()) < 2e-3
    assert float((q(x) - x)[:, 3].abs().max()) < 600 / 100


def test_extreme_tokens_do_not_choose_the_shifts():
    """One token in a hundred is some 450 times as large in one channel. By squared error its rounding is what counts
    there; a LayerNorm divides it away, so that the other tokens should have their codes."""
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    x[::100, 3] = 300 * (1 + torch.rand(20, generator=torch.Generator().manual_seed(1)))
    x[::200, 3] *= -1
    seen = Observation.of(x.T.contiguous())
    weights = token_weights(seen)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert float(weights[::100].max()) < 0.2 * float(weights[1:100].min())
    plain, by_token = (add_alpha(seen, 6, weights=w) for w in (None, weights))
    usual = torch.arange(2000) % 100 != 0

    def error(q):
        return float((q(x) - x)[usual].square().mean())

    assert error(by_token) < 0.5 * error(plain)
    equal = add_alpha(seen, 6, weights=torch.ones(2000))
    assert torch.equal(equal.exponents, plain.exponents)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, -2.5])
def test_constant_channels_are_finite(value):
    x = torch.full((10, 4), value)
    q = power_of_two_factors(Observation.of(x.T.contiguous()), 8)
    torch.testing.assert_close(q(x), x, rtol=5e-3, atol=1e-36)
