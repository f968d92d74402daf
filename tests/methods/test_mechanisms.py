"""What every method's paper claims for its central step, on a small model made so that the step must matter.

One test per method, by its name in :data:`MECHANISMS`; each fails when that step is switched off. Trained methods:
``test_mechanisms_trained.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, gelu, layer_norm

import quantlens as ql
from quantlens.calibration.ranges.similarity import Ranking
from quantlens.formats import AdaLog, IntegerLayerNorm, Log, LogIntSoftmax, PowerOfTwo, Twin
from quantlens.graph import graph_of
from quantlens.methods import registry
from small_models import changed, energy, rows_of, values

HERE, TRAINED = "test_mechanisms", "test_mechanisms_trained"
MECHANISMS = {
    "minmax": (HERE, "test_minmax_covers_all_that_was_seen"),
    "percentile": (HERE, "test_percentile_leaves_a_few_values_out"),
    "base-ptq": (HERE, "test_scales_make_the_output_similar"),
    "easyquant": (HERE, "test_scales_make_the_output_similar"),
    "vt-ptq": (HERE, "test_the_order_of_scores_is_kept"),
    "ptq4vit": (HERE, "test_errors_count_by_their_gradient"),
    "repq-vit": (HERE, "test_one_scale_is_as_good_as_one_per_channel"),
    "fq-ptq": (HERE, "test_layernorm_and_softmax_run_on_shifts"),
    "erq": (HERE, "test_weights_take_up_the_error_of_activations_and_of_rounding"),
    "gptq": (HERE, "test_columns_take_up_the_error_of_those_before"),
    "quantlens-fast": (HERE, "test_columns_take_up_the_error_of_those_before"),
    "bit-split": ("test_bit_split", "test_layers_are_closer_than_rounded_ones"),
    "adalog": (HERE, "test_the_base_follows_the_attention"),
    "aocq": ("test_aocq", "test_balanced_operators_even_out_uneven_channels"),
    "qdrop": (TRAINED, "test_half_of_the_elements_are_dropped"),
    "fima-q": (TRAINED, "test_losses_know_what_the_output_depends_on"),
    "aphq-vit": (TRAINED, "test_mlps_are_refitted_with_relu"),
    "i-and-s-vit": (TRAINED, "test_small_probabilities_keep_levels_and_weights_are_smoothed"),
    "quantlens-best": (TRAINED, "test_blocks_are_trained_by_what_the_output_depends_on"),
}


def test_every_method_has_one():
    assert set(MECHANISMS) == set(registry.available())
    for module, name in MECHANISMS.values():
        assert f"\ndef {name}(" in Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"), name


# -- oracles -------------------------------------------------------------------------------------------------------
def asymmetric(x, low, high, bits=4):
    """x̂ of codes that span [low, high]."""
    scale = torch.as_tensor(high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def symmetric(x, scale, bits=4):
    return (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def channel_factors(size=32, spread=1.5):
    return torch.exp(spread * torch.randn(size, generator=torch.Generator().manual_seed(2)))


# -- ranges ----------------------------------------------------------------------------------------------------------
def far_out(tensors):
    """A class token with one value far out."""
    tensors["cls_token"][0, 0, 3] = 60.0


def _ends(quantizer):
    return [float((code - quantizer.zero_point) * quantizer.scale) for code in (0, 2**quantizer.bits - 1)]


def test_minmax_covers_all_that_was_seen(fresh, pictures):
    model = changed(fresh("vit"), far_out)
    quantizers, seen = (
        ql.quantize(model, pictures, method="minmax", bits="W4A4").plan.quantizers,
        values(graph_of(model), pictures),
    )
    for key, quantizer in quantizers.items():
        if not key.endswith(".weight"):
            x, (low, high) = seen[key], _ends(quantizer)
            assert low == pytest.approx(min(float(x.min()), 0.0), abs=0.51 * float(quantizer.scale)), key
            assert high == pytest.approx(max(float(x.max()), 0.0), abs=0.51 * float(quantizer.scale)), key


def test_percentile_leaves_a_few_values_out(fresh, pictures):
    """The far-out value of 8 class tokens among 8·17·32 values lies beyond the quantile 0.99; the others gain."""
    model, key = changed(fresh("vit"), far_out), "blocks.0.attn.qkv.input"
    one, whole = (
        ql.quantize(model, pictures, bits="W4A4", **options).plan.quantizers[key]
        for options in ({"method": "percentile", "p": 0.99}, {"method": "minmax"})
    )
    x = values(graph_of(model), pictures)[key]
    assert _ends(one)[1] < 0.6 * float(x.max())
    usual = x[:, 1:]
    assert energy(one(usual) - usual) < 0.6 * energy(whole(usual) - usual)


# -- searches by the output ------------------------------------------------------------------------------------------
def unread(tensors):
    """Large weights for an input that is zero, and a large input that no weight reads: neither reaches an output."""
    weight = tensors["blocks.0.attn.qkv.weight"]
    for name in ("weight", "bias"):
        tensors[f"blocks.0.norm1.{name}"][3] = 0.0
        tensors[f"blocks.0.norm2.{name}"][5] *= 10.0
    weight[:, 3] = 4 * weight.abs().max()
    tensors["blocks.0.mlp.fc1.weight"][:, 5] = 0.0


@pytest.mark.parametrize(("method", "half"), [("base-ptq", 7.5), ("easyquant", 7.0), ("vt-ptq", 7.0)])
def test_scales_make_the_output_similar(method, half, fresh, pictures):
    """What does not reach the output is clipped, where the error of the tensor itself would keep it; and of all scales
    of the input, given the weight's, that chosen makes the output most similar (all but vt-ptq, whose samples are
    images)."""
    model = changed(fresh("vit"), unread)
    some = {"default": "W32A32", "blocks.0": "W4A4"}
    plan = ql.quantize(model, pictures, method=method, bits=some).plan.quantizers
    weights = {name: graph_of(model).tensor(f"blocks.0.{name}.weight") for name in ("attn.qkv", "mlp.fc1")}
    x = rows_of(values(graph_of(model), pictures)["blocks.0.mlp.fc1.input"])
    for key, tensor in (("attn.qkv.weight", weights["attn.qkv"]), ("mlp.fc1.input", x)):
        scale = plan[f"blocks.0.{key}"].scale
        largest = tensor.abs().amax(1) if scale.dim() else tensor.abs().max()
        ratio = scale * half / largest
        assert float(ratio.mean()) < 0.65, key
        assert float(ratio.max()) < 0.9, key
    if method == "vt-ptq":
        return
    coded, expected = plan["blocks.0.mlp.fc1.weight"](weights["mlp.fc1"]), (x @ weights["mlp.fc1"].T).flatten()

    def similarity(scale):
        return float(cosine_similarity((symmetric(x, scale) @ coded.T).flatten(), expected, dim=0))

    start, beta = float(x.abs().max()) / half, 1.2 if method == "base-ptq" else 2.0
    tried = [similarity(start * (0.5 + i * (beta - 0.5) / 100)) for i in range(100)]
    assert similarity(float(plan["blocks.0.mlp.fc1.input"].scale)) >= max(tried) - 1e-4


def test_the_order_of_scores_is_kept(fresh, pictures):
    """By the ranking loss over all pairs of keys, where q has values far out; biases take the mean error up (exactly:
    test_vt_ptq)."""

    def outliers(tensors):
        tensors["blocks.0.attn.qkv.bias"][:2] += 12.0

    model, name = changed(fresh("vit"), outliers), "blocks.0.attn.scores"
    seen = values(graph_of(model), pictures)
    q, k = seen[f"{name}.q"], seen[f"{name}.k"]
    if k.shape[-1] == q.shape[-1]:
        k = k.mT
    expected = q @ k
    losses = {}
    for ranking in (True, False):
        settings = {"ranking": ranking, "similarity": False, "bias_correction": False}
        plan = ql.quantize(model, pictures, method="vt-ptq", bits="W4A4", **settings).plan.quantizers
        got = plan[f"{name}.q"](q) @ plan[f"{name}.k"](k)
        losses[ranking] = float(Ranking.of(expected.flatten(0, 1), 0.0).loss(got.flatten(0, 1)))
    assert losses[True] < 0.9 * losses[False]


# -- ptq4vit ---------------------------------------------------------------------------------------------------------
def test_errors_count_by_their_gradient(fresh, pictures):
    """After the last attention the class token alone is read. Patches whose LayerNorm output has a value far out then
    have no say in the scale; by squared error they have nearly all of it."""

    def patches_apart(tensors):
        tensors["pos_embed"][:, 1:, 0] += 40.0

    model, name = changed(fresh("vit"), patches_apart), "blocks.1.mlp.fc1"
    options = {"variant": "paper", "candidates": 40, "rounds": 1}
    scale = (
        ql.quantize(model, pictures, method="ptq4vit", bits="W8A4", **options).plan.quantizers[f"{name}.input"].scale
    )
    x, weight = values(graph_of(model), pictures)[f"{name}.input"], graph_of(model).tensor(f"{name}.weight")

    def error(scale, tokens):
        return energy((symmetric(tokens, scale) - tokens) @ weight.T)

    start = float(x.abs().max()) / 7.5
    plain = min((start * f / 50 for f in range(1, 60)), key=partial(error, tokens=x))
    assert error(float(scale), x[:, 0]) < 0.5 * error(plain, x[:, 0])


def test_twin_formats_keep_small_values_and_large_ones(fresh, pictures):
    """Of a softmax with a peaked head and a flat one, and of a GELU with large outputs, in both variants; one uniform
    grid loses the small ones."""

    def wide(tensors):
        tensors["blocks.0.attn.qkv.weight"][:16] *= 6
        tensors["blocks.0.attn.qkv.weight"][16:32] *= 0.3
        tensors["blocks.0.attn.qkv.bias"][16:32] *= 0.3
        tensors["blocks.0.mlp.fc1.weight"] *= 6

    model = changed(fresh("vit"), wide)
    seen = values(graph_of(model), pictures)
    probs, hidden = seen["blocks.0.attn.probs.output"], gelu(seen["blocks.0.mlp.fc1.output"])
    for variant in ("ours", "paper"):
        options = {"variant": variant, "candidates": 40, "rounds": 1}
        plan = ql.quantize(model, pictures, method="ptq4vit", bits="W8A4", **options).plan.quantizers
        softmax, after = plan["blocks.0.attn.probs.output"], plan["blocks.0.mlp.fc2.input"]
        assert isinstance(softmax, Twin)
        assert isinstance(after, Twin)
        small, large = probs[probs < 0.05], probs[probs > 0.5]
        assert energy(softmax(small) - small) < 0.3 * energy(asymmetric(small, 0.0, 1.0) - small)
        assert float((softmax(large) - large).abs().max()) < 0.08
        negative = hidden[hidden < 0]
        one = symmetric(negative, float(hidden.max()) / 7.5)
        assert energy(after(negative) - negative) < 0.2 * energy(one - negative), variant
        assert float(after(hidden).max()) > 0.4 * float(hidden.max())


# -- repq-vit --------------------------------------------------------------------------------------------------------
def uneven_norms(tensors):
    """LayerNorm outputs with channels of very different size, which the next layer's weights undo."""
    for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
        for block in ("blocks.0", "blocks.1"):
            factor = channel_factors()
            tensors[f"{block}.{norm}.weight"] *= factor
            tensors[f"{block}.{norm}.bias"] *= factor
            tensors[f"{block}.{linear}.weight"] /= factor


