from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.calibration.ranges.similarity import (
    Objective,
    Operand,
    Ranking,
    alternate,
    alternate_pair,
    candidate_factors,
    search,
    search_side,
    similarity,
)

FACTORS = candidate_factors(0.5, 1.2, 100)


def _layer(*, channels: bool, bits: int = 4) -> tuple[Operand, Operand]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator, dtype=torch.float64) ** 3
    inputs = torch.randn(64, 20, generator=generator, dtype=torch.float64) ** 3
    top = 2 ** (bits - 1) - 1
    start = (weight.abs().amax(1) if channels else weight.abs().max()) / top
    return Operand.of(weight, start, -top - 1, top), Operand.of(inputs, inputs.abs().max() / top, -top - 1, top)


@pytest.mark.parametrize("channels", [False, True])
def test_search_is_brute_force(channels):
    weight, inputs = _layer(channels=channels)
    expected, fixed = inputs.values @ weight.values.T, inputs.quantized()
    found = []
    for factor in (1.0, *FACTORS):
        output = fixed @ weight.quantized(weight.start * factor).T
        pair = (expected, output) if channels else (expected.reshape(-1, 1), output.reshape(-1, 1))
        found.append(torch.nn.functional.cosine_similarity(*pair, dim=0))
    # scales that give the same codes have the same cosine: compare what is reached, not the scale
    output = fixed @ search(weight, inputs, FACTORS).quantized().T
    pair = (expected, output) if channels else (expected.reshape(-1, 1), output.reshape(-1, 1))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(*pair, dim=0), torch.stack(found).amax(0), rtol=0, atol=1e-12
    )


def test_search_beats_its_start():
    weight, inputs = _layer(channels=False)
    assert similarity(search(weight, inputs, FACTORS), inputs) > similarity(weight, inputs)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("channels", [False, True])
def test_alternation_never_loses(bits, channels):
    history = alternate(*_layer(channels=channels, bits=bits), FACTORS, 5)[2]
    assert history == sorted(history)
    assert history[-1] > history[0]


def test_all_zero_operands_survive():
    zero = Operand.of(torch.zeros(4, 8), torch.ones(()), -8, 7)
    a, b, history = alternate(zero, zero, FACTORS, 2)
    assert history == [0.0] * len(history)
    assert float(a.scale) == float(b.scale) == 1.0


@pytest.mark.parametrize("method", ["baseptq", "easy-quant"])
def test_codes_and_granularity(method, loaded, pictures):
    model = loaded["vit"]
    quantizers = ql.quantize(model, pictures, method=method, bits="W4A4").plan.quantizers
    easy = method == "easy-quant"
    assert quantizers["blocks.0.attn.probs.output"].signed is not easy
    assert quantizers["blocks.0.mlp.fc1.weight"].granularity == ("channel" if easy else "tensor")
    assert not any(bool(q.zero_point.any()) for q in quantizers.values())


# -- Pearson correlation and order (vt-ptq) ----------------------------------------------------------------------------
def _pair(*, shared: bool, bits: int = 4, columns: int = 24) -> tuple[Operand, Operand]:
    """Operands [6, 10, 8] and [columns, 8] (shared by all samples) or [6, columns, 8]."""
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(6, 10, 8, generator=generator, dtype=torch.float64) ** 3 + 0.4
    right = torch.randn(*(() if shared else (6,)), columns, 8, generator=generator, dtype=torch.float64) ** 3
    top = 2 ** (bits - 1) - 1
    return tuple(Operand.of(x, x.abs().max() / top, -top - 1, top) for x in (left, right))


def _pearson(expected, got) -> float:
    """Mean over samples of torch's own correlation coefficient, 0 for a constant sample."""
    pairs = zip(expected.flatten(1), got.flatten(1), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1].nan_to_num(0.0) for pair in pairs]).mean())


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("columns", [5, 24])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pearson_search_is_brute_force(side, shared, columns, offset):
    """Through Gram matrices (left side, more columns than channels) and through outputs alike."""
    left, right = _pair(shared=shared, columns=columns)
    shift = torch.linspace(-2, 3, columns, dtype=torch.float64) if offset else None
    expected = left.values @ right.values.mT

    def correlation(a, b):
        return _pearson(expected, a @ b.mT - (0 if shift is None else shift))

    moving = left if side == "left" else right
    tried = []
    for factor in (1.0, *FACTORS):
        values = moving.quantized(moving.start * factor)
        tried.append(
            correlation(values, right.quantized()) if side == "left" else correlation(left.quantized(), values)
        )
    found = search_side(Objective(expected), left, right, side, FACTORS, shift).quantized()
    reached = correlation(found, right.quantized()) if side == "left" else correlation(left.quantized(), found)
    assert reached == pytest.approx(max(tried), abs=1e-12)
    assert max(tried) > tried[0]


