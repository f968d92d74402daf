from __future__ import annotations

import copy

import pytest
import torch

import quantlens as ql
from quantlens.calibration import Observation
from quantlens.calibration.ranges import affine
from quantlens.errors import QuantlensError
from quantlens.formats import IntegerLayerNorm, LogIntSoftmax, MaskedSoftmax, PowerOfTwo, Uniform
from quantlens.methods import registry
from quantlens.methods.base import EVERYTHING, everything_edges
from quantlens.methods.fq_ptq import softmax_input, symmetric_weight
from quantlens.qmodel import float_model


@pytest.fixture(scope="module")
def uneven(small_models):
    """A model whose residual stream has channels of different size, which its LayerNorms even out again."""
    network = copy.deepcopy(small_models["plain"])
    factor = torch.exp(0.6 * torch.randn(32, generator=torch.Generator().manual_seed(5)))
    network.position.data *= factor
    network.patches.weight.data *= factor[:, None, None, None]
    network.patches.bias.data *= factor
    for layer in network.layers:
        for linear in (layer.attention.out, layer.down):
            linear.weight.data *= factor[:, None]
            linear.bias.data *= factor
        for norm in (layer.before, layer.after):
            norm.weight.data *= 0.4 * factor.square().mean().sqrt() / factor
    network.norm.weight.data *= 0.4 * factor.square().mean().sqrt() / factor
    return ql.load_model(network, input_size=(3, 32, 32))


def _fq(model, images, bits="W8A8", **options):
    return ql.quantize(model, images, method="fq-ptq", bits=bits, **options)


def test_it_is_found_by_its_names():
    for name in ("fq-vit", "FQViT", "fq", "fq_ptq"):
        assert registry.get(name).info.name == "fq-ptq"
    assert registry.get("fq").info.quantizes == EVERYTHING


def test_every_tensor_has_its_quantizer(architecture, loaded, pictures):
    qmodel = _fq(loaded[architecture], pictures)
    plan, sites = qmodel.plan, qmodel.graph.sites
    for group in everything_edges(qmodel.graph):
        held = [
            plan.operators[e.site].output if e.site in plan.operators and e.position is None else None for e in group
        ]
        found = [q if q is not None else plan.quantizers[e.key] for q, e in zip(held, group, strict=True)]
        assert all(q.config() == found[0].config() for q in found), "one tensor, one quantizer"
        assert all(torch.equal(a, found[0].tensors()[k]) for q in found for k, a in q.tensors().items())
    for site in sites.of_kind("linear", "conv"):
        weight = plan.quantizers[f"{site.name}.weight"]
        assert weight.symmetric
        assert weight.axis == 0
    assert all(isinstance(plan.operators[s.name], IntegerLayerNorm) for s in sites.of_kind("layer_norm"))
    assert all(isinstance(plan.operators[s.name], LogIntSoftmax) for s in sites.of_kind("probs"))
    assert isinstance(plan.quantizers[f"{sites.of_kind('add')[0].name}.output"], PowerOfTwo)
    for site in sites.head:
        assert f"{site.name}.output" in plan.quantizers


def test_tensors_that_products_read_have_one_scale(architecture, loaded, pictures):
    """A factor per channel would have to be summed over."""
    qmodel = _fq(loaded[architecture], pictures)
    for key, quantizer in qmodel.plan.quantizers.items():
        if isinstance(quantizer, PowerOfTwo):
            edge = qmodel.graph.sites.edges[key]
            assert qmodel.graph.sites[edge.site].kind in ("add", "layer_norm", "linear", "conv")
            queue = list(edge.node.users) if edge.position is None else []
            while queue:
                user = queue.pop()
                assert not any(name in str(user.target) for name in ("linear", "matmul", "conv"))
                if any(name in str(user.target) for name in ("reshape", "permute", "transpose", "roll")):
                    queue += user.users


