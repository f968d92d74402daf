"""LSQ: the learned scale of an activation quantizer."""

from __future__ import annotations

import math

import pytest
import torch

from quantlens.errors import UnsupportedError
from quantlens.formats import Log, PowerOfTwo, Uniform
from quantlens.reconstruction.scales import LearnedScale, fake_quantize, moved_zero


def _values(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 7, 6, generator=generator) * torch.tensor([0.2, 1.0, 3.0, 0.5, 8.0, 1.5])


QUANTIZERS = {
    "asymmetric": Uniform(torch.tensor(0.3), torch.tensor(6), 4, signed=False),
    "symmetric": Uniform(torch.tensor(0.2), None, 4),
    "channel": Uniform(torch.tensor([0.1, 0.2, 0.4, 0.1, 0.9, 0.3]), torch.tensor([7, 8, 5, 9, 8, 40]), 4, signed=False,
                       granularity="channel", axis=-1),
    "power-of-two": PowerOfTwo(torch.tensor(0.05), torch.tensor([0, 2, 3, 1, 5, 2]), torch.tensor(7), 4),
}  # fmt: skip


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request):
    return QUANTIZERS[request.param]


def test_before_learning_it_is_the_quantizer_bit_for_bit(quantizer):
    x = _values()
    learned = LearnedScale(quantizer)
    assert torch.equal(learned(x).detach(), quantizer(x))
    assert torch.equal(fake_quantize(quantizer, x), quantizer(x))
    frozen = learned.freeze()
    assert frozen.config() == quantizer.config()
    assert torch.equal(frozen(x), quantizer(x))


def test_frozen_it_is_what_was_learned_bit_for_bit(quantizer):
    learned, x = LearnedScale(quantizer), _values(1)
    with torch.no_grad():
        learned.ratio.mul_(1.37)
    frozen = learned.freeze()
    assert torch.equal(frozen(x), learned(x).detach())
    torch.testing.assert_close(frozen.scale, quantizer.scale * 1.37)


@pytest.mark.parametrize("factor", [0.5, 1.37, 4.0])
def test_the_middle_of_every_channel_stays_where_it_was(factor):
    """Channels far from zero with one scale to learn: a wider scale opens their ranges around what they hold."""
    zeros = torch.tensor([-20, 8, 7, 60, 7, 5])
    quantizer = PowerOfTwo(torch.tensor(0.05), torch.tensor([0, 2, 3, 1, 5, 2]), zeros, 4, axis=-1)
    learned = LearnedScale(quantizer)
    with torch.no_grad():
        learned.ratio.mul_(factor)
    frozen = learned.freeze()

    def middle(q):
        return (7.5 - q.zero_point) * q.scales

    x = _values(7)
    assert torch.equal(frozen(x), learned(x).detach())
    assert bool(((middle(frozen) - middle(quantizer)).abs() <= 0.51 * frozen.scales).all())
    shared = QUANTIZERS["power-of-two"]
    assert torch.equal(moved_zero(shared, shared.scale * factor), shared.zero_point), "one for all stays itself"


def test_the_gradients_are_those_of_the_definition(quantizer):
    """x̂(s) = (clamp(x/s) + δ)·s with the rounding residue δ held fixed: LSQ's straight-through derivative."""
    x, grad = _values(2), torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(3))
    learned = LearnedScale(quantizer)
    held = x.clone().requires_grad_(True)
    learned(held).backward(grad)

    spread = quantizer.spread
    scales = quantizer.scales if isinstance(quantizer, PowerOfTwo) else quantizer.scale
    low = (quantizer.qmin - quantizer.zero_point).double()
    high = (quantizer.qmax - quantizer.zero_point).double()
    if low.dim():
        low, high = spread(low, 3), spread(high, 3)
    base = spread(scales.double(), 3)
    clipped = torch.clamp(x.double() / base, low, high)
    residue = clipped.round() - clipped

    def definition(ratio: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        step = base * (spread(ratio, 3) if ratio.dim() else ratio)
        return (torch.clamp(values / step, low, high) + residue) * step

    eps, ratio = 1e-6, torch.ones_like(quantizer.scale, dtype=torch.float64)
    numeric = []
    for i in range(ratio.numel()):
        up, down = ratio.clone().reshape(-1), ratio.clone().reshape(-1)
        up[i] += eps
        down[i] -= eps
        change = definition(up.view_as(ratio), x.double()) - definition(down.view_as(ratio), x.double())
        numeric.append((change / (2 * eps) * grad).sum())
    count = x.numel() / ratio.numel()
    expected = torch.stack(numeric).view_as(ratio) / math.sqrt(count * quantizer.qmax)
    torch.testing.assert_close(learned.ratio.grad.double(), expected, rtol=1e-3, atol=1e-4)

    inside = clipped == x.double() / base
    assert torch.equal(held.grad, grad * inside)
    assert not bool(inside.all()), "the example must have clipped values"


def test_a_step_along_the_gradient_lowers_the_error_of_a_bad_range(quantizer):
    """A range 0.4 times as wide as the values': its gradient says wider."""
    x = _values(4).repeat(8, 1, 1)
    learned = LearnedScale(quantizer)
    with torch.no_grad():
        learned.ratio.mul_(0.4)
    before = (learned(x) - x).square().mean()
    before.backward()
    assert float(learned.ratio.grad.sum()) < 0
    with torch.no_grad():
        learned.ratio.sub_(0.05 * learned.ratio.grad.sign())
        assert float((learned(x) - x).square().mean()) < float(before)


def test_kept_elements_pass_in_float_and_do_not_pull_the_scale():
    quantizer, x = QUANTIZERS["asymmetric"], _values(5)
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    learned = LearnedScale(quantizer)
    value = learned(x, kept)
    assert torch.equal(value[kept], x[kept])
    assert torch.equal(value[~kept].detach(), quantizer(x)[~kept])
    value.sum().backward()
    pull = learned.ratio.grad.clone()
    learned.ratio.grad = None
    other = x.clone()
    other[kept] = 100.0
    learned(other, kept).sum().backward()
    assert float(learned.ratio.grad) == pytest.approx(float(pull), rel=1e-4, abs=1e-5)
    learned.ratio.grad = None
    learned(x, torch.ones_like(kept)).sum().backward()
    assert float(learned.ratio.grad) == pytest.approx(0.0, abs=1e-5)


def test_formats_without_one_scale_are_refused():
    with pytest.raises(UnsupportedError, match="log"):
        LearnedScale(Log(torch.tensor(1.0), 4))