def _naive_ranking(got, expected, margin) -> float:
    """Eq. 10, pair by pair."""
    total, count = 0.0, 0
    for x, a in zip(got.tolist(), expected.tolist(), strict=True):
        for p in range(len(a)):
            for q in range(p + 1, len(a)):
                sign = (a[p] > a[q]) - (a[p] < a[q])
                total += max(0.0, margin - (x[p] - x[q]) * sign)
                count += 1
    return total / count


def _ranking_loss(got, expected, margin, **drawn):
    return Ranking.of(expected, margin, **drawn).loss(got)


def test_ranking_loss_is_the_double_loop():
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(7, 13, generator=generator, dtype=torch.float64)
    expected[2, 3] = expected[2, 9]  # a tie has no order: it costs the margin
    got = expected + 0.7 * torch.randn(7, 13, generator=generator, dtype=torch.float64)
    for margin in (0.0, 0.2):
        assert float(_ranking_loss(got, expected, margin)) == pytest.approx(_naive_ranking(got, expected, margin))
    rows = torch.tensor([5, 0])
    ranking = Ranking.of(expected.reshape(1, 7, 13), 0.2, rows=rows)
    assert float(ranking.loss(got[None])) == pytest.approx(_naive_ranking(got[rows], expected[rows], 0.2))
    assert float(_ranking_loss(expected, expected, 0.0)) == 0.0


def test_drawn_pairs_estimate_all_pairs():
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(20, 40, generator=generator)
    got = expected + 0.7 * torch.randn(20, 40, generator=generator)
    exact = float(_ranking_loss(got, expected, 0.1))
    drawn = [
        float(_ranking_loss(got, expected, 0.1, pairs=30, generator=torch.Generator().manual_seed(s)))
        for s in range(300)
    ]
    few, spread = torch.tensor(drawn).mean(), torch.tensor(drawn).std()
    assert abs(float(few) - exact) < 4 * float(spread) / 300**0.5
    close = float(_ranking_loss(got, expected, 0.1, pairs=700, generator=torch.Generator().manual_seed(0)))
    assert abs(close - exact) < float(spread)
    assert float(_ranking_loss(got, expected, 0.1, pairs=10**6)) == exact


@pytest.mark.parametrize("similarity", [False, True])
def test_ranking_search_is_brute_force(similarity):
    """The scale with the least ranking loss, or sum of both losses, of all that there are."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 30, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    left[:, :2] *= 6  # a few far-out values
    left, right = (Operand.of(x, x.abs().max() / 7, -8, 7) for x in (left, right))
    expected = left.values @ right.values.mT
    unit = float(expected.var(-1).mean().sqrt())

    def loss(values):
        got = values @ right.quantized().mT
        ranking = float(_ranking_loss(got, expected, 0.1 * unit)) / unit
        return ranking + (1 - _pearson(expected, got) if similarity else 0)

    tried = [loss(left.quantized(left.start * factor)) for factor in (1.0, *FACTORS)]
    objective = Objective(expected, similarity=similarity, ranking=Ranking.of(expected, 0.1 * unit, weight=1.0 / unit))
    found = search_side(objective, left, right, "left", FACTORS)
    assert loss(found.quantized()) == pytest.approx(min(tried), abs=1e-12)
    assert min(tried) < tried[0]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_alternating_pairs_never_lose(bits, corrected):
    left, right = _pair(shared=True, bits=bits)
    expected = left.values @ right.values.mT

    def correct(a, b):
        return (a.quantized() @ b.quantized().mT - expected).mean((0, 1))

    a, b, history = alternate_pair(
        Objective(expected), left, right, FACTORS, 20, correct=correct if corrected else None
    )
    assert history == sorted(history, reverse=True)
    assert history[-1] < history[0]
    got = a.quantized() @ b.quantized().mT - (correct(a, b) if corrected else 0)
    assert history[-1] == pytest.approx(1 - _pearson(expected, got), abs=1e-9)


def test_constant_outputs_survive():
    zero = Operand.of(torch.zeros(2, 4, 8), torch.ones(()), -8, 7)
    a, b, history = alternate_pair(Objective(torch.zeros(2, 4, 4)), zero, zero, FACTORS, 2)
    assert history == [1.0]
    assert float(a.scale) == float(b.scale) == 1.0
