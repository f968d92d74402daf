"""Floating-point formats: bit patterns against ml_dtypes and torch's own types, blocks against a naive reference."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from quantlens.errors import UnsupportedError
from quantlens.formats import FLOATING, NVFP4, FloatingPoint, MicroScaled, cast, floating_format, floating_name, restore
from quantlens.formats.elements import ELEMENTS

TYPES = {
    "E4M3": "float8_e4m3fn",
    "E5M2": "float8_e5m2",
    "E2M3": "float6_e2m3fn",
    "E3M2": "float6_e3m2fn",
    "E2M1": "float4_e2m1fn",
}
MX = {"MXFP8": "E4M3", "MXFP8-E5M2": "E5M2", "MXFP6": "E2M3", "MXFP6-E3M2": "E3M2", "MXFP4": "E2M1", "MXINT8": "INT8"}
SEEDS = st.integers(0, 10_000)


def sample(seed: int, *shape: int, spread: float = 4.0) -> torch.Tensor:
    """Values of many sizes, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randn(shape, generator=g) * spread)
    return torch.randn(shape, generator=g) * size * (torch.rand(shape, generator=g) > 0.05)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but that any NaN is like any other."""
    nan = a.isnan() & b.isnan()
    return a.shape == b.shape and bool((nan | (a.view(torch.int32) == b.view(torch.int32))).all())


def value_of(code: int, name: str) -> float:
    """A bit pattern's value, spelled out bit by bit; without ml_dtypes."""
    e = ELEMENTS[name]
    if name == "INT8":
        return (code - 256 if code > 127 else code) / 64
    text = f"{code:0{e.bits}b}"
    sign, power, fraction = int(text[0], 2), int(text[1 : 1 + e.exponent], 2), int(text[1 + e.exponent :], 2)
    if name == "E5M2" and power == 31:
        return math.nan if fraction else (-math.inf if sign else math.inf)
    if name == "E4M3" and code & 0x7F == 0x7F:
        return math.nan
    one = fraction / 2**e.mantissa + (power > 0)
    return (-1) ** sign * one * 2.0 ** (max(power, 1) - e.bias)


@cache
def finite_values(name: str) -> np.ndarray:
    """The values ≥ 0, in the order of their codes."""
    values = np.array([value_of(c, name) for c in range(1 << (ELEMENTS[name].bits - 1))])
    return values[np.isfinite(values)]


def nearest(x: float, name: str) -> float:
    """The nearest value by looking at all of them; of two the one with the even code."""
    distances = np.abs(finite_values(name) - abs(x))
    best = min(np.flatnonzero(distances == distances.min()), key=lambda code: code % 2)
    return math.copysign(finite_values(name)[best], x)


# -- elements ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_has_its_value(name):
    element = ELEMENTS[name]
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    values = element.decode(codes)
    assert same(values, torch.tensor([value_of(int(c), name) for c in codes]))
    finite = values.isfinite() & (codes != 0x80 if name == "INT8" else True)
    assert float(values[finite].max()) == element.largest
    assert torch.equal(element.encode(values[finite]), codes[finite])
    assert same(element.round(values[finite]), values[finite])


@pytest.mark.parametrize("name", TYPES)
def test_elements_are_those_of_ml_dtypes(name):
    kind = getattr(pytest.importorskip("ml_dtypes"), TYPES[name])
    element = ELEMENTS[name]
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    assert same(element.decode(torch.from_numpy(codes)), torch.from_numpy(codes.view(kind).astype(np.float32)))
    values = element.decode(torch.from_numpy(codes))
    values = values[values.isfinite()].sort().values
    ties = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(end)) for end in (-math.inf, math.inf)]
    x = torch.cat([ties, *beside, values / 3, sample(0, 50_000, spread=6), torch.tensor([0.0, -0.0, 1e-45, -1e-45])])
    x = x.clamp(-element.largest, element.largest)
    expected = x.numpy().astype(kind).view(np.uint8) & ((1 << element.bits) - 1)
    assert np.array_equal(element.encode(x).numpy(), expected)


@pytest.mark.parametrize(("name", "kind"), [("FP8", torch.float8_e4m3fn), ("FP8-E5M2", torch.float8_e5m2)])
def test_fp8_is_a_cast_of_torch(name, kind):
    largest = torch.finfo(kind).max
    x = torch.cat([sample(1, 50_000, spread=6), torch.tensor([math.nan, -0.0, 0.0])])
    inside = x[~(x.abs() > largest)]
    assert same(cast(inside, name), inside.to(kind).float())
    assert torch.equal(floating_format(name).encode(inside), inside.to(kind).view(torch.uint8))
    beyond = torch.tensor([1e6, -1e6, math.inf, -math.inf])
    assert cast(beyond, name).tolist() == [largest, -largest, largest, -largest]