def test_one_scale_is_as_good_as_one_per_channel(fresh, pictures):
    """After the rewriting, in the output of every layer after a LayerNorm; the same scale without it is far worse. And
    log√2 codes keep softmax outputs over seven octaves, each within a quarter of an octave."""
    model = changed(fresh("vit"), uneven_norms)
    q = ql.quantize(model, pictures, method="repq-vit", bits="W32A4")
    float_values, rewritten = values(graph_of(model), pictures), values(q.graph, pictures)
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"):
        x, quantizer = rows_of(float_values[f"{name}.input"]), q.plan.quantizers[f"{name}.input"]
        weight, bias = (graph_of(model).tensor(f"{name}.{part}") for part in ("weight", "bias"))
        errors = {
            how: energy((asymmetric(x, *ends) - x) @ weight.T)
            for how, ends in {"channels": (x.amin(0), x.amax(0)), "tensor": (x.min(), x.max())}.items()
        }
        assert quantizer.scale.dim() == 0
        new_weight, new_bias = (q.graph.tensor(f"{name}.{part}") for part in ("weight", "bias"))
        got = quantizer(rows_of(rewritten[f"{name}.input"])) @ new_weight.T + new_bias
        error = energy(got - (x @ weight.T + bias))
        assert error < 1.3 * errors["channels"], name
        assert error < 0.3 * errors["tensor"], name
    softmax = q.plan.quantizers["blocks.0.attn.probs.output"]
    x = softmax.delta * torch.exp2(-torch.linspace(0, 7, 500))
    assert float((softmax(x) / x).log2().abs().max()) < 0.26


