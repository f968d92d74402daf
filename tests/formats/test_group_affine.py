"""Groups of channels with ranges found at run time: what holds for every tensor, and what it is worth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from quantlens.calibration.ranges import block_scaled, group_affine
from quantlens.formats import GroupAffine, restore

SEEDS = st.integers(0, 10_000)


def tokens(seed: int, channels: int = 32, count: int = 20) -> torch.Tensor:
    """[2, count, channels], tokens from small to large, off zero by their own size."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-2, 2, count)[:, None]
    return size * (torch.randn(2, count, channels, generator=generator) + 0.5)


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.integers(1, 8),
    st.sampled_from([8, 16, 32]),
    st.sampled_from([-1, -2, -3]),
    st.floats(0.5, 1.3),
    st.integers(1, 4),
)
def test_integers_decide_the_values(seed, bits, size, axis, share, tries):
    x = tokens(seed).unsqueeze(0).movedim(-1, axis)
    q = GroupAffine(share / (2**bits - 1), bits, size, axis=axis, tries=tries)
    codes, value = q.encode(x), q(x)
    assert torch.equal(value, q.decode(codes))
    assert codes.dtype == torch.uint8
    assert codes.shape[axis] == 32 + 2 * (32 // size)
    levels, exponents, zeros = codes.movedim(axis, -1).split([32, 32 // size, 32 // size], -1)
    assert int(levels.max()) <= q.qmax
    assert int(zeros.max()) <= q.qmax
    steps = torch.exp2((exponents.float() - 128) / 8)
    turned = x.movedim(axis, -1).unflatten(-1, (-1, size))
    span = turned.amax(-1).clamp_min(0) - turned.amin(-1).clamp_max(0)
    smaller = -8 * (steps / (span * q.scale)).log2()
    assert bool(((smaller > -0.51) & (smaller < tries - 0.49)).all()), (
        "the nearest of eight an octave, or one of those below"
    )
    off = (value.movedim(axis, -1).unflatten(-1, (-1, size)) - turned).abs() / steps[..., None]
    free = (levels.unflatten(-1, (-1, size)) > 0) & (levels.unflatten(-1, (-1, size)) < q.qmax)
    assert bool((off[free] <= 0.5 + 1e-4).all()), "what is not clipped is off by half a step at most"


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 6), st.floats(0.8, 1.3))
def test_a_group_takes_the_scale_of_the_least_error(seed, bits, share):
    x = tokens(seed)
    one, three = (GroupAffine(share / (2**bits - 1), bits, 8, tries=tries) for tries in (1, 3))

    def error(q):
        return (q(x) - x).square().unflatten(-1, (-1, 8)).sum(-1)

    smaller = [GroupAffine(one.scale * 2 ** (-t / 8), bits, 8) for t in range(3)]
    least = torch.stack([error(q) for q in smaller]).amin(0)
    assert torch.allclose(error(three), least, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(-6, 6))
def test_groups_are_apart_and_scale_free(seed, octaves):
    x, q = tokens(seed), GroupAffine(0.06, 4, 16, tries=3)
    assert torch.equal(q(x * 2.0**octaves), q(x) * 2.0**octaves)
    assert torch.equal(q(x[:, 3:5, 16:]), q(x)[:, 3:5, 16:])
    assert bool((q(x.relu())[x <= 0] == 0).all()), "zero is a level"


def test_what_a_zero_point_of_its_own_is_worth():
    """Values after a ReLU use all codes, where levels on both sides of zero waste one half: 6 dB."""
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(0)).relu()

    def decibels(q):
        return float(-10 * ((q(x) - x).square().sum() / x.square().sum()).log10())

    found = group_affine(x, 4, 16)
    assert decibels(found) > 27
    assert decibels(found) > decibels(block_scaled(x, 4, 16)) + 6
    for factor in (0.8, 1.25):
        assert decibels(found) >= decibels(GroupAffine(found.scale * factor, 4, 16, tries=3))


def test_zeros_huge_values_and_nan():
    q = GroupAffine(0.06, 4, 8)
    assert bool((q(torch.zeros(3, 16)) == 0).all())
    assert bool(torch.isfinite(q(torch.full((1, 8), 1e30))).all())
    assert bool(torch.isnan(q(torch.full((1, 8), torch.nan))).all()), "what is broken shows"


def test_gradients_pass_inside_and_plain_data_makes_it_again():
    q = GroupAffine(0.05, 4, 16, axis=-2, tries=3)
    again = restore(q.config(), q.tensors())
    former = {name: value for name, value in GroupAffine(0.05, 4, 16).config().items() if name != "tries"}
    assert restore(former, q.tensors()).tries == 1, "files from before groups chose"
    x = tokens(3).transpose(-1, -2).clone().requires_grad_()
    value = again(x)
    assert torch.equal(value.detach(), q(x.detach()))
    value.sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    codes = q.encode(x)[:, :32]
    assert bool(((codes == 0) | (codes == q.qmax))[x.grad == 0].all()), "only what is clipped stands still"


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"scale": float("nan")}, {"group_size": 0}, {"axis": 0}, {"tries": 0}]
)
def test_what_is_no_format_is_refused(wrong):
    given = {"scale": 0.5, "bits": 3, "group_size": 8, "axis": -1} | wrong
    with pytest.raises(ValueError, match=r"scale|axis"):
        GroupAffine(given.pop("scale"), given.pop("bits"), given.pop("group_size"), **given)
