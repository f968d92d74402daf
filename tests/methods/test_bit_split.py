from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.errors import QuantlensError
from quantlens.graph import graph_of
from quantlens.methods import bit_split as method, registry
from quantlens.methods.bit_split import (
    _optimise_bit,
    activation_quantizer,
    bit_split,
    round_alternating,
    split_bits,
    stitch_bits,
)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


def _layer(bits: int, seed: int = 0):
    """Inputs with correlated channels, a weight, its start: t, H, codes, α and the layer's error as a function."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(40, 40, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, 40)
    inputs = torch.randn(400, 40, generator=generator, dtype=torch.float64) @ mix + 0.5
    weight = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    outputs = inputs @ weight.T
    rough = (inputs / 2).round() * 2
    codes, scale = round_alternating(weight, bits)

    def error(codes, scale):
        return (outputs - rough @ (codes * scale[:, None]).T).square().sum(0)

    return outputs.T @ rough, rough.T @ rough, codes, scale, error


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 10])
def test_bits_are_split_and_stitched(bits):
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (5, 9), generator=torch.Generator().manual_seed(0)).float()
    planes = split_bits(codes, bits)
    assert planes.shape == (bits - 1, 9, 5)
    assert set(planes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(stitch_bits(planes), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_it_beats_rounding_and_never_rises(bits):
    cross, gram, codes, scale, error = _layer(bits)
    top = 2 ** (bits - 1) - 1
    found, alpha, history = bit_split(cross, gram, codes, scale, bits, 10)
    assert history == sorted(history, reverse=True)
    # channel by channel: better than rounding to nearest with the same α, and than where it began
    nearest = (codes * scale[:, None] / alpha[:, None]).round().clamp(-top, top)
    assert bool((error(found, alpha) <= error(nearest, alpha) + 1e-6).all())
    assert bool((error(found, alpha) < error(codes, scale)).all())
    assert float(found.abs().max()) <= top
    assert torch.equal(found, found.round())


def test_the_objective_is_the_error_up_to_a_constant():
    cross, gram, codes, scale, error = _layer(4)
    found, alpha, history = bit_split(cross, gram, codes, scale, 4, 3)
    fall = float((error(codes, scale) - error(found, alpha)).sum())
    assert history[0] - history[-1] == pytest.approx(fall, rel=1e-9)


@pytest.mark.parametrize("bit", [0, 1, 2])
def test_at_the_end_no_digit_can_be_better(bit):
    """Passes over one ternary plane, until it stays: every digit is the best of its three values, all else fixed."""
    cross, gram, codes, scale, error = _layer(4)
    planes = split_bits(codes, 4)
    for _ in range(50):
        before = planes.clone()
        _optimise_bit(cross, gram, planes, bit, scale)
    assert torch.equal(before, planes)
    assert torch.equal(
        before[[j for j in range(3) if j != bit]], split_bits(codes, 4)[[j for j in range(3) if j != bit]]
    )
    reached = error(stitch_bits(planes), scale)
    assert bool((reached <= error(codes, scale)).all())
    for n in range(40):
        for value in (-1.0, 0.0, 1.0):
            other = planes.clone()
            other[bit, n] = value
            assert bool((error(stitch_bits(other), scale) >= reached * (1 - 1e-9)).all())


def test_one_coordinate_is_exact():
    """With one input channel the best codes and α are known: α·q = t/H, whatever the bits."""
    gram = torch.tensor([[4.0]], dtype=torch.float64)
    cross = torch.tensor([[6.0], [-2.0]], dtype=torch.float64)
    codes, scale, _ = bit_split(cross, gram, torch.ones_like(cross), torch.ones(2, dtype=torch.float64), 4, 5)
    torch.testing.assert_close((codes * scale[:, None])[:, 0], torch.tensor([1.5, -0.5], dtype=torch.float64))


def test_dead_inputs_and_empty_weights_survive():
    cross, gram, codes, scale, _ = _layer(4)
    gram[3], gram[:, 3], cross[:, 3] = 0.0, 0.0, 0.0
    found, alpha, _ = bit_split(cross, gram, codes, scale, 4, 3)
    assert torch.equal(found[:, 3], codes[:, 3])
    assert bool(torch.isfinite(alpha).all() & (alpha > 0).all())
    codes, scale = round_alternating(torch.zeros(2, 5), 4)
    found, alpha, _ = bit_split(torch.zeros(2, 5), torch.zeros(5, 5), codes, scale, 4, 3)
    assert not bool(found.any())
    assert bool((alpha > 0).all())


def test_activation_scales_have_the_least_squared_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 50, 60, generator=generator)
    values[0, 0, :3] = 40.0  # far out: the largest magnitude is a bad scale
    quantizer = activation_quantizer([values[:2], values[2:]], 4, generator)
    error = float((quantizer(values) - values).square().mean())
    for scale in torch.linspace(0.02, 1, 200) * 40 / 7:
        got = (values / scale).round().clamp(-7, 7) * scale
        assert error <= float((got - values).square().mean()) * 1.02
    assert quantizer.signed
    assert not activation_quantizer([values.abs()], 4, generator).signed
    assert float(activation_quantizer([torch.zeros(3)], 4, generator).scale) == 1.0


@pytest.mark.parametrize("variant", ["ours", "paper"])
def test_the_plan_holds_the_stitched_codes(variant, model, pictures, monkeypatch):
    """Weights of the graph are on the quantizers' grids, so that what is encoded is what was fitted."""
    monkeypatch.setattr(method, "ENOUGH", 1)
    qmodel = ql.quantize(model, pictures, method="bitsplit", bits="W3A4", variant=variant, rounds=5)
    for edge, quantizer in qmodel.weight_edges():
        weight = qmodel.graph.tensor(str(edge.value.target))
        torch.testing.assert_close(quantizer(weight), weight, rtol=1e-6, atol=0)
        codes = quantizer.encode(weight)
        assert int(codes.abs().max()) <= 2 ** (quantizer.bits - 1) - 1
        assert torch.equal(quantizer.decode(codes), quantizer(weight))


