from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst

from quantlens.errors import QuantlensError
from quantlens.formats import Log, Uniform, affine_parameters, restore, symmetric_parameters
from quantlens.qmodel import Bits

WIDTHS = st.integers(2, 10)
VALUES = npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32))


def _affine(x: torch.Tensor, bits: int) -> Uniform:
    return Uniform(*affine_parameters(x.min(), x.max(), bits), bits, signed=False)


@settings(max_examples=200, deadline=None)
@given(VALUES, WIDTHS)
def test_affine_covers_its_range(values, bits):
    x = torch.from_numpy(values)
    q = _affine(x, bits)
    codes, back = q.encode(x), q(x)
    assert torch.equal(back, q.decode(codes))
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 2**bits - 1
    # nothing is farther than half a step (and the half step that rounding z may cost at the ends)
    assert float((back - x).abs().max()) <= float(q.scale) * 1.001 + 1e-6 * float(x.abs().max())
    assert torch.equal(q(back), back), "quantizing twice changes nothing"


@settings(max_examples=100, deadline=None)
@given(VALUES, WIDTHS)
def test_symmetric_is_symmetric(values, bits):
    x = torch.from_numpy(values)
    q = Uniform(symmetric_parameters(x.abs().max(), bits), None, bits)
    assert torch.equal(q(x), q.decode(q.encode(x)))
    assert float(q(torch.zeros(1))) == 0.0
    assert torch.equal(q(-x), -q(x))  # the code −2ᵇ⁻¹ is never reached within the range


@pytest.mark.parametrize("bits", range(2, 11))
def test_affine_equals_torch_where_torch_can(bits):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    q = _affine(x, bits)
    expected = torch.fake_quantize_per_tensor_affine(x, float(q.scale), int(q.zero_point), 0, 2**bits - 1)
    torch.testing.assert_close(q(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_along_an_axis_each_index_has_its_own_scale(axis):
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1, 100, 5, 3, 7])
    others = tuple(d for d in range(3) if d != axis % 3)
    scale, zero = affine_parameters(x.amin(others), x.amax(others), 6)
    q = Uniform(scale, zero, 6, signed=False, granularity="channel", axis=axis)
    assert torch.equal(q(x), q.decode(q.encode(x)))
    for i in range(x.shape[axis]):
        one = Uniform(scale[i], zero[i], 6, signed=False)
        assert torch.equal(q(x).select(axis, i), one(x.select(axis, i)))


@pytest.mark.parametrize("value", [0.0, 3.25, -7.5, 1e-30, 1e30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_is_exact(value, bits):
    x = torch.full((7,), value)
    torch.testing.assert_close(_affine(x, bits)(x), x, rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize(("low", "high"), [(5.0, 6.0), (-6.0, -5.0), (100.0, 100.5), (0.0, 1.0), (-1.0, 0.0)])
def test_a_range_that_excludes_zero_keeps_its_resolution(low, high):
    x = torch.linspace(low, high, 100)
    q = _affine(x, 4)
    assert float((q(x) - x).abs().max()) <= (high - low) / 15 * 1.01
    assert len(q(x).unique()) >= 15


def test_gradient_is_straight_through_inside_and_zero_outside():
    x = torch.tensor([-3.0, -0.4, 0.2, 0.9, 5.0], requires_grad=True)
    q = Uniform(torch.tensor(0.1), torch.tensor(8), 4, signed=False)  # [-0.8, 0.7]
    q(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    with torch.no_grad():
        plain = q(x)
    assert torch.equal(q(x), plain), "the training form has the same values"


@settings(max_examples=200, deadline=None)
@given(
    npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32)),
    st.integers(2, 6),
    st.sampled_from([1, 2]),
)
def test_log_codes(values, bits, steps):
    x = torch.from_numpy(values)
    q = Log(torch.tensor(0.7), bits, steps=steps)
    codes = q.encode(x)
    assert torch.equal(q(x), q.decode(codes))
    assert int(codes.max()) <= q.qmax
    assert int(codes.min()) >= 0
    smallest = float(q.decode(torch.tensor([q.qmax - 1])))
    inside = (x <= 0.7) & (x >= smallest)
    ratio = (x[inside] / q(x)[inside]).log2().abs()
    assert bool((ratio <= 0.5 / steps + 1e-3).all()), "at most half a step in the logarithm"
    below = x < smallest
    assert bool(((q(x) - x).abs()[below] <= torch.minimum(x, smallest - x)[below] + 1e-6 * smallest).all()), (
        "nearest of two"
    )
    assert torch.equal(q(q(x)), q(x))


@pytest.mark.parametrize("steps", [1, 2])
def test_log_levels(steps):
    q = Log(torch.tensor(0.5), 4, steps=steps)
    base = 2.0 ** (1 / steps)
    expected = torch.tensor([0.5 * base**-k for k in range(q.qmax)])
    levels = q.decode(torch.arange(q.qmax + 1))
    torch.testing.assert_close(levels[:-1], expected)
    assert float(levels[-1]) == 0.0
    assert torch.equal(q(torch.tensor([0.0, -1.0, 1e-30, 1e-45])), torch.zeros(4))
    assert float(q(torch.tensor(9.0))) == 0.5, "values above δ become δ"


@pytest.mark.parametrize(
    "quantizer",
    [
        Uniform(torch.tensor(0.3), torch.tensor(-4), 5, signed=False),
        Uniform(torch.tensor([0.3, 0.1]), torch.tensor([3, 300]), 8, signed=False, granularity="channel", axis=-1),
        Uniform(torch.tensor(0.3), None, 3),
        Log(torch.tensor(0.3), 6, steps=2),
    ],
)
def test_plain_data_and_back(quantizer):
    import json

    config = json.loads(json.dumps(quantizer.config()))
    twin = restore(config, quantizer.tensors())
    x = torch.rand(9, 2)
    assert torch.equal(twin(x), quantizer(x))
    assert (twin.bits, twin.signed, twin.granularity, twin.axis) == (
        quantizer.bits,
        quantizer.signed,
        quantizer.granularity,
        quantizer.axis,
    )


def test_unknown_format_is_refused():
    with pytest.raises(QuantlensError, match="number format"):
        restore({"kind": "octal", "bits": 4}, {})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ValueError, match="scale"):
        Uniform(torch.tensor(scale), torch.tensor(0), 4, signed=False)


@pytest.mark.parametrize(
    ("text", "expected"), [("W4A8", (4, 8)), ("w10a2", (10, 2)), (" FP32 ", (32, 32)), ("W8A32", (8, 32))]
)
def test_bits_are_read(text, expected):
    bits = Bits.parse(text)
    assert (bits.weights, bits.activations) == expected
    assert Bits.parse(str(bits)) == bits


@pytest.mark.parametrize("text", ["W1A8", "W4A11", "4", "W4", "A4W4", "int8", "", "W4A8x"])
def test_bits_that_are_none_are_refused(text):
    with pytest.raises(QuantlensError, match="W4A8"):
        Bits.parse(text)


def test_bounds_in_place_are_a_clamp():
    from quantlens.formats.base import bounded_

    x = torch.randn(3, 4, 5) * 4
    x[0, 0, 0], x[1, 1, 1] = float("nan"), float("inf")
    low, high = torch.tensor([-3.0, -1.0, 0.0, -7.0])[:, None], torch.tensor([3.0, 1.0, 2.0, 0.0])[:, None]
    for bounds in ((low, high), (-2.0, 1.0)):
        value = x.clone()
        assert bounded_(value, *bounds) is value
        assert torch.equal(value.nan_to_num(9.0), torch.clamp(x, *bounds).nan_to_num(9.0))
