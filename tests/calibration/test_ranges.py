from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from quantlens.calibration import Observation, Observer, passes as module
from quantlens.calibration.ranges import (
    affine,
    log_by_quantile,
    minmax,
    mse,
    percentile,
    quantile_mse,
    rules,
    symmetric,
)
from quantlens.formats import Uniform, affine_parameters


def _rows(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("shape", [(1, 50), (7, 200), (3, 3000), (1, 600_000)])
@pytest.mark.parametrize("p", [0.9, 0.999, 0.9999, 0.99999, 1.0])
def test_quantiles_are_those_of_numpy(shape, p):
    rows = _rows(0, *shape)
    seen = Observation.of(rows, tail=1 - p)
    for order in (p, 1 - p):
        torch.testing.assert_close(
            seen.quantile(order),
            torch.from_numpy(np.quantile(rows.double().numpy(), order, axis=1)).float(),
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_quantile_that_was_not_prepared_is_refused():
    with pytest.raises(ValueError, match="tail"):
        Observation.of(_rows(0, 1, 10_000), tail=0.001).quantile(0.9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([None, -1, 1]))
def test_pieces_give_what_the_whole_gives(seed, pieces, axis):
    x = _rows(seed, 12, 3, 5)
    x[:2] *= 50  # all extremes in the first piece
    observer = Observer(axis=axis, tail=0.05, pieces=pieces)
    for part in x.chunk(pieces):
        observer.update(part)
    whole = Observer(axis=axis, tail=0.05)
    whole.update(x)
    a, b = observer.result(), whole.result()
    assert torch.equal(a.low, b.low)
    assert torch.equal(a.high, b.high)
    assert a.count == b.count
    for p in (0.05, 0.95, 0.99, 0.01):
        assert torch.equal(a.quantile(p), b.quantile(p))
    assert torch.equal(a.values.sort(dim=1).values, b.values.sort(dim=1).values)


def test_memory_is_bounded_and_the_sample_is_fair(monkeypatch):
    monkeypatch.setattr(module, "VALUES", 4000)
    observer = Observer(tail=0.001, pieces=20)
    for i in range(20):
        observer.update(torch.full((1000,), float(i)) + torch.rand(1000))
    seen = observer.result()
    assert seen.count == 20_000
    assert seen.values.numel() <= 4000
    counts = torch.bincount(seen.values[0].long(), minlength=20)
    assert int(counts.min()) > 120, "every piece is represented in proportion (200 each)"
    assert int(counts.max()) < 280


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    x = torch.randn(4, 100)
    x[2, 7] = bad
    with pytest.raises(ValueError, match="finite"):
        Observer().update(x)


def _error(rows, low, high, bits):
    scale, zero = affine_parameters(low, high, bits)
    return torch.stack(
        [((Uniform(s, z, bits, signed=False)(r) - r) ** 2).mean() for r, s, z in zip(rows, scale, zero, strict=True)]
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantile_mse_takes_the_best_candidate(bits):
    rows = _rows(3, 6, 5000)
    rows[:, 0] = 60.0  # an outlier makes the candidates differ
    seen = Observation.of(rows, tail=0.001)
    low, high = quantile_mse(seen, bits)
    chosen = _error(rows, low, high, bits)
    candidates = torch.stack([_error(rows, *percentile(seen, p), bits) for p in (0.999, 0.9999, 0.99999)])
    torch.testing.assert_close(chosen, candidates.amin(0))


def test_a_sample_does_not_prefer_narrow_ranges(monkeypatch):
    """Ranges judged on an eighth of the values are those judged on all of them, for rows with a few far-out values."""
    rows = _rows(5, 64, 16_000)
    rows[:, ::1000] *= 6
    whole = quantile_mse(Observation.of(rows, tail=0.001), 6)
    monkeypatch.setattr(module, "VALUES", rows.numel() // 8)
    observer = Observer(axis=0, tail=0.001)
    observer.update(rows)
    seen = observer.result()
    assert seen.values.shape[1] < seen.count
    for found, expected in zip(quantile_mse(seen, 6), whole, strict=True):
        assert float((found == expected).double().mean()) > 0.9
        assert float((found.abs() / expected.abs()).log().mean().abs()) < 0.01


def test_mse_beats_minmax_and_matches_a_plain_search():
    rows = _rows(4, 3, 2000)
    low, high = mse(Observation.of(rows), 4)
    found = _error(rows, low, high, 4)
    plain = torch.stack([_error(rows, rows.amin(1) * f, rows.amax(1) * f, 4) for f in 1 - 0.01 * torch.arange(90)])
    torch.testing.assert_close(found, plain.amin(0), rtol=1e-4, atol=1e-9)
    assert bool((found < plain[0]).all())


def test_log_range_takes_the_best_candidate():
    x = torch.randn(20, 4, 50, 50, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    seen = Observer(tail=0.001)
    seen.update(x)
    q = log_by_quantile(seen.result(), 4)
    deltas = [torch.quantile(x.flatten()[:200_000].double(), p).item() for p in (0.999, 0.9999, 0.99999)]
    assert min(abs(float(q.delta) - d) for d in deltas) < 0.05
    assert log_by_quantile(Observation.of(torch.zeros(1, 50), 0.001), 4)(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [affine, symmetric])
@pytest.mark.parametrize("rows", [torch.zeros(2, 9), torch.full((2, 9), 4.0), -torch.rand(2, 9), torch.rand(2, 9) + 5])
def test_odd_rows_give_finite_quantizers(make, rows):
    q = make(*minmax(Observation.of(rows)), 4, granularity="channel", axis=0)
    assert bool(torch.isfinite(q(rows)).all())
    assert float((q(rows) - rows).abs().max()) <= 0.75


@pytest.mark.parametrize("kind", ["normal", "skewed", "zeros", "few values", "half zeros"])
@pytest.mark.parametrize("count", [262_145, 400_000])
@pytest.mark.parametrize("tail", [0.0, 1e-5, 1e-3])
def test_extremes_of_many_values_are_exact(kind, count, tail):
    """The selection in steps finds what sorting finds, whatever the values share."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator)
    values = {
        "normal": values,
        "skewed": values.abs() ** 8,
        "zeros": torch.zeros(count),
        "few values": values.round(),
        "half zeros": values.relu(),
    }[kind]
    observer = Observer(tail=tail)
    observer.update(values)
    seen, ordered = observer.result(), values.sort().values
    kept = seen.lower.shape[1]
    assert kept == (math.ceil(tail * (count - 1)) + 2 if tail else 1)
    assert torch.equal(seen.lower[0], ordered[:kept])
    assert torch.equal(seen.upper[0], ordered.flip(0)[:kept])
    for p in (0.0, tail, 1 - tail, 1.0):
        expected = torch.quantile(values.double()[: 1 << 24], p, interpolation="linear")
        torch.testing.assert_close(seen.quantile(p)[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", [0.0, 1e-3])
def test_one_value_that_is_no_number_is_found_among_many(tail):
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    values[123_457] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Observer(tail=tail).update(values)


@pytest.mark.parametrize("how", [rules._by_quantizing, rules._by_sorting])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_errors_of_all_candidates_are_those_of_the_format(how, bits, offset, monkeypatch):
    """Rows and values in pieces, too; also where a row lies far from zero, or holds one value."""
    monkeypatch.setattr(rules, "PIECE", 100)
    rows = torch.randn(5, 333, generator=torch.Generator().manual_seed(0)) + offset
    rows[2] = 1.5
    shrink = torch.tensor([1.0, 0.9, 0.7, 0.4])[:, None]
    lows, highs = (rows.amin(1) - offset) * shrink + offset, (rows.amax(1) - offset) * shrink + offset
    scale, zero = affine_parameters(lows, highs, bits)
    found = how(rows, scale, zero, bits)
    for i in range(len(shrink)):
        level = (rows.double() / scale[i].double()[:, None] + zero[i][:, None]).round().clamp(0, 2**bits - 1)
        error = ((level - zero[i][:, None]) * scale[i].double()[:, None] - rows).square().mean(1)
        torch.testing.assert_close(found[i], error, rtol=2e-3, atol=1e-9)
