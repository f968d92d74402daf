from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest
import torch
from torch.nn import functional

from quantlens.errors import UnknownNameError
from quantlens.formats import (
    IntegerLayerNorm,
    LogIntSoftmax,
    MaskedSoftmax,
    PowerOfTwo,
    Uniform,
    affine_parameters,
    restore,
)
from quantlens.formats.integer_ops import FRACTION, integer_exponential

getcontext().prec = 60


def _sqnr(expected, got) -> float:
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))


def _norm(bits: int = 8, channels: int = 24, output: str = "uniform"):
    """(operator, input format, float inputs, γ, β)."""
    generator = torch.Generator().manual_seed(bits)
    factors = torch.arange(channels) % 4
    x = torch.randn(50, channels, generator=generator) * factors.exp2() + 0.5
    gamma = torch.randn(channels, generator=generator)
    beta = torch.randn(channels, generator=generator)
    source = PowerOfTwo(torch.tensor(6.0 / 2**bits), factors, torch.tensor(2 ** (bits - 1)), bits)
    y = functional.layer_norm(source(x), (channels,), gamma, beta, 1e-6)
    made = Uniform(*affine_parameters(y.min(), y.max(), bits), bits, signed=False)
    if output == "ptf":
        made = PowerOfTwo(made.scale / 2, torch.arange(channels) % 2, made.zero_point, bits)
    return IntegerLayerNorm.of(source.scale, gamma, beta, 1e-6, made), source, x, gamma, beta


# -- LayerNorm -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [4, 6, 8, 10])
@pytest.mark.parametrize("output", ["uniform", "ptf"])
def test_integer_layer_norm_is_float_layer_norm_on_the_output_grid(bits, output):
    operator, source, x, gamma, beta = _norm(bits, output=output)
    values = source(x)
    exact = functional.layer_norm(values, (24,), gamma, beta, 1e-6)
    got = operator(values, [24], gamma, beta, 1e-6)
    assert torch.equal(operator.output(got), got), "on the output's grid"
    assert torch.equal(got, operator.output.decode(operator.encode(values)))
    away = (got - operator.output(exact)).abs() / (operator.output.scale * (2 if output == "ptf" else 1))
    # multipliers of 8 bits: up to 2⁻⁹ of the value, that is half a code of 256
    assert float(away.max()) <= (1.01 if bits <= 8 else 6)
    assert _sqnr(exact, got) > min(_sqnr(exact, operator.output(exact)) - 2, 45)


def test_integer_layer_norm_equals_its_formula_in_whole_numbers():
    operator, source, x, _, _ = _norm(8)
    codes = source.encode(x[:6]).to(torch.int64)
    integers = (codes - int(source.zero_point)) << source.exponents.long()
    got = operator.encode(integers.float() * source.scale)
    channels = integers.shape[1]
    guard = round(channels**2 * 1e-6 / float(source.scale) ** 2)
    low, high = 0, 255
    for row, out in zip(integers.tolist(), got.tolist(), strict=True):
        total, square = sum(row), sum(v * v for v in row)
        root = Decimal(channels * square - total * total + guard).sqrt()
        for c, (value, code) in enumerate(zip(row, out, strict=True)):
            n = round(Decimal(2**FRACTION * (channels * value - total)) / root)
            m, b, shift = (int(t[c]) for t in (operator.multiplier, operator.offset, operator.shift))
            assert abs(m) < 256
            assert abs(m * n + b) < 2**31
            y = round(Fraction(m * n + b, 2**shift)) + int(operator.output.zero_point)
            assert code == min(max(y, low), high)


def test_integer_layer_norm_reads_integers_only():
    """What lies between the grid points does not get in."""
    operator, source, x, _, _ = _norm(8)
    values = source(x)
    noise = 1 + 1e-6 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(operator(values * noise), operator(values))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_row_of_equal_values_gives_beta(eps):
    output = Uniform(torch.tensor(0.02), torch.tensor(128), 8, signed=False)
    beta = torch.linspace(-1, 1, 8)
    operator = IntegerLayerNorm.of(torch.tensor(0.1), torch.ones(8), beta, eps, output)
    got = operator(torch.full((3, 8), 0.7))
    assert float((got - beta).abs().max()) <= 0.011


