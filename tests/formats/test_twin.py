from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst

from quantlens.errors import QuantlensError
from quantlens.formats import Twin, Uniform, affine_parameters, restore, symmetric_parameters
from quantlens.qmodel.checkpoint import pack, unpack

WIDTHS = st.integers(2, 10)


def _softmax_like() -> torch.Tensor:
    scores = 3 * torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    return scores.softmax(-1)


def _gelu_like() -> torch.Tensor:
    return torch.nn.functional.gelu(1.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(1)) - 0.5)


def _levels(q: Twin) -> torch.Tensor:
    """The value of every code."""
    return q.decode(torch.arange(q.qmin, q.qmax + 1))


@settings(max_examples=60, deadline=None)
@given(npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(-0.5, 1.5, width=32)), WIDTHS, st.integers(0, 19))
def test_by_magnitude(values, bits, shift):
    """What is made is the decoded code, in b bits, the nearest level of the format."""
    x, q = torch.from_numpy(values), Twin.by_magnitude(shift, bits)
    codes = q.encode(x)
    assert torch.equal(q(x), q.decode(codes))
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 2**bits - 1
    assert torch.equal(q(q(x)), q(x))
    near = (x[:, None] - _levels(q)).abs().amin(1)
    torch.testing.assert_close((q(x) - x).abs(), near, rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(-2, 20, width=32)),
    WIDTHS,
    st.floats(1e-3, 1.0),
    st.floats(1e-3, 1.0),
)
def test_by_sign(values, bits, negative, positive):
    x, q = torch.from_numpy(values), Twin.by_sign(negative, positive, bits)
    codes = q.encode(x)
    assert torch.equal(q(x), q.decode(codes))
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) <= 2 ** (bits - 1) - 1
    assert torch.equal(q(q(x)), q(x))
    assert bool((q(x) * x >= 0).all()), "a value never changes its sign"
    own = torch.where(x < 0, negative, positive)
    low, high = q.range
    inside = (x >= low) & (x <= high)
    assert bool(((q(x) - x).abs() <= own * 0.5001 + 1e-6)[inside].all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 10])
@pytest.mark.parametrize("shift", [0, 1, 2, 5, 12])
def test_the_two_ranges_do_not_overlap(bits, shift):
    """A value is a multiple of Δ1 up to s, or of Δ2 beyond s, never a sum of both (the authors' code adds s to what
    lies beyond it)."""
    q = Twin.by_magnitude(shift, bits)
    one, two = (float(s) for s in q.steps)
    split, half = 2.0**-shift, 2 ** (bits - 1)
    x = torch.linspace(0, 1, 4001)
    codes, values = q.encode(x).int(), q(x)
    assert bool((values[codes < half] <= split * 1.000001).all())
    if shift:
        assert bool((values[codes >= half] > split).all())
        assert bool((codes >= half).any())
    torch.testing.assert_close(values[codes < half], codes[codes < half] * one)
    torch.testing.assert_close(values[codes >= half], (codes[codes >= half] - half) * two)
    assert bool((codes.diff() >= 0).all()), "codes order as their values do"
    assert (float(q(torch.tensor(0.0))), float(q(torch.tensor(1.0)))) == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize("bits", range(2, 11))
@pytest.mark.parametrize("shift", range(20))
def test_steps_differ_by_a_shift(bits, shift):
    q = Twin.by_magnitude(shift, bits)
    assert q.shift == shift
    assert float(q.steps[1]) == 2**shift * float(q.steps[0])


def test_shift_by_sign_may_be_missing():
    assert Twin.by_sign(0.25, 1.0, 4).shift == 2
    assert Twin.by_sign(0.5, 0.25, 4).shift == -1
    assert Twin.by_sign(0.3, 1.0, 4).shift is None


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_softmax_outputs_lose_less_than_in_one_range(bits):
    x = _softmax_like()
    plain = [Uniform(*affine_parameters(x.min(), x.max() * part, bits), bits, signed=False) for part in (1, 0.7, 0.4)]
    twins = [Twin.by_magnitude(shift, bits) for shift in range(12)]
    errors = [[float((q(x) - x).square().sum()) for q in some] for some in (plain, twins)]
    assert min(errors[1]) < 0.8 * min(errors[0])


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_gelu_outputs_lose_less_than_in_one_range(bits):
    x = _gelu_like()
    negative, positive = 0.17 / 2 ** (bits - 1), float(x.max()) / (2 ** (bits - 1) - 1)
    twin = Twin.by_sign(negative, positive, bits)
    plain = Uniform(symmetric_parameters(x.abs().max(), bits), None, bits)
    assert float((twin(x) - x).square().sum()) < 0.95 * float((plain(x) - x).square().sum())


def test_gradient_is_straight_through_inside_and_zero_outside():
    x = torch.tensor([-0.5, 0.01, 0.3, 0.9, 1.5], requires_grad=True)
    q = Twin.by_magnitude(3, 4)
    q(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    y = torch.tensor([-0.5, -0.1, 0.3, 0.69, 0.9], requires_grad=True)
    q = Twin.by_sign(0.02, 0.1, 4)  # [-0.16, 0.7]
    q(y).sum().backward()
    assert y.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    with torch.no_grad():
        plain = q(y)
    assert torch.equal(q(y), plain), "the training form has the same values"


@pytest.mark.parametrize("bits", range(2, 11))
@pytest.mark.parametrize("split", ["magnitude", "sign"])
def test_codes_pack_and_plain_data_comes_back(bits, split):
    q = Twin.by_magnitude(4, bits) if split == "magnitude" else Twin.by_sign(0.01, 0.08, bits)
    x = _softmax_like()[:9] if split == "magnitude" else _gelu_like()[:900]
    codes = q.encode(x)
    assert codes.dtype == q.code_dtype
    packed = pack(codes, q.bits)
    assert packed.numel() == -(-x.numel() * bits // 8)
    back = restore(json.loads(json.dumps(q.config())), q.tensors())
    assert torch.equal(back.decode(unpack(packed, bits, tuple(x.shape), signed=q.signed)), q(x))
    assert (back.split, back.shift, back.signed) == (q.split, q.shift, q.signed)


def test_what_is_no_twin_format_is_refused():
    for steps in ([0.1, 0.3], [0.2, 0.1]):
        with pytest.raises(ValueError, match="1, 2, 4"):
            Twin(torch.tensor(steps), 4, split="magnitude")
    for steps in ([0.0, 0.1], [float("nan"), 0.1], [0.1]):
        with pytest.raises(ValueError, match="positive"):
            Twin(torch.tensor(steps), 4, split="sign")
    with pytest.raises(ValueError, match="split"):
        Twin(torch.tensor([0.1, 0.1]), 4, split="middle")
    with pytest.raises(QuantlensError, match="2 bits"):
        Twin(torch.tensor([0.1, 0.1]), 1, split="sign")
