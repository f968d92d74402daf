"""Methods on trained models: the shipped one, and the real ones where they are present."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.data import load_images, open_source
from quantlens.formats import Uniform


def _quantize(digits, **settings):
    return ql.quantize(digits["model"], digits["calibration"], **settings)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "percentile", "repq-vit"])
def test_more_bits_are_a_finer_grid_of_the_same_range(method, digits):
    """Every quantizer has the bits asked for, in the same format; minmax spans the range in 17 times finer steps."""
    eight, four = (_quantize(digits, method=method, bits=bits).plan.quantizers for bits in ("W8A8", "W4A4"))
    assert eight.keys() == four.keys()
    compared = 0
    for key, fine in eight.items():
        coarse = four[key]
        assert type(fine) is type(coarse)
        if key == "patch_embed.proj.input":
            assert fine.bits == coarse.bits == 8
        else:
            assert (fine.bits, coarse.bits) == (8, 4)
        if method == "minmax" and isinstance(fine, Uniform) and fine.bits != coarse.bits and not fine.symmetric:
            torch.testing.assert_close(coarse.scale, fine.scale * 17, rtol=1e-4, atol=0)
            compared += 1
    assert compared or method != "minmax"


@pytest.mark.slow
def test_layernorm_outputs_have_a_scale_per_channel_that_costs_nothing(digits):
    """Reparameterized, layers behind a LayerNorm have one scale, and the graph undoes the channels' own."""
    plans = {
        how: _quantize(digits, method="repq-vit", bits="W3A3", layernorm=how)
        for how in ("reparameterized", "tensor", "channel")
    }
    granularity = {how: q.plan.quantizers["blocks.0.attn.qkv.input"].granularity for how, q in plans.items()}
    assert granularity == {"reparameterized": "tensor", "tensor": "tensor", "channel": "channel"}
    weights = [q.graph.tensor("blocks.0.norm1.weight") for q in plans.values()]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1]), "the LayerNorm takes the scales up"
    torch.testing.assert_close(
        plans["reparameterized"].graph(digits["images"]), digits["expected"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_saved_and_read_back_the_figures_are_equal(digits, tmp_path):
    qmodel = _quantize(digits, method="repq-vit", bits="W4A4")
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(digits["images"]), qmodel(digits["images"]))


@pytest.mark.real
@pytest.mark.slow
def test_real_weights_with_dead_channels(shared_data, tmp_path):
    """The DeiT-Tiny weights have LayerNorm channels of weight 0, on which RepQ-ViT's own code divides by zero."""
    name = "deit_tiny_patch16_224"
    model = ql.load_model(name, shared_data / "weights" / f"{name}.safetensors")
    images = load_images(
        open_source(f"imagenet:{shared_data}/imagenet?n=40&seed=1"), model.preprocess, cache_dir=tmp_path
    )
    calibration, test = images.tensor(0, 16), images.tensor(16, 40)
    with torch.inference_mode():
        expected = model(test).softmax(-1)
        agree, distance = {}, {}
        for method, bits in (("repq-vit", "W8A8"), ("repq-vit", "W4A4"), ("minmax", "W4A4")):
            got = ql.quantize(model, calibration, method=method, bits=bits)(test).softmax(-1)
            assert bool(torch.isfinite(got).all())
            agree[method, bits] = float((got.argmax(-1) == expected.argmax(-1)).double().mean())
            distance[method, bits] = float((got - expected).abs().sum(-1).mean())
    assert agree["repq-vit", "W8A8"] >= 0.8  # of 24 images, a fifth of which the float model gets wrong
    assert distance["repq-vit", "W8A8"] < distance["repq-vit", "W4A4"] < distance["minmax", "W4A4"]
