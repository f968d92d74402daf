from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.ranges.similarity import Operand, alternate, candidate_factors, search, similarity

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
def test_codes_and_granularity(method, small_models, pictures):
    model = ql.load_model(small_models["vit"], input_size=(3, 32, 32))
    quantizers = ql.quantize(model, pictures, method=method, bits="W4A4").plan.quantizers
    easy = method == "easy-quant"
    assert quantizers["blocks.0.attn.probs.output"].signed is not easy
    assert quantizers["blocks.0.mlp.fc1.weight"].granularity == ("channel" if easy else "tensor")
    assert not any(bool(q.zero_point.any()) for q in quantizers.values())
