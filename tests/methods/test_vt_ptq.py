from __future__ import annotations

from functools import partial

import pytest
import torch

import quantlens as ql
from quantlens.formats import Uniform
from quantlens.graph import graph_of
from quantlens.methods import registry

OFF = {"similarity": False, "ranking": False, "bias_correction": False}


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


def _plan(model, pictures, bits="W4A4", **options):
    """With two rounds of searching scales, which take a tenth of the time of twenty."""
    return ql.quantize(model, pictures, method="vt-ptq", bits=bits, **{"rounds": 2, **options})


def _scales(qmodel) -> dict[str, float]:
    return {key: float(q.scale) for key, q in qmodel.plan.quantizers.items()}


def _biases(qmodel) -> dict[str, torch.Tensor]:
    return {s.name: qmodel.graph.tensor(s.bias) for s in qmodel.graph.sites if s.bias is not None}


def test_names():
    assert type(registry.get("vtptq")) is type(registry.get("Liu2021")) is type(registry.get("vt-ptq"))


@pytest.mark.slow
def test_every_tensor_has_one_symmetric_scale(model, pictures):
    for key, quantizer in _plan(model, pictures).plan.quantizers.items():
        assert isinstance(quantizer, Uniform)
        assert quantizer.scale.dim() == 0
        assert not bool(quantizer.zero_point.any())
        assert quantizer.signed is not key.endswith("probs.output")
    signed = _plan(model, pictures, variant="paper").plan.quantizers
    assert all(q.signed for key, q in signed.items() if key.endswith("probs.output"))


def test_without_its_parts_it_is_the_largest_magnitude(model, pictures):
    qmodel = _plan(model, pictures, **OFF)
    for edge, quantizer in qmodel.weight_edges():
        largest = graph_of(model).tensor(str(edge.value.target)).abs().max()
        assert float(quantizer.scale) == pytest.approx(float(largest) / 7, rel=1e-6)
    for name, bias in _biases(qmodel).items():
        assert torch.equal(bias, graph_of(model).tensor(graph_of(model).sites[name].bias))


@pytest.mark.slow
def test_each_part_changes_what_it_should(model, pictures):
    """Table 3: similarity all scales, ranking those of the scores alone, bias correction the biases."""
    none = _plan(model, pictures, **OFF)
    similar = _plan(model, pictures, ranking=False, bias_correction=False)
    ranked = _plan(model, pictures, bias_correction=False)
    only_ranked = _plan(model, pictures, similarity=False, bias_correction=False)
    corrected = _plan(model, pictures, ranking=False, similarity=False)
    changed = {key for key, scale in _scales(similar).items() if scale != _scales(none)[key]}
    assert len(changed) > len(_scales(none)) // 2
    assert all(0.5 <= scale / _scales(none)[key] <= 1.2 + 1e-6 for key, scale in _scales(similar).items())
    for one, other in ((ranked, similar), (only_ranked, none)):
        changed = {key for key, scale in _scales(one).items() if scale != _scales(other)[key]}
        assert changed
        assert all(".scores." in key for key in changed)
    assert _scales(corrected) == _scales(none)
    for name, bias in _biases(corrected).items():
        assert not torch.equal(bias, _biases(none)[name]), name
    assert any("bias" in line for line in corrected.plan.rewrites)


def test_the_correction_is_the_mean_error_of_the_layer(model, pictures):
    """E[ŴX̂ − WX] of the first block's qkv on the float model's activations (eq. 15), measured by running it."""
    from quantlens.calibration import Calibration, CalibrationPass

    qmodel, graph, name = _plan(model, pictures), graph_of(model), "blocks.0.attn.qkv"
    seen = []
    CalibrationPass(graph, Calibration.of(pictures, model.preprocess), sequential=False).run(
        [graph.sites[name].edges["input"]], lambda edge, view: seen.extend(view.tensors())
    )
    inputs, weight = seen[0], graph.tensor(graph.sites[name].weight)
    quantizers = qmodel.plan.quantizers
    got = quantizers[f"{name}.input"](inputs) @ quantizers[f"{name}.weight"](weight).T
    expected = (got - inputs @ weight.T).flatten(0, -2).mean(0)
    change = graph.tensor(graph.sites[name].bias) - _biases(qmodel)[name]
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-5)


def test_missing_biases_are_made(loaded, pictures):
    plain = loaded["plain"]
    qmodel = _plan(plain, pictures)
    assert all(s.bias is not None for s in qmodel.graph.sites.of_kind("linear"))
    assert bool(torch.isfinite(qmodel(pictures)).all())


@pytest.mark.slow
def test_drawn_pairs_depend_on_the_seed_alone(model, pictures, monkeypatch):
    from quantlens.methods import vt_ptq

    monkeypatch.setattr(vt_ptq, "ALL_PAIRS", 7)  # fewer than the keys
    same = [_scales(_plan(model, pictures, seed=5)) for _ in range(2)]
    assert same[0] == same[1]


def test_more_images_than_samples(model, pictures, monkeypatch):
    """Chunks of images, and only some of the images sampled: ranges still come from all of them."""
    from quantlens.calibration import images as chunks
    from quantlens.calibration.sampling import ProductSampler
    from quantlens.methods import vt_ptq

    monkeypatch.setattr(chunks, "CHUNK", 3)
    monkeypatch.setattr(vt_ptq, "ProductSampler", partial(ProductSampler, samples=2))
    qmodel = _plan(model, pictures * torch.linspace(0.5, 2, 8)[:, None, None, None], **OFF)
    assert float(qmodel.plan.quantizers["patch_embed.proj.input"].scale) == pytest.approx(
        float((pictures * torch.linspace(0.5, 2, 8)[:, None, None, None]).abs().max()) / 127, rel=1e-6
    )
    assert bool(torch.isfinite(_plan(model, pictures)(pictures)).all())


def test_mixed_precision_comes_in_through_the_bits(model, pictures):
    bits = {"default": "W4A4", "blocks.0.mlp": "W8A8"}
    quantizers = _plan(model, pictures, bits=bits).plan.quantizers
    assert quantizers["blocks.0.mlp.fc1.weight"].bits == 8
    assert quantizers["blocks.1.mlp.fc1.weight"].bits == 4