@pytest.mark.parametrize("name", ELEMENTS)
def test_ties_go_to_the_even_code(name):
    values = sorted(value_of(c, name) for c in range(1 << (ELEMENTS[name].bits - 1)) if value_of(c, name) >= 0)
    values = [v for v in values if math.isfinite(v)]
    for even, odd in zip(values[::2], values[1::2], strict=False):
        assert float(ELEMENTS[name].round(torch.tensor((even + odd) / 2))) == even
        assert float(ELEMENTS[name].round(torch.tensor(-(even + odd) / 2))) == -even


# -- blocks --------------------------------------------------------------------------------------------------------
def naive_mx(row: list[float], name: str) -> tuple[list[float], list[int]]:
    """MX 1.0, section 6.3, block by block and number by number: (values, codes of the scales)."""
    values, scales = [], []
    most = math.frexp(ELEMENTS[name].largest)[1] - 1
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        largest = max(map(abs, block))
        shared = max(math.frexp(largest)[1] - 1 - most, -127) if largest else -127
        scales.append(shared + 127)
        values += [nearest(v / 2.0**shared, name) * 2.0**shared for v in block]
    return values, scales


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("count", [64, 45])
def test_mx_blocks_are_those_of_the_standard(name, count):
    x = torch.cat([sample(2, 3, count), sample(3, 3, count, spread=40), sample(4, 1, count) * 2.0**-126], 0)
    x[0, 32:] = 0
    x = x.clamp(-3e38, 3e38)
    q = floating_format(name)
    expected = [naive_mx(row.tolist(), MX[name]) for row in x]
    assert torch.equal(q(x), torch.tensor([values for values, _ in expected]))
    elements, scales = q.planes(q.encode(x))
    assert elements.shape == x.shape
    assert scales.tolist() == [codes for _, codes in expected]
    assert int(elements.max()) < 1 << q.bits
    fixed = q.fitted(x)
    assert same(fixed(x), q(x))
    assert torch.equal(fixed.encode(x), elements)
    assert same(fixed.decode(elements), q(x))
    assert not fixed.dynamic
    assert torch.equal(restore(fixed.config(), fixed.tensors())(x / 3), fixed(x / 3))
    exact = torch.exp2(scales.double() - 127).repeat_interleave(32, 1)[:, :count]
    decoded = torch.tensor([[value_of(int(c), MX[name]) for c in row] for row in elements], dtype=torch.float64)
    assert torch.equal((decoded * exact).float(), q(x))


@pytest.mark.parametrize("count", [64, 45])
def test_nvfp4_blocks_are_those_of_the_definition(count):
    x = torch.cat([sample(5, 4, count, spread=2), sample(6, 2, count, spread=8)])
    x[0, :16] = 0
    q = NVFP4.of(x)
    assert float(q.scale) == float(x.abs().max() / torch.tensor(448.0 * 6.0))
    elements, scales = q.planes(q.encode(x))
    for row, codes, shared, values in zip(x, elements, scales, q(x), strict=True):
        for block, start in enumerate(range(0, count, 16)):
            part = slice(start, start + 16)
            wanted = nearest(float(row[part].abs().max() / 6 / q.scale), "E4M3")
            assert value_of(int(shared[block]), "E4M3") == wanted
            step = torch.tensor(wanted) * q.scale
            rounded = [nearest(float(v / step), "E2M1") if wanted else math.copysign(0.0, v) for v in row[part]]
            assert [value_of(int(c), "E2M1") for c in codes[part]] == rounded
            assert same(values[part], torch.tensor(rounded) * step)


@settings(max_examples=25, deadline=None)
@given(
    SEEDS,
    st.sampled_from(FLOATING),
    st.sampled_from([-1, -2, -3]),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([1.0, 40.0]),
)
def test_codes_decide_the_values_along_any_axis(seed, name, axis, count, search, spread):
    x = sample(seed, 2, 3, 2, count, spread=spread).clamp(-3e38, 3e38).movedim(-1, axis)
    q = floating_format(name, x.abs().amax(), axis=axis, search=search)
    value = q(x)
    assert same(value, q.decode(q.encode(x)))
    assert value.shape == x.shape
    turned = floating_format(name, x.abs().amax(), search=search)(x.movedim(axis, -1))
    assert torch.equal(value.movedim(axis, -1), turned)
    again = restore(q.config(), q.tensors())
    assert again.config() == q.config()
    assert torch.equal(again(x), value)
    assert (q.encode(x).movedim(axis, -1).shape[-1] == count) == name.startswith("FP8")


