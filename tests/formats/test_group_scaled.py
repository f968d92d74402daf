"""Blocks of channels with scales found at run time: what holds for every tensor, and what it is worth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from quantlens.calibration import Observation
from quantlens.calibration.ranges import affine, block_scaled, clipping
from quantlens.formats import GroupScaled, restore

SEEDS = st.integers(0, 10_000)


def tokens(seed: int, channels: int = 32, count: int = 20) -> torch.Tensor:
    """[2, count, channels], tokens from small to large."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-2, 2, count)[:, None]
    return size * torch.randn(2, count, channels, generator=generator)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 8), st.sampled_from([8, 16, 32]), st.sampled_from([-1, -2]), st.floats(0.05, 2.0))
def test_integers_decide_the_values(seed, bits, block, axis, step):
    x = tokens(seed)
    if axis == -2:
        x = x.transpose(-1, -2)
    q = GroupScaled(step, bits, block, axis=axis)
    codes, value = q.encode(x), q(x)
    assert torch.equal(value, q.decode(codes))
    assert codes.dtype == torch.int8
    assert codes.shape[axis] == 32 + 32 // block
    levels = codes.narrow(axis, 0, 32)
    assert int(levels.min()) >= q.qmin
    assert int(levels.max()) <= q.qmax
    exponents = codes.narrow(axis, 32, 32 // block).float()
    scales = torch.exp2(exponents / 8).repeat_interleave(block, axis)
    turned = x if axis == -1 else x.transpose(-1, -2)
    rms = turned.unflatten(-1, (-1, block)).square().mean(-1).sqrt()
    rms = rms if axis == -1 else rms.transpose(-1, -2)
    off = (torch.exp2(exponents / 8) / (step * rms)).log2().abs()
    assert float(off.max()) <= 1 / 16 + 1e-4, "the nearest of eight scales an octave"
    inside = (x / scales).abs() < 2 ** (bits - 1)
    assert bool((((value - x).abs() / scales)[inside] <= 0.5 + 1e-4).all())
    assert bool(((value >= 0) == (x >= 0))[x.abs() > 1e-3 * scales].all()), "no level is zero, none on the wrong side"


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(-6, 6))
def test_blocks_are_apart_and_scale_free(seed, octaves):
    x, q = tokens(seed), GroupScaled(0.6, 3, 16)
    assert torch.equal(q(x * 2.0**octaves), q(x) * 2.0**octaves)
    assert torch.equal(q(x[:, 3:5, 16:]), q(x)[:, 3:5, 16:])
    assert float((q(-x) == -q(x)).double().mean()) > 0.99


@pytest.mark.parametrize(("bits", "least"), [(2, 8.8), (3, 13.9), (4, 18.9)])
def test_gaussian_blocks_come_near_to_the_best_uniform_levels(bits, least):
    """Best uniform levels of unit Gaussian values: 9.1, 14.3 and 19.4 dB, for tokens of any size."""
    x = tokens(1, 256, 200)
    q = block_scaled(x, bits, 64)
    decibels = -10 * ((q(x) - x).square().sum(-1) / x.square().sum(-1)).mean().log10()
    assert float(decibels) > least
    one = affine(*clipping(Observation.of(x.reshape(1, -1)), bits), bits)
    other = -10 * ((one(x) - x).square().sum(-1) / x.square().sum(-1)).mean().log10()
    assert float(other) < 3, "one scale for all leaves nothing of small tokens"


def test_the_step_is_the_best_of_many():
    x = tokens(2).abs()
    found = block_scaled(x, 3, 8)
    error = float((found(x) - x).square().sum())
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert error <= float((GroupScaled(found.scale * factor, 3, 8)(x) - x).square().sum())


def test_zeros_huge_values_and_nan():
    q = GroupScaled(0.6, 3, 8)
    assert float(q(torch.zeros(3, 16)).abs().max()) < 1e-4
    huge = q(torch.full((1, 8), 1e30))
    assert bool(torch.isfinite(huge).all())
    assert bool(torch.isnan(q(torch.full((1, 8), torch.nan))).all()), "what is broken shows"


def test_gradients_pass_inside_and_plain_data_makes_it_again():
    q = GroupScaled(0.5, 3, 16, axis=-2)
    again = restore(q.config(), q.tensors())
    x = tokens(3).transpose(-1, -2).clone().requires_grad_()
    value = again(x)
    assert torch.equal(value.detach(), q(x.detach()))
    value.sum().backward()
    top = value.detach().abs() >= 3.4 * (value.detach() / (q.encode(x)[:, :32].float() + 0.5))
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    assert bool(top[x.grad == 0].all()), "only what the outermost levels clip stands still"


def test_the_name_of_the_group_size_in_older_files():
    made = GroupScaled(0.5, 3, 8)
    older = {"block" if key == "group_size" else key: value for key, value in made.config().items()}
    assert GroupScaled.restore(older, {"scale": made.scale}).group_size == 8


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": float("nan")}, {"group_size": 0}, {"axis": 0}])
def test_what_is_no_format_is_refused(wrong):
    given = {"scale": 0.5, "bits": 3, "group_size": 8, "axis": -1} | wrong
    with pytest.raises(ValueError, match=r"scale|axis"):
        GroupScaled(given.pop("scale"), given.pop("bits"), given.pop("group_size"), **given)