def test_channels_that_layer_norm_switches_off_are_their_beta():
    output = Uniform(torch.tensor(0.02), torch.tensor(128), 8, signed=False)
    gamma = torch.tensor([0.0, 1e-20, 1.0, 0.0])
    beta = torch.tensor([1.0, -0.5, 0.0, 0.0])
    got = IntegerLayerNorm.of(torch.tensor(0.1), gamma, beta, 1e-6, output)(torch.tensor([[0.3, 0.1, -0.5, 2.0]]))
    torch.testing.assert_close(got[0, [0, 1, 3]], beta[[0, 1, 3]], rtol=0, atol=0.011)


# -- softmax -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 0.003, 0.02, 0.05, 0.2, 0.7, 3.0, 40.0])
@pytest.mark.parametrize("levels", [4, 256, 1024])
def test_the_integer_exponential_is_close_at_any_scale(scale, levels):
    steps = -torch.arange(levels, dtype=torch.float64)
    e = integer_exponential(steps, scale)
    assert torch.equal(e, e.floor())
    assert float(e.max()) * 8192 < 2**53
    assert float(e.min()) > 0
    assert bool((e.diff() <= 0).all())
    exact = (steps * scale).exp()
    seen = exact > 2.0**-19
    # a polynomial of degree 2 and ln 2 in steps of 2⁻⁸: 3 % an octave short of the table's end, at most
    ratio = (e / e[0] / exact)[seen]
    assert float(ratio.min()) > 0.88
    assert float(ratio.max()) < 1.1


def _reference(row: list[int], scale: float, bits: int) -> list[int]:
    """Codes of one row of integers, in whole numbers."""
    e = [int(v) for v in integer_exponential(torch.tensor([float(v - max(row)) for v in row]), scale)]
    codes = []
    for value in e:
        ratio = int(Fraction(sum(e), value) + Fraction(1, 2))
        k = ratio.bit_length() - 1
        k += ratio - 2**k >= 2 ** (k - 1) if k else 0
        codes.append(min(k, 2**bits - 1))
    return codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_log_int_softmax_equals_its_formula_in_whole_numbers(bits):
    scale, zero = 0.07, 100
    codes = torch.randint(0, 256, (8, 17), generator=torch.Generator().manual_seed(bits))
    codes[0] = 255
    codes[1] = torch.tensor([0] * 16 + [255])
    # the table's n follows from all 256 differences, the reference's must not depend on the row
    codes[:, 0] = 0
    codes[:, 1] = 255
    source = Uniform(torch.tensor(scale), torch.tensor(zero), 8, signed=False)
    operator = LogIntSoftmax(source.scale, 256, bits)
    got = operator.encode(source.decode(codes))
    for row, out in zip(codes.tolist(), got.tolist(), strict=True):
        assert out == _reference(row, float(source.scale), bits)


def test_log_int_softmax_is_close_to_softmax():
    x = torch.randn(4, 3, 50, 50, generator=torch.Generator().manual_seed(0)) * 2
    source = Uniform(*affine_parameters(x.min(), x.max(), 8), 8, signed=False)
    for bits in (4, 8):
        operator = LogIntSoftmax(source.scale, 256, bits)
        got, exact = operator(source(x)), x.softmax(-1)
        ratio = (got / exact)[exact > 2.0**-13]
        # powers of two: from 2/3 to 4/3, or 3/2 where a ratio below 1.5 becomes 1; and what 8 bits do to the input
        assert float(ratio.min()) > 0.6
        assert float(ratio.max()) < 1.65
        assert torch.equal(operator.output(got), got)
        assert torch.equal(got.log2().round().exp2(), got)
        assert abs(float(got.sum(-1).mean()) - 1) < 0.1


def test_log_int_softmax_takes_any_dimension():
    x = (torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(0)) * 8).round() * 0.1
    operator = LogIntSoftmax(torch.tensor(0.1), 256, 4)
    for dim in range(-4, 4):
        expected = operator(x.movedim(dim, -1).contiguous()).movedim(-1, dim)
        assert torch.equal(operator(x, dim), expected)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e6, 1e30])