@pytest.mark.parametrize("name", [*MX, "NVFP4"])
def test_blocks_of_a_convolution_run_over_all_that_it_sums_over(name):
    weight = sample(7, 5, 3, 4, 4, spread=1)
    q = floating_format(name, weight.abs().amax(), axis=1)
    flat = floating_format(name, weight.abs().amax())
    assert torch.equal(q(weight), flat(weight.flatten(1)).reshape(weight.shape))
    assert torch.equal(q.encode(weight), flat.encode(weight.flatten(1)))
    assert torch.equal(q.decode(q.encode(weight)), q(weight).flatten(1))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(FLOATING), st.integers(-20, 20))
def test_what_holds_for_any_tensor(seed, name, power):
    x = sample(seed, 4, 96, spread=2)
    value = cast(x, name)
    assert torch.equal(cast(-x, name), -value)
    assert torch.equal(cast(x[torch.tensor([2, 0, 3, 1])], name), value[[2, 0, 3, 1]])
    if not name.startswith("FP8"):
        blocks = [2, 0, 1]
        assert torch.equal(
            cast(x.unflatten(1, (3, 32))[:, blocks].flatten(1), name), value.unflatten(1, (3, 32))[:, blocks].flatten(1)
        )
        assert torch.equal(cast(x * 2.0**power, name), value * 2.0**power)
    if name != "NVFP4":
        assert torch.equal(cast(value, name), value)
    fixed = floating_format(name, x.abs().amax())
    if name != "NVFP4":  # its scale of a block is no value of the block
        assert torch.equal(fixed(fixed(x)), fixed(x))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([*MX, "NVFP4"]))
def test_a_search_finds_no_worse_scale(seed, name):
    x = sample(seed, 4, 96, spread=1)
    plain, searched = (floating_format(name, x.abs().amax(), search=search) for search in (False, True))

    def error(q):
        return (q(x) - x).square().unflatten(1, (-1, q.group_size)).sum(-1)

    assert bool((error(searched) <= error(plain)).all())


def test_a_search_knows_the_scale_at_which_nothing_saturates():
    x = torch.full((1, 32), 7.9)  # with the standard's scale 6; with twice it 8
    assert cast(x, "MXFP4").unique().tolist() == [6.0]
    assert floating_format("MXFP4", search=True)(x).unique().tolist() == [8.0]


# -- values that are special -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FLOATING)
def test_empty_single_and_strided_tensors(name):
    for shape in ((0,), (0, 64), (64, 0)):
        assert cast(torch.zeros(shape), name).shape == shape
    single = cast(torch.tensor(0.75), name)
    assert single.shape == ()
    assert float(single) == pytest.approx(0.75, rel=0.07)
    x = sample(8, 64, 40, spread=1)
    assert torch.equal(cast(x.T, name), cast(x.T.contiguous(), name))
    assert torch.equal(cast(x[:, ::3], name), cast(x[:, ::3].contiguous(), name))
    assert not cast(torch.zeros(2, 40), name).any()


@pytest.mark.parametrize("name", FLOATING)
def test_the_type_is_kept(name):
    x = torch.randn(3, 40)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        y = x.to(kind)
        assert torch.equal(cast(y, name), cast(y.float(), name).to(kind))
    whole = torch.arange(-20, 20)
    assert torch.equal(cast(whole, name), cast(whole.float(), name))
    with pytest.raises(UnsupportedError, match="real"):
        cast(torch.zeros(3, dtype=torch.complex64), name)