def test_layers_are_closer_than_rounded_ones(model, pictures, monkeypatch):
    """The output error of the blocks' layers, on their own quantized inputs, against rounding to nearest."""
    from quantlens.calibration import Calibration, CalibrationPass

    graph, errors = graph_of(model), {}
    monkeypatch.setattr(method, "ENOUGH", 4)
    images = torch.cat([pictures, pictures.flip(-1), pictures.flip(-2), pictures.mT])  # enough rows for every layer
    sites = [s for s in graph.sites.of_kind("linear") if "blocks" in s.name]
    qmodel = ql.quantize(model, images, method="bit-split", bits="W3A6", damping=0.0)
    quantizers = qmodel.plan.quantizers
    for how in ("response", "round"):
        found = {}

        def note(edge, view, how=how, found=found):
            inputs = torch.cat(list(view.tensors())).flatten(0, -2)
            weight, got = (g.tensor(graph.sites[edge.site].weight) for g in (graph, qmodel.graph))
            if how == "round":
                codes, scale = round_alternating(weight, 3)
                got = codes * scale[:, None]
            found[edge.site] = float((quantizers[edge.key](inputs) @ got.T - inputs @ weight.T).square().mean())

        CalibrationPass(graph, Calibration.of(images, model.preprocess), sequential=False).run(
            [s.edges["input"] for s in sites], note
        )
        errors[how] = found
    assert errors["response"].keys() == errors["round"].keys()
    assert all(errors["response"][name] < errors["round"][name] for name in errors["round"]), "it begins there"


def test_options(model, pictures):
    with pytest.raises(QuantlensError, match="rounds"):
        ql.quantize(model, pictures, method="bit-split", bits="W3A8", rounds=0)
    assert type(registry.get("bitsplit")) is type(registry.get("Bit_Split"))


def test_layers_with_few_rows_are_fitted_to_their_weights(model, pictures):
    """Eight images are not enough for this model: the result is that of the fit to the weights."""
    qmodel = ql.quantize(model, pictures, method="bit-split", bits="W4A4")
    for edge, _ in qmodel.weight_edges():
        name = str(edge.value.target)
        weight = graph_of(model).tensor(name).flatten(1)
        codes, scale, _ = bit_split(weight, None, *round_alternating(weight, 4), 4, 10)
        torch.testing.assert_close(qmodel.graph.tensor(name).flatten(1), codes * scale[:, None])


def test_the_float_model_is_not_touched(model, pictures):
    before = {n: t.clone() for n, t in graph_of(model).tensors().items()}
    ql.quantize(model, pictures, method="bit-split", bits="W4A4")
    for name, tensor in graph_of(model).tensors().items():
        assert torch.equal(tensor, before[name])