def test_log_int_softmax_is_never_nan(scale):
    x = torch.randint(0, 256, (6, 11), generator=torch.Generator().manual_seed(0)).float() * scale
    got = LogIntSoftmax(torch.tensor(scale), 256, 4)(x)
    assert bool(torch.isfinite(got).all())
    assert bool((got.sum(-1) > 0.4).all())


def test_masked_entries_have_no_probability():
    source = Uniform(torch.tensor(0.05), torch.tensor(80), 8, signed=False)
    lowest = source.decode(torch.tensor(0))
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)) - 2
    for hidden in (-100.0, -torch.inf, torch.finfo(torch.float32).min):
        masked = x.clone()
        masked[:, 12:] = hidden
        values = source(masked)
        for operator in (
            LogIntSoftmax(source.scale, 256, 8, lowest=lowest),
            MaskedSoftmax(source.scale, lowest, Uniform(torch.tensor(1 / 255), torch.tensor(0), 8, signed=False)),
        ):
            got = operator(values)
            assert bool((got[:, 12:] == 0).all())
            torch.testing.assert_close(got[:, :12].sum(-1), torch.ones(5), rtol=0, atol=0.35)
            assert torch.equal(got[:, :12], operator(source(x[:, :12])))
            whole = operator(torch.full((2, 4), float(lowest)))
            assert bool(torch.isfinite(whole).all())
    plain = LogIntSoftmax(source.scale, 256, 8)(source(x.masked_fill(torch.arange(20) >= 12, -100.0)))
    assert float(plain[:, 12:].max()) > 0, "without a code of their own, masked entries leak"


# -- both ----------------------------------------------------------------------------------------------------------
def test_operators_survive_as_plain_data():
    operator, source, x, _, _ = _norm(6, output="ptf")
    again = restore(operator.config(), {k: v.clone() for k, v in operator.tensors().items()})
    assert torch.equal(again(source(x)), operator(source(x)))
    grid = Uniform(torch.tensor(0.05), torch.tensor(80), 8, signed=False)
    lowest = grid.decode(torch.tensor(0))
    values = grid(torch.randn(4, 9) * 3)
    for one in (
        LogIntSoftmax(grid.scale, 256, 4),
        LogIntSoftmax(grid.scale, 256, 4, lowest=lowest),
        MaskedSoftmax(grid.scale, lowest, grid),
    ):
        again = restore(one.config(), {k: v.clone() for k, v in one.tensors().items()})
        assert torch.equal(again(values), one(values))
        assert set(again.tensors()) == set(one.tensors())
    with pytest.raises(UnknownNameError):
        restore({"kind": "float-softmax"}, {})


def test_gradients_are_those_of_the_float_operation():
    operator, source, x, gamma, beta = _norm(8)
    values = source(x)
    a, b = values.clone().requires_grad_(True), values.clone().requires_grad_(True)
    out = operator(a, [24], gamma, beta, 1e-6)
    assert torch.equal(out, operator(values)), "the same values as without autograd"
    out.square().sum().backward()
    (functional.layer_norm(b, (24,), gamma, beta, 1e-6).square().sum()).backward()
    assert float(functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)) > 0.99
    grid = torch.randint(-50, 50, (6, 12), generator=torch.Generator().manual_seed(0)).float() * 0.05
    a = grid.clone().requires_grad_(True)
    LogIntSoftmax(torch.tensor(0.05), 256, 8)(a)[:, 0].sum().backward()
    assert bool(torch.isfinite(a.grad).all())
    assert float(a.grad.abs().sum()) > 0


def test_the_work_in_pieces_is_the_work_in_one(monkeypatch):
    from quantlens.formats import integer_ops

    operator, source, x, _, _ = _norm(8)
    soft = LogIntSoftmax(source.scale, 256, 8)
    values = source(x)
    whole = operator(values), soft(values)
    monkeypatch.setattr(integer_ops, "PIECE", 50)
    assert torch.equal(operator(values), whole[0])
    assert torch.equal(soft(values), whole[1])
    assert math.prod(whole[0].shape) > 50