@pytest.mark.parametrize("name", [*MX, "NVFP4"])
def test_a_block_without_a_scale_is_not_a_number(name):
    for bad in (math.nan, math.inf, -math.inf):
        x = sample(9, 96, spread=1)
        good, x[40] = x.clone(), bad
        q = floating_format(name, good.abs().amax())
        size = q.group_size
        start = 40 // size * size
        inside = torch.zeros(96, dtype=torch.bool)
        inside[start : start + size] = True
        assert bool(q(x)[inside].isnan().all())
        assert torch.equal(q(x)[~inside], q(good)[~inside])
        assert same(q(x), q.decode(q.encode(x)))
        assert int(q.planes(q.encode(x))[1][start // size]) == (0x7F if name == "NVFP4" else 0xFF)
        assert bool(cast(x, name)[~inside].isfinite().all()), "a NaN leaves the tensor's scale alone"


def test_nvfp4_of_tiny_and_huge_values():
    x = torch.full((1, 32), 1e-44)
    assert bool(cast(x, "NVFP4").isfinite().all())
    assert float(NVFP4.up_to(0.0).scale) == 1.0
    x = torch.full((1, 32), 3e38)
    assert torch.allclose(cast(x, "NVFP4"), x)
    assert NVFP4(1.0)(torch.full((1, 16), 5000.0)).unique().tolist() == [2688.0], "beyond its scale it saturates"
    mixed = torch.cat([torch.full((1, 16), 2688.0), torch.full((1, 16), 1e-3)], 1)  # 1e-3/6 is no E4M3 scale but 0
    assert not cast(mixed, "NVFP4")[0, 16:].any()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("fp8", "FP8"),
        ("E4M3", "FP8"),
        ("FP8-E4M3", "FP8"),
        ("fp8_e5m2", "FP8-E5M2"),
        ("E5M2", "FP8-E5M2"),
        ("mx-fp8", "MXFP8"),
        ("MXFP8-E5M2", "MXFP8-E5M2"),
        ("mxfp6", "MXFP6"),
        ("MXFP6_E2M3", "MXFP6"),
        ("mxfp6e3m2", "MXFP6-E3M2"),
        ("MX_FP4", "MXFP4"),
        ("MXFP4-E2M1", "MXFP4"),
        ("MxInt8", "MXINT8"),
        ("nv-fp4", "NVFP4"),
    ],
)
def test_names_are_spelled_freely(given, name):
    assert floating_name(given) == name
    x = sample(10, 2, 64)
    assert torch.equal(cast(x, given), cast(x, name))


def test_an_unknown_name_lists_the_formats():
    with pytest.raises(UnsupportedError, match=r"'MXFP5'.*FP8, .*MXFP4.*NVFP4"):
        cast(torch.zeros(3), "MXFP5")
    assert floating_name("W4A4") is None
    for axis in (0, 2, -4):
        with pytest.raises(ValueError, match="axis"):
            MicroScaled("E2M1", axis=axis)


# -- scales and gradients ------------------------------------------------------------------------------------------
def test_fp8_with_scales_per_channel():
    x = sample(11, 6, 50, spread=1)
    q = floating_format("FP8", x.abs().amax(1), axis=0)
    assert (q.granularity, q.axis) == ("channel", 0)
    expected = torch.stack([(row / s).to(torch.float8_e4m3fn).float() * s for row, s in zip(x, q.scale, strict=True)])
    assert torch.equal(q(x), expected)
    assert same(q(x), q.decode(q.encode(x)))
    assert float(floating_format("FP8", torch.tensor(0.0)).scale) == 1.0
    assert torch.equal(restore(q.config(), q.tensors())(x), expected)
    with pytest.raises(ValueError, match="scale"):
        FloatingPoint("E4M3", 0.0)


@pytest.mark.parametrize("name", FLOATING)
def test_gradients_pass_where_nothing_saturates(name):
    x = sample(12, 2, 64, spread=1).requires_grad_()
    q = floating_format(name, x.detach().abs().amax() / 3)
    value = q(x)
    assert torch.equal(value.detach(), q(x.detach()))
    value.sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}
    if name.startswith("FP8"):
        assert torch.equal(x.grad == 0, x.detach().abs() > x.detach().abs().max() / 3)


@pytest.mark.parametrize("name", [*MX, "NVFP4"])
def test_static_scales_are_those_of_one_tensor(name):
    weight = sample(13, 5, 3, 4, 4, spread=1)
    q = floating_format(name, weight.abs().amax(), axis=1, search=True)
    fixed = q.fitted(weight)
    value = fixed(weight)
    assert torch.equal(value, q(weight))
    assert torch.equal(fixed(value), value)
    assert torch.equal(fixed(value / 2)[value == 0], value[value == 0])
    codes = fixed.encode(weight)
    assert codes.shape == weight.shape
    assert torch.equal(fixed.decode(codes), value)
    held = sum(t.numel() for key, t in fixed.tensors().items() if key == "scale_codes")
    assert held == 5 * -(-48 // q.group_size)
    steps = fixed.each_scale(weight)
    assert torch.equal(ELEMENTS[q.element].round(weight / steps) * steps, value)
