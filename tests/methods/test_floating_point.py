"""Floating-point formats as ``bits``: what gets which, along which dimension, how it is kept, and what is refused."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.formats import FLOATING, NVFP4, Blocks, FloatingPoint, MicroScaled, Uniform
from quantlens.methods import registry
from quantlens.qmodel import Bits

METHODS = ("gptq", "minmax", "quantlens-fast")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


def made(model, pictures, bits="MXFP4", method="minmax", **options):
    return ql.quantize(model, pictures, method=method, bits=bits, **options)


# -- names ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "spelled", "widths", "formats"),
    [
        ("mxfp4", "MXFP4", (4, 4), ("MXFP4", "MXFP4")),
        ("nv_fp4", "NVFP4", (4, 4), ("NVFP4", "NVFP4")),
        ("MXFP6-E3M2", "MXFP6-E3M2", (6, 6), ("MXFP6-E3M2", "MXFP6-E3M2")),
        ("wmxfp4amxfp8", "WMXFP4AMXFP8", (4, 8), ("MXFP4", "MXFP8")),
        ("WMXFP4A8", "WMXFP4A8", (4, 8), ("MXFP4", "")),
        ("W4AFP8", "W4AFP8", (4, 8), ("", "FP8")),
        ("WMXFP4A32", "WMXFP4A32", (4, 32), ("MXFP4", "")),
    ],
)
def test_bits_are_read_and_written(text, spelled, widths, formats):
    bits = Bits.parse(text)
    assert (bits.weights, bits.activations) == widths
    assert bits.formats == formats
    assert str(bits) == spelled
    assert Bits.parse(str(bits)) == bits
    assert not bits.is_float
    assert not bits.is_mixed


def test_modules_have_formats_of_their_own():
    bits = Bits.parse({"default": "MXFP4", "blocks.0": "W8A8", "blocks.1": "NVFP4"})
    assert str(bits.of("blocks.0.attn.qkv")) == "W8A8"
    assert str(bits.of("blocks.1.attn.qkv")) == "NVFP4"
    assert str(bits.of("blocks.2.attn.qkv")) == "MXFP4"
    assert bits.floating == ("MXFP4", "NVFP4")
    assert Bits.parse(bits.to_mapping()) == bits


@pytest.mark.parametrize("text", ["MXFP5", "WMXFP4", "WMXFP4A", "W4A", "MXFP4/MXFP8", "WMXFP4A11"])
def test_what_is_no_width_is_refused(text):
    with pytest.raises(QuantlensError, match=r"MXFP4|2 to 10"):
        Bits.parse(text)


# -- plans ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_operands_have_their_blocks_along_what_is_summed(method, model, pictures):
    plan = made(model, pictures, method=method).plan
    axes = {"input": -1, "q": -1, "k": -2, "probs.output": -1, "v": -2}
    for key, quantizer in plan.quantizers.items():
        if key == "patch_embed.proj.input":  # the image
            assert isinstance(quantizer, Uniform)
            assert quantizer.bits == 8
            continue
        assert isinstance(quantizer, MicroScaled)
        assert quantizer.bits == 4
        if key.endswith(".weight"):
            assert quantizer.axis == (1 if "patch_embed" in key else -1)
        else:
            assert quantizer.axis == next(axis for name, axis in axes.items() if key.endswith(f".{name}"))
        assert quantizer.dynamic == (not key.endswith(".weight"))


NOISE = {"MXINT8": 2e-4, "FP8": 2e-3, "MXFP8": 2e-3, "MXFP6": 2e-3, "MXFP4": 0.03, "NVFP4": 0.02}
"""Squared error of a weight over its square, at most; of the others, with two mantissa bits, 0.006."""


@pytest.mark.parametrize("bits", FLOATING)
def test_every_format_is_on_every_edge_and_kept(bits, model, pictures, tmp_path):
    qmodel = made(model, pictures, bits)
    logits = qmodel(pictures)
    assert bool(logits.isfinite().all())
    assert not torch.equal(logits, model.module(pictures))
    for edge, quantizer in qmodel.weight_edges():
        weight = qmodel.graph.tensor(str(edge.value.target))
        noise = float((quantizer(weight) - weight).square().sum() / weight.square().sum())
        assert 0 < noise < NOISE.get(bits, 0.006)
    kinds = {type(q) for key, q in qmodel.plan.quantizers.items() if key != "patch_embed.proj.input"}
    assert kinds == {FloatingPoint if bits.startswith("FP8") else NVFP4 if bits == "NVFP4" else MicroScaled}
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), logits)
    assert again.bits == bits
    assert again.size_bytes() == qmodel.size_bytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", ["NVFP4", "WFP8AMXFP8", "WMXFP4A8", "W4AFP8"])
def test_checkpoints_of_every_method(method, bits, model, pictures, tmp_path):
    qmodel = made(model, pictures, bits, method)
    logits = qmodel(pictures)
    assert bool(logits.isfinite().all())
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), logits)
    for edge, quantizer in qmodel.weight_edges():
        weight = qmodel.graph.tensor(str(edge.value.target))
        if isinstance(quantizer, Blocks | FloatingPoint) and method != "minmax":
            assert torch.allclose(quantizer(weight), weight, rtol=1e-6), "rounded once, it stays"


def test_sizes_are_those_of_the_formats(model, pictures):
    """4.25 bits per value of a weight in MXFP4, 4.5 in NVFP4: 32 inputs are one block of 32, two of 16."""
    key = "blocks.0.attn.qkv.weight"
    for bits, each, more in (("MXFP4", 4.25, 0), ("NVFP4", 4.5, 4), ("MXFP8", 8.25, 0), ("MXFP6", 6.25, 0)):
        quantizer = made(model, pictures, bits).plan.quantizers[key]
        weight = model.module.state_dict()[key]
        held = weight.numel() * quantizer.bits / 8 + sum(t.nbytes for t in quantizer.tensors().values())
        assert held == weight.numel() * each / 8 + more


def test_the_head_and_the_image_keep_widths_of_their_own(model, pictures):
    plan = made(model, pictures, head_bits=8, patch_bits=32).plan
    for edge in ("input", "weight"):
        assert isinstance(plan.quantizers[f"head.{edge}"], Uniform)
        assert plan.quantizers[f"head.{edge}"].bits == 8
    assert "patch_embed.proj.input" not in plan.quantizers
    weights = made(model, pictures, "WMXFP4A32").plan.quantizers
    assert all(key.endswith(".weight") for key in weights)


def test_a_search_has_less_error(model, pictures):
    for bits in ("MXFP4", "NVFP4"):
        errors = []
        for scale in ("absmax", "search"):
            quantizer = made(model, pictures, bits, block_scale=scale).plan.quantizers["blocks.0.mlp.fc1.weight"]
            weight = model.module.state_dict()["blocks.0.mlp.fc1.weight"]
            errors.append(float((quantizer(weight) - weight).square().sum()))
        assert errors[1] < errors[0]


@pytest.mark.parametrize("bits", ["WMXFP4A32", "WNVFP4A32"])
@pytest.mark.parametrize("site", ["blocks.0.attn.proj", "blocks.1.mlp.fc2"])
def test_columns_take_up_each_others_errors(bits, site, model, pictures):
    """The output of a layer on its own inputs is nearer than rounding to nearest leaves it, at the same scales."""
    seen = []
    handle = model.module.get_submodule(site).register_forward_hook(lambda _, x, y: seen.append(x[0].flatten(0, -2)))
    model.module(pictures)
    handle.remove()
    plain = model.module.state_dict()[f"{site}.weight"]
    errors, scales = [], []
    for method in ("minmax", "gptq"):
        qmodel = made(model, pictures, bits, method)
        quantizer = qmodel.plan.quantizers[f"{site}.weight"]
        change = quantizer(qmodel.graph.tensor(f"{site}.weight")) - plain
        errors.append(float((seen[0] @ change.T).square().sum()))
        scales.append(quantizer.tensors())
    assert errors[1] < errors[0]
    assert all(torch.equal(scales[0][name], scales[1][name]) for name in scales[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_convolutions_and_windows(method, loaded, pictures, tmp_path):
    """Swin: attention in windows, merged patches, maps."""
    qmodel = made(loaded["swin"], pictures, "MXFP8", method)
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), qmodel(pictures))


@pytest.mark.slow
def test_maps_of_a_convolution_have_blocks_of_channels(pictures):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 40, 3), torch.nn.ReLU(), torch.nn.Conv2d(40, 8, 3, stride=2), torch.nn.Flatten(1)
    )
    net = torch.nn.Sequential(net, torch.nn.LazyLinear(5)).eval()
    net(pictures)
    for method in METHODS:
        qmodel = ql.quantize(net, pictures, method=method, bits="MXFP8")
        plan = qmodel.plan.quantizers
        assert plan["0.2.input"].axis == -3
        assert plan["0.2.weight"].axis == 1
        plain = net(pictures)
        assert float((qmodel(pictures) - plain).square().sum()) < 0.05 * float(plain.square().sum())


# -- what is refused -----------------------------------------------------------------------------------------------
def test_methods_of_integers_name_those_that_can(model, pictures):
    assert sorted(name for name, info in registry.available().items() if info.floating) == list(METHODS)
    for method in ("repq-vit", "percentile", "fq-ptq", "quantlens-best"):
        with pytest.raises(UnsupportedError, match=rf"{method} .*MXFP4.*gptq, minmax or quantlens-fast"):
            made(model, pictures, method=method)
    with pytest.raises(UnsupportedError, match="NVFP4"):
        made(model, pictures, {"default": "W8A8", "blocks.0": "NVFP4"}, "erq")


def test_targets_and_allocation_have_integers(model, pictures):
    with pytest.raises(UnsupportedError, match="openvino-cpu has no kernels for MXFP4"):
        made(model, pictures, target="openvino-cpu")
    with pytest.raises(QuantlensError, match=r"MXFP4.*MP6"):
        ql.allocate(model, pictures, "MXFP4")


def test_mixed_precision_by_name(model, pictures):
    plan = made(model, pictures, {"default": "W8A8", "blocks.0.mlp": "MXFP4", "blocks.1": "NVFP4"}).plan
    assert isinstance(plan.quantizers["blocks.0.mlp.fc1.input"], MicroScaled)
    assert isinstance(plan.quantizers["blocks.0.attn.qkv.weight"], Uniform)
    assert isinstance(plan.quantizers["blocks.1.attn.scores.k"], NVFP4)


def test_parts_alone(model, pictures):
    found = ql.inspect(model, pictures, "MXFP4", by="site")
    assert found.bits == "MXFP4"
    assert found.ranked("site")[0].effect.sqnr_db is not None