# -- fq-ptq ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["ours", "paper"])
def test_layernorm_and_softmax_run_on_shifts(variant, fresh, pictures):
    """Channels of the residual stream with a quarter to eight times the size get steps a power of two apart, the small
    ones as fine as one scale is for the large ones; LayerNorm then runs on integers; softmax puts out powers of two."""
    factor = torch.tensor([0.25, 1.0, 2.0, 0.5]).repeat(8)

    def uneven(tensors):
        for name in ("pos_embed", "cls_token"):
            tensors[name] *= factor
        for name in (
            "patch_embed.proj",
            *(f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.proj", "mlp.fc2")),
        ):
            tensors[f"{name}.weight"] *= factor.reshape(-1, *[1] * (tensors[f"{name}.weight"].dim() - 1))
            tensors[f"{name}.bias"] *= factor

    model = changed(fresh("vit"), uneven)
    plan = ql.quantize(model, pictures, method="fq-ptq", bits="W8A8", variant=variant).plan
    seen = values(graph_of(model), pictures)
    x, quantizer = seen["blocks.0.add2.output"], plan.quantizers["blocks.0.add2.output"]
    assert isinstance(quantizer, PowerOfTwo)
    assert len(quantizer.exponents.unique()) > 2
    small = factor == 0.25
    one = asymmetric(x, x.min(), x.max(), 8)
    assert energy((quantizer(x) - x)[..., small]) < 0.15 * energy((one - x)[..., small])
    operator = plan.operators["blocks.1.norm1"]
    assert isinstance(operator, IntegerLayerNorm)
    weight, bias = (graph_of(model).tensor(f"blocks.1.norm1.{part}") for part in ("weight", "bias"))
    exact = layer_norm(quantizer(x), (32,), weight, bias, 1e-6)
    assert float((operator(quantizer(x)) - exact).abs().max()) < 1.6 * float(operator.output.scale)
    softmax, scores = plan.operators["blocks.0.attn.probs"], seen["blocks.0.attn.probs.input"]
    assert isinstance(softmax, LogIntSoftmax)
    got, exact = softmax(plan.quantizers["blocks.0.attn.probs.input"](scores)), scores.softmax(-1)
    exponents = got[got > 0].log2()
    assert torch.equal(exponents, exponents.round())
    assert float((got / exact)[exact > 0.01].log2().abs().max()) < 0.75


# -- weights in closed form ------------------------------------------------------------------------------------------
LAYERS = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def correlated(tensors):
    """LayerNorm outputs that have much of one direction, so that channels can make up for each other."""
    direction = torch.linspace(-1, 1, 32)
    for name in ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"):
        tensors[f"{name}.bias"] += 2 * direction


@pytest.mark.parametrize(("bits", "most"), [("W8A3", 0.8), ("W3A8", 0.6)])
def test_weights_take_up_the_error_of_activations_and_of_rounding(bits, most, loaded, pictures):
    """Of the layer's output, on the images that it was fitted on: the first by ridge regression (weights of 8 bits
    leave nothing else), the second by refined rounding and the channels not yet rounded."""
    model = loaded["vit"]
    nearest, fitted = (ql.quantize(model, pictures, method=method, bits=bits) for method in ("repq-vit", "erq"))
    seen = values(nearest.graph, pictures)
    ratios = {}
    for name in LAYERS:
        x = rows_of(seen[f"{name}.input"])
        weight, bias = (nearest.graph.tensor(f"{name}.{part}") for part in ("weight", "bias"))
        coded, expected = nearest.plan.quantizers[f"{name}.input"](x), x @ weight.T + bias
        before = coded @ nearest.plan.quantizers[f"{name}.weight"](weight).T + bias
        # the mean alone is what a bias can take up without any of it
        before = before - (before - expected).mean(0)
        after = coded @ fitted.graph.tensor(f"{name}.weight").T + fitted.graph.tensor(f"{name}.bias")
        ratios[name] = energy(after - expected) / energy(before - expected)
    assert max(ratios.values()) < most, ratios


@pytest.mark.parametrize("method", ["gptq", "quantlens-fast"])
def test_columns_take_up_the_error_of_those_before(method, fresh, pictures):
    """Of the layer's output, at the same scales, on what the quantized network makes."""
    model = changed(fresh("vit"), correlated)
    off = {"rotate": "none", "subtract_mean": "none"} if method == "quantlens-fast" else {}
    q = ql.quantize(model, pictures, method=method, bits="W3A32", **off)
    seen, ratios = values(q.graph, pictures), {}
    for name in LAYERS:
        x, weight = rows_of(seen[f"{name}.input"]), graph_of(model).tensor(f"{name}.weight")
        errors = [
            got - weight for got in (q.graph.tensor(f"{name}.weight"), q.plan.quantizers[f"{name}.weight"](weight))
        ]
        moments = [(x - x.mean(0) if method == "quantlens-fast" else x) @ error.T for error in errors]
        ratios[name] = energy(moments[0]) / energy(moments[1])
    assert max(ratios.values()) < 0.8, ratios


# -- adalog ----------------------------------------------------------------------------------------------------------
def test_the_base_follows_the_attention(fresh, pictures):
    """A flat attention gets another base than a peaked one, each with less error in the context than base 2 or √2; and
    values just below zero after a GELU keep levels of their own."""

    def flat_and_peaked(tensors):
        tensors["blocks.0.attn.qkv.weight"][:32] *= 0.2
        tensors["blocks.0.attn.qkv.bias"][:32] *= 0.2
        tensors["blocks.1.attn.qkv.weight"][:32] *= 4

    model = changed(fresh("vit"), flat_and_peaked)
    plan = ql.quantize(model, pictures, method="adalog", bits="W8A4", rounds=1).plan.quantizers
    seen = values(graph_of(model), pictures)
    bases = []
    for block in ("blocks.0", "blocks.1"):
        found, probs, v = (
            plan[f"{block}.attn.probs.output"],
            *(seen[f"{block}.attn.context.{e}"] for e in ("probs", "v")),
        )
        assert isinstance(found, AdaLog)
        bases.append(found.numerator)
        error = energy((found(probs) - probs) @ v)
        others = [energy((q(probs) - probs) @ v) for q in (Log(torch.tensor(1.0), 4, steps=s) for s in (1, 2))]
        assert error < 0.9 * min(others), (block, error, others)
    assert bases[0] != bases[1]
    after = plan["blocks.0.mlp.fc2.input"]
    hidden = seen["blocks.0.mlp.fc2.input"]
    negative = hidden[hidden < 0]
    assert energy(after(negative) - negative) < 0.3 * energy(negative)
