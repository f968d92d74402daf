from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst

from quantlens.errors import QuantlensError
from quantlens.formats import AdaLog, Log, Uniform, restore
from quantlens.formats.log import adaptive_levels
from quantlens.qmodel.checkpoint import pack, unpack

WIDTHS = st.integers(2, 10)
NUMERATORS = st.integers(1, 137)
SHIFT = 0.17


def _levels(q) -> torch.Tensor:
    return q.decode(torch.arange(2**q.bits))


@settings(max_examples=150, deadline=None)
@given(
    npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(-0.25, 5, width=32)),
    WIDTHS,
    NUMERATORS,
    st.sampled_from([0.0, SHIFT]),
)
def test_codes(values, bits, numerator, shift):
    """What is made is the decoded code, in b bits; quantizing twice changes nothing."""
    x, q = torch.from_numpy(values), AdaLog(torch.tensor(3.0), bits, numerator=numerator, shift=shift)
    codes, back = q.encode(x), q(x)
    assert torch.equal(back, q.decode(codes))
    assert codes.dtype == q.code_dtype
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 2**bits - 1
    assert torch.equal(unpack(pack(codes, bits), bits, tuple(codes.shape), signed=False), codes.int())
    if numerator >= 4:  # finer bases are finer than the table's 8 fractional bits
        torch.testing.assert_close(q(back), back, rtol=1e-5, atol=1e-6)


def test_levels_are_table_entries_shifted():
    """δ·T[(c·q) mod 37]·2^(−⌊c·q/37⌋), T in 256ths."""
    levels = adaptive_levels(14, 4)
    for code in range(15):
        quotient, rest = divmod(14 * code, 37)
        assert float(levels[code]) == round(256 * 2 ** (-rest / 37)) / 256 * 2.0**-quotient
    assert float(levels[15]) == 0.0
    q = AdaLog(torch.tensor(0.5), 4, numerator=14)
    assert torch.equal(_levels(q), 0.5 * levels.float())


def test_base_two_is_log2():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)).square()
    assert torch.equal(AdaLog(torch.tensor(0.9), 4, numerator=37)(x), Log(torch.tensor(0.9), 4, steps=1)(x))


@pytest.mark.parametrize("shift", [0.0, SHIFT])
def test_it_goes_to_the_nearest_level_in_the_logarithm(shift):
    q = AdaLog(torch.tensor(2.0), 4, numerator=14, shift=shift)
    x = torch.linspace(-shift, 2.0 - shift, 4000)
    levels = (_levels(q) + shift)[:-1].log2()
    inside = x + shift > float(levels[-1].exp2())
    distance = ((x[inside] + shift).log2()[:, None] - levels).abs().min(1).values
    got = ((q(x[inside]) + shift).log2() - (x[inside] + shift).log2()).abs()
    assert bool((got <= distance + 0.01).all())


def test_zero_and_what_lies_outside():
    q = AdaLog(torch.tensor(1.0), 4, numerator=20)
    assert torch.equal(q(torch.tensor([0.0, -1.0, 1e-30])), torch.zeros(3))
    assert float(q(torch.tensor(7.0))) == 1.0
    smallest = float(_levels(q)[-2])
    assert q(torch.tensor([0.45 * smallest, 0.55 * smallest])).tolist() == pytest.approx([0.0, smallest])
    shifted = AdaLog(torch.tensor(1.0), 4, numerator=20, shift=SHIFT)
    assert shifted(torch.tensor([-1.0, -SHIFT, 7.0])).tolist() == pytest.approx([-SHIFT, -SHIFT, 1 - SHIFT])


def test_the_shift_is_one_number_per_output_channel():
    """The paper's bias reparametrisation: Ŵ·x̂ = Ŵ·(x̂ + t) − t·Σ Ŵ."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 30, generator=generator), torch.nn.functional.gelu(torch.randn(9, 30))
    q = AdaLog(torch.tensor(3.0), 4, numerator=14, shift=SHIFT)
    plain = AdaLog(torch.tensor(3.0), 4, numerator=14)
    bias = -SHIFT * weight.sum(1)
    torch.testing.assert_close(q(x) @ weight.T, plain(x + SHIFT) @ weight.T + bias, rtol=1e-4, atol=1e-5)


def test_a_base_that_fits_beats_sqrt2_on_a_power_law():
    """Softmax outputs of long rows: a power law over four decades, for which √2 reaches too little."""
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).pow(6)
    errors = {n: float((AdaLog(torch.tensor(1.0), 4, numerator=n)(x) - x).square().mean()) for n in range(5, 60)}
    assert min(errors.values()) < 0.9 * float((Log(torch.tensor(1.0), 4, steps=2)(x) - x).square().mean())


def test_a_shifted_log_beats_uniform_codes_on_gelu_outputs():
    x = torch.nn.functional.gelu(1.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(1)) - 1)

    def error(q):
        return float((q(x) - x).square().mean())

    best = min(
        error(AdaLog(torch.tensor(d), 4, numerator=n, shift=SHIFT))
        for d in (2.0, 2.5, 3.0, 3.5, 4.0)
        for n in range(8, 30, 2)
    )
    uniform = min(error(Uniform(torch.tensor((high + SHIFT) / 15), torch.tensor(1), 4)) for high in (1.5, 2, 2.5, 3, 4))
    assert best < 0.7 * uniform


@pytest.mark.parametrize("shift", [0.0, SHIFT])
def test_gradient_is_straight_through_inside_and_zero_outside(shift):
    x = (torch.tensor([-1.0, 1e-6, 0.3, 0.9, 1.5]) - shift).requires_grad_(True)
    q = AdaLog(torch.tensor(1.0), 4, numerator=20, shift=shift)
    q(x).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    with torch.no_grad():
        plain = q(x)
    assert torch.equal(q(x), plain)


def test_plain_data_and_back():
    q = AdaLog(torch.tensor(1.7), 5, numerator=21, shift=SHIFT)
    twin = restore(json.loads(json.dumps(q.config())), q.tensors())
    x = torch.randn(50)
    assert torch.equal(twin(x), q(x))
    assert isinstance(twin, AdaLog)
    assert twin.base == q.base == pytest.approx(2 ** (21 / 37))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numerator": 0}, "numerator"),
        ({"numerator": 9, "shift": float("inf")}, "shift"),
        ({"numerator": 9, "bits": 1}, "2 bits"),
        ({"numerator": 9, "delta": torch.tensor(0.0)}, "delta"),
    ],
)
def test_what_makes_no_format_is_refused(arguments, message):
    with pytest.raises((ValueError, QuantlensError), match=message):
        AdaLog(**{"delta": torch.tensor(1.0), "bits": 4, **arguments})