def test_patch_merging_reads_channels_four_times(loaded, pictures):
    """Swin: the LayerNorm of a patch merging has four times the channels of the sum that it reads."""
    qmodel = _fq(loaded["swin"], pictures)
    source = qmodel.plan.quantizers["layers.0.blocks.1.add2.output"]
    norm = qmodel.plan.operators["layers.1.downsample.norm"]
    assert isinstance(source, PowerOfTwo)
    assert (len(source.exponents), len(norm.multiplier)) == (16, 64)
    conv = qmodel.plan.quantizers["patch_embed.proj.output"]
    assert isinstance(conv, PowerOfTwo)
    assert conv.axis == -3


def test_power_of_two_factors_follow_uneven_channels(uneven, pictures):
    """A residual stream with channels of different size: steps of its sums differ by channel, and the finest is far
    below the one scale that all would share."""
    plan = _fq(uneven, pictures, lis=False).plan.quantizers
    key = next(k for k, q in plan.items() if isinstance(q, PowerOfTwo) and k.endswith("add1.output"))
    seen = uneven_values(uneven, pictures, key)
    one = affine(seen.min(), seen.max(), 8)
    for variant in ("ours", "paper"):
        found = _fq(uneven, pictures, variant=variant, lis=False).plan.quantizers[key]
        assert isinstance(found, PowerOfTwo)
        assert float(found.scales.min()) < 0.5 * float(one.scale), variant
        assert len(found.exponents.unique()) > 1


def uneven_values(model, images, key):
    """The float values that cross an edge."""
    graph, seen = float_model(model).graph, {}
    calls = [n for n in graph.fx.nodes if n.op == "call_function"]
    graph.run(calls, {graph.input: images}, hook=lambda k, v: seen.setdefault(k, v), keep=[graph.output])
    return seen[key]


def test_the_papers_factors(loaded, pictures):
    """2^0 to 2^3, on what LayerNorms read, at the zero point of the whole range."""

    def plan(variant):
        return _fq(loaded["vit"], pictures, "W4A8", variant=variant).plan.quantizers

    branch, total = "blocks.0.mlp.fc2.output", "blocks.0.add2.output"
    kinds = {variant: [type(plan(variant)[key]) for key in (branch, total)] for variant in ("ours", "paper")}
    assert kinds == {"ours": [PowerOfTwo, PowerOfTwo], "paper": [Uniform, PowerOfTwo]}
    paper, values = plan("paper")[total], uneven_values(loaded["vit"], pictures, total)
    assert int(paper.exponents.max()) <= 3
    low, high = float(values.min()), float(values.max())
    assert int(paper.zero_point) == round(-low / ((high - low) / 255))


def test_options_of_softmax(loaded, pictures):
    plan = _fq(loaded["vit"], pictures, softmax_bits=4).plan
    assert plan.operators["blocks.0.attn.probs"].output.bits == 4
    assert plan.quantizers["blocks.0.attn.probs.input"].bits == 8
    plan = _fq(loaded["vit"], pictures, lis=False, softmax_bits=6).plan
    assert isinstance(plan.quantizers["blocks.0.attn.probs.output"], Uniform)
    assert plan.quantizers["blocks.0.attn.probs.output"].bits == 6
    plan = _fq(loaded["swin"], pictures, lis=False).plan
    kinds = {name: type(o) for name, o in plan.operators.items() if name.endswith("probs")}
    assert set(kinds.values()) == {MaskedSoftmax}, "the shifted windows, and they alone"
    assert all(".blocks.1." in name for name in kinds)
    for wrong in (1, 17, "four"):
        with pytest.raises(QuantlensError, match=r"2 to 16|whole number"):
            _fq(loaded["vit"], pictures, softmax_bits=wrong)


def test_float_layer_norm_is_an_option(loaded, pictures):
    exact, integer = (_fq(loaded["plain"], pictures, integer_layernorm=i, lis=False) for i in (False, True))
    assert not exact.plan.operators
    assert isinstance(exact.plan.quantizers["layers.0.before.output"], Uniform)
    assert isinstance(integer.plan.operators["layers.0.before"], IntegerLayerNorm)


