"""AdaRound: the learned direction of rounding."""

from __future__ import annotations

import pytest
import torch

from quantlens.calibration import Observation
from quantlens.calibration.ranges import affine, minmax, mse, symmetric
from quantlens.errors import UnsupportedError
from quantlens.formats import Log, Uniform
from quantlens.reconstruction import AdaRound, annealed_beta


def _layer(seed: int = 0):
    """Inputs whose channels are correlated, so that errors of neighbouring weights can cancel; and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 8, generator=generator) @ torch.randn(8, 24, generator=generator)
    return x + 0.3 * torch.randn(256, 24, generator=generator), torch.randn(16, 24, generator=generator)


def _quantizer(weight, bits, how):
    seen = Observation.of(weight)
    if how == "symmetric":
        return symmetric(*minmax(seen), bits, granularity="channel", axis=0)
    if how == "tensor":
        return affine(*minmax(Observation.of(weight.reshape(1, -1))), bits)
    return affine(*mse(seen, bits), bits, granularity="channel", axis=0)


def _train(rounding, x, weight, steps=200, rate=0.03, strength=0.05):
    start = float((x @ (rounding.quantizer_start - weight).T).square().mean())
    optimiser = torch.optim.Adam(rounding.parameters(), lr=rate)
    for step in range(steps):
        if rounding.straight_through:
            optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = (x @ (rounding() - weight).T).square().mean() / start
        beta = annealed_beta(step / steps)
        if not rounding.straight_through and beta is not None:
            loss = loss + strength * rounding.regulariser(beta) / weight.numel() * 20
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("how", ["asymmetric", "symmetric", "tensor"])
@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_beats_rounding_to_nearest_and_stays_on_the_grid(how, straight, bits):
    x, weight = _layer()
    quantizer = _quantizer(weight, bits, how)
    rounding = AdaRound(quantizer, weight, straight_through=straight)
    nearest = quantizer(weight)
    rounding.quantizer_start = nearest
    _train(rounding, x, weight)
    hard = rounding.harden()
    error = {k: float((x @ (w - weight).T).square().mean()) for k, w in (("nearest", nearest), ("learned", hard))}
    assert error["learned"] < error["nearest"], error
    codes = quantizer.encode(hard)
    assert int(codes.min()) >= quantizer.qmin
    assert int(codes.max()) <= quantizer.qmax
    assert torch.equal(quantizer(hard), hard), "the frozen quantizer must keep the hardened values"
    levels = weight / quantizer.spread(quantizer.scale, 2)
    inside = (levels > rounding.low) & (levels < rounding.high)
    moved = (hard / rounding.scale - levels).abs()[inside]
    assert float(moved.max()) < 1.001, "a weight goes to one of its two neighbours"


def test_it_starts_at_the_float_weight():
    _, weight = _layer(1)
    quantizer = _quantizer(weight, 4, "symmetric")  # nothing is clipped
    rounding = AdaRound(quantizer, weight)
    torch.testing.assert_close(rounding().detach(), weight, rtol=1e-4, atol=1e-5)
    close = (rounding.h() - 0.5).abs() > 1e-4
    assert torch.equal(rounding.harden()[close], quantizer(weight)[close]), "undisturbed, it rounds to nearest"


@pytest.mark.parametrize("how", ["asymmetric", "symmetric"])
def test_it_starts_from_rounded_weights_and_goes_towards_the_float_ones(how):
    x, weight = _layer(2)
    quantizer = _quantizer(weight, 4, how)
    moved = torch.randint(-2, 3, weight.shape, generator=torch.Generator().manual_seed(0)) * quantizer.spread(
        quantizer.scale, 2
    )
    rounded = quantizer(weight + moved)
    rounding = AdaRound(quantizer, weight, straight_through=True, rounded=rounded)
    assert torch.equal(rounding.harden(), rounded)
    assert torch.equal(rounding().detach(), rounded)
    rounding.quantizer_start = rounded
    _train(rounding, x, weight, steps=50)
    hard, step = rounding.harden(), rounding.scale
    assert not torch.equal(hard, rounded)
    assert float(((hard - rounded) / step).abs().max()) < 1.001, "to the next level at most"
    assert bool(((hard - weight).abs() <= (rounded - weight).abs() + 1.001 * step).all())
    changed = hard != rounded
    far = changed & ((rounded - weight).abs() > 1.001 * step)
    assert far.any()
    assert bool(((hard - weight).abs() < (rounded - weight).abs())[far].all()), "towards the float weight"


def test_weights_outside_the_range_are_clipped():
    quantizer = Uniform(torch.tensor(0.1), None, 3)
    hard = AdaRound(quantizer, torch.tensor([[-9.0, 0.04, 9.0]])).harden()
    assert torch.equal(quantizer.encode(hard), torch.tensor([[-4, 0, 3]], dtype=torch.int8))


def _undecided(rounding) -> float:
    """Share of the weights whose h is not within 0.05 of 0 or 1."""
    h = rounding.h()
    return float(((h > 0.05) & (h < 0.95)).double().mean())


def test_the_regulariser_drives_every_direction_to_a_decision():
    _, weight = _layer(2)
    rounding = AdaRound(_quantizer(weight, 4, "asymmetric"), weight)
    assert _undecided(rounding) > 0.5
    with torch.no_grad():
        rounding.alpha.zero_()
    assert float(rounding.regulariser(2.0).detach()) == pytest.approx(weight.numel(), rel=1e-4)
    with torch.no_grad():
        rounding.alpha.copy_(torch.where(torch.rand_like(weight) < 0.5, -5.0, 5.0))
    assert float(rounding.regulariser(20.0).detach()) == pytest.approx(0.0, abs=1e-4)
    assert _undecided(rounding) == 0.0


def test_straight_through_sees_hard_weights_with_soft_gradients():
    x, weight = _layer(3)
    quantizer = _quantizer(weight, 3, "asymmetric")
    rounding = AdaRound(quantizer, weight, straight_through=True)
    now = rounding()
    assert torch.equal(quantizer.encode(now.detach()), quantizer.encode(rounding.harden()))
    torch.testing.assert_close(now.detach(), rounding.harden())
    (x @ now.T).square().sum().backward()
    assert float((rounding.alpha.grad != 0).double().mean()) > 0.8


def test_beta_is_off_then_falls():
    assert annealed_beta(0.1) is None
    assert annealed_beta(0.2) == pytest.approx(20.0)
    assert annealed_beta(0.6) == pytest.approx(11.0)
    assert annealed_beta(1.0) == pytest.approx(2.0)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(UnsupportedError, match="log"):
        AdaRound(Log(torch.tensor(1.0), 4), torch.ones(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        AdaRound(Uniform(torch.tensor(1.0), None, 4), torch.tensor([[float("nan")]]))