def test_masked_windows_do_not_leak(loaded, pictures):
    """Swin's shifted windows: what is masked in float has probability 0 in integers."""
    qmodel = _fq(loaded["swin"], pictures)
    operator = qmodel.plan.operators["layers.0.blocks.1.attn.probs"]
    assert operator.lowest is not None
    assert qmodel.plan.operators["layers.0.blocks.0.attn.probs"].lowest is None
    seen = {}
    operator.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    qmodel(pictures)
    mask = qmodel.graph.tensor("layers.0.blocks.1.attn_mask_folded")
    hidden = (mask < -50).expand(len(pictures), *mask.shape[1:]) if mask.dim() > 4 else (mask < -50)
    hidden = hidden.expand(seen["out"].view(len(pictures), -1, *seen["out"].shape[1:]).shape).reshape(seen["out"].shape)
    assert bool(hidden.any())
    assert float(seen["out"][hidden].max()) == 0.0
    assert float(seen["out"].sum(-1).min()) > 0.5


# -- ranges --------------------------------------------------------------------------------------------------------
def test_weights_span_the_codes():
    w = torch.tensor([[-0.75, 0.2, 0.1], [0.0, 0.0, 0.0], [0.3, 1.5, -1.0]])
    q = symmetric_weight(Observation.of(w), 3)
    torch.testing.assert_close(q.scale, torch.tensor([0.75 / 3.5, 1.0, 1.5 / 3.5]))
    assert float(q(w).abs().max()) <= 1.5 * 4 / 3.5


def test_zero_is_a_code_of_every_range(loaded, pictures):
    """The authors clamp the zero point where a range excludes zero, and cut its values off."""
    for key, one in _fq(loaded["vit"], pictures).plan.quantizers.items():
        if isinstance(one, Uniform) and not key.endswith((".weight", "probs.input")):
            assert 0 <= int(one.zero_point) <= 255, key


def test_ranges_in_front_of_a_softmax():
    x = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    q, masked = softmax_input([x], 8)
    assert not masked
    assert float((q(x) - x).abs().max()) <= float(q.scale) * 0.51
    hidden = x.clone()
    hidden[..., 5:] = -200.0
    hidden[0, 0, 0, 3] = -torch.inf
    q, masked = softmax_input([hidden], 8)
    assert masked
    seen = hidden > -50
    codes = q.encode(hidden)
    assert int(codes[seen].min()) == 1
    assert int(codes[~seen].max()) == 0
    assert int(codes.max()) == 255
    assert float((q(hidden) - hidden)[seen].abs().max()) <= float(q.scale) * 0.51
    with pytest.raises(QuantlensError, match="NaN"):
        softmax_input([x * torch.nan], 8)


# -- widths, files -------------------------------------------------------------------------------------------------
def test_where_activations_are_float_nothing_is_replaced(loaded, pictures):
    plan = _fq(loaded["swin"], pictures, "W4A32").plan
    assert not plan.operators
    assert all(key.endswith(".weight") for key in plan.quantizers)
    plan = _fq(loaded["vit"], pictures, "W32A6").plan
    assert not any(key.endswith(".weight") for key in plan.quantizers)
    assert plan.operators


def test_widths_of_head_and_pixels(loaded, pictures):
    plan = _fq(loaded["vit"], pictures, "W4A4", head_bits=8).plan
    assert plan.quantizers["patch_embed.proj.input"].bits == 8
    assert plan.quantizers["head.output"].bits == 8
    assert plan.operators["norm"].output.bits == 8, "the tensor that the head alone reads"
    assert plan.operators["blocks.0.norm1"].output.bits == 4


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["W2A2", "W4A8", "W8A8", "W10A10"])
def test_a_file_gives_the_same_logits_bit_for_bit(bits, loaded, pictures, tmp_path):
    for kind, options in (("swin", {}), ("vit", {"softmax_bits": 4}), ("swin", {"lis": False})):
        qmodel = _fq(loaded[kind], pictures, bits, **options)
        again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
        assert torch.equal(again(pictures), qmodel(pictures))
        assert set(again.plan.operators) == set(qmodel.plan.operators)
        assert again.size_mb == qmodel.size_mb
        assert torch.equal(copy.deepcopy(again)(pictures), qmodel(pictures))


def test_gradients_reach_the_images(loaded, pictures):
    x = pictures.clone().requires_grad_(True)
    _fq(loaded["plain"], pictures)(x).square().sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert bool((x.grad.flatten(1).abs().amax(1) > 0).all())
