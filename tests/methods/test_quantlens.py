"""Our own methods: what every part of them does (what it is worth: benchmarks/quality)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError
from quantlens.formats import GroupAffine, SqrtSoftmax, Uniform
from quantlens.graph import graph_of
from quantlens.methods.base import Run, Widths
from quantlens.methods.quantlens_fast import (
    QuantlensFast,
    WeightFit,
    rotate_heads,
    rotate_inputs,
    rotate_residuals,
)
from quantlens.qmodel import Bits


@pytest.fixture(scope="module")
def digits(digits):
    return {**digits, "images": digits["images"][:256], "expected": digits["expected"][:256].double()}


OFF = {"rotate": "none", "subtract_mean": "none", "activation_granularity": "tensor"}
"""No transform."""


class Ablated(QuantlensFast):
    """quantlens-fast with another fit of weights, or with some of its transforms."""

    def __init__(self, fit: WeightFit | None = None, kinds: tuple | None = None):
        self.fit, self.kinds = fit, kinds

    def weight_fit(self, run):
        return self.fit or super().weight_fit(run)

    def transforms(self, run):
        made = super().transforms(run)
        return made if self.kinds is None else [t for t in made if t in self.kinds]


def _fast(digits, bits="W3A3", model=None, method=None, **options):
    return (method or QuantlensFast()).apply(model or digits["model"], digits["calibration"][:8], bits, **options)


@pytest.mark.slow
def test_each_step_on_weights_can_be_left_out(digits):
    """Neither: weights rounded to nearest. Rounding alone: other codes of the same scale. The fit: other scales too."""
    graph = graph_of(digits["model"])

    def fitted_by(**settings):
        return _fast(digits, method=Ablated(WeightFit(**settings)), **OFF)

    neither = fitted_by(fit=False, columns=False)
    for edge, quantizer in neither.weight_edges():
        name = str(edge.value.target)
        assert torch.equal(neither.graph.tensor(name), quantizer(graph.tensor(name)))
    rounded, fitted = fitted_by(fit=False), fitted_by(fit=True, columns=False)
    for q in (rounded, fitted):
        for edge, quantizer in q.weight_edges():
            weight = q.graph.tensor(str(edge.value.target))
            assert torch.equal(quantizer(weight), weight), "on the grid"
    scales, fit_scales, start = (
        {e.key: quantizer.scale for e, quantizer in q.weight_edges()} for q in (rounded, fitted, neither)
    )
    assert all(torch.equal(scale, start[key]) for key, scale in scales.items())
    assert not any(torch.equal(scale, start[key]) for key, scale in fit_scales.items())
    told = fitted_by(columns=False)
    same = {e.key for e, quantizer in told.weight_edges() if torch.equal(quantizer.scale, start[e.key])}
    assert same == {"head.weight"}, "fitted, but for the one that reads fewer rows (8 images) than it has inputs"
    moved = [
        not torch.equal(rounded.graph.tensor(str(e.value.target)), neither.graph.tensor(str(e.value.target)))
        for e, _ in neither.weight_edges()
    ]
    assert all(moved)


def _peak(values) -> float:
    """The largest channel over the middle one, by root mean square; channels are the last dimension, those of a head by
    themselves."""
    size = values.square().mean(tuple(d for d in range(values.dim() - 1) if values.dim() < 4 or d != 1)).sqrt()
    return float((size.amax(-1) / size.median(-1).values).max())


@pytest.mark.slow
def test_rotations_even_out_uneven_channels(digits):
    """Two channels of every LayerNorm, and of every q and k, made 16 times as large and undone: the same function.
    Each kind of rotation evens out what it reaches, and nothing else."""
    model = ql.load_model("digits-vit")
    for block in model.module.blocks:
        width = block.attn.qkv.in_features
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight[:2] *= 16
            norm.bias[:2] *= 16
            linear.weight[:, :2] /= 16
        for rows, factor in ((slice(0, 2), 16), (slice(width, width + 2), 1 / 16)):
            block.attn.qkv.weight[rows] *= factor
            block.attn.qkv.bias[rows] *= factor
    torch.testing.assert_close(model(digits["images"]).double(), digits["expected"], rtol=1e-3, atol=1e-3)
    images = digits["calibration"][:8]
    plain = WeightFit(fit=False, columns=False)
    kinds = {"none": (), "heads": (rotate_heads,), "residual": (rotate_residuals, rotate_inputs), "all": None}
    for rotate, transforms in kinds.items():
        q = _fast(digits, "W32A4", model, Ablated(plain, transforms))
        seen = {}
        nodes = [node for node in q.graph.fx.nodes if node.op == "call_function"]
        q.graph.run(
            nodes,
            {q.graph.input: images},
            hook=lambda key, value, seen=seen: seen.setdefault(key, value),
            keep=[q.graph.output],
        )
        for key in ("blocks.0.attn.qkv.input", "blocks.0.mlp.fc1.input", "blocks.1.mlp.fc1.input"):
            assert _peak(seen[key]) < 4 if rotate in ("residual", "all") else _peak(seen[key]) > 8, (rotate, key)
        assert (
            _peak(seen["blocks.0.attn.scores.q"]) < 6
            if rotate in ("heads", "all")
            else (_peak(seen["blocks.0.attn.scores.q"]) > 8)
        ), rotate


@pytest.mark.parametrize("norms", ["none", "all", "auto"])
def test_what_is_rotated_behind_a_norm_leaves_the_function(loaded, architecture, pictures, norms):
    """At run time, or with the residual stream, and never both."""
    from quantlens.transforms import find_norm_groups, fold_layer_scale
    from quantlens.transforms.layers import alone
    from quantlens.transforms.rotation import find_residuals, rotation_size

    model = loaded[architecture]
    graph = graph_of(model).clone()
    fold_layer_scale(graph)
    graph.invalidate()
    sites = [site for group in find_norm_groups(graph) for site in group.linears]
    expected = graph(pictures)
    layers = [site.name for site in sites if alone(graph, site) and rotation_size(graph, site) >= 8]
    streams = bool(find_residuals(graph))
    # the classifier stays in float, one layer is at 8 bits
    at_eight = layers[-2] if len(layers) > 1 else None
    settings = QuantlensFast().options({"rotate_norm_outputs": norms, "rotate_mlp_hidden": "none", "head_bits": 32})
    bits = Bits.parse({"default": "W4A4", **({at_eight: "W8A8"} if at_eight else {})})
    images, run = Calibration.of(pictures, model.preprocess), Run(settings, seed=0)
    said = QuantlensFast().rewrite(graph, images, Widths(bits, settings), run)
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=2e-4)
    turned = {name for name in layers if "matmul" in str(graph.sites[name].node.args[0].all_input_nodes[0].target)}
    heads = {name for name in layers if Widths(bits, settings).of(graph, graph.sites[name].edges["input"]) == 32}
    wanted = set() if norms == "none" else set(layers) - heads
    assert turned == wanted, "the one at 8 bits, too: nothing else would rotate it"
    assert any("residual stream" in sentence for sentence in said) == (streams and not turned)


@pytest.mark.slow
def test_best_goes_on_where_fast_ends(digits):
    """Without a step it is quantlens-fast; with some, a block is kept where its own loss fell, and all of them where
    images that none was trained on gain."""
    fast, none, q = (
        ql.quantize(digits["model"], digits["calibration"][:16], method=method, bits="W3A3", **given)
        for method, given in (
            ("quantlens-fast", {}),
            ("quantlens-best", {"iterations": 0}),
            ("quantlens-best", {"iterations": 10}),
        )
    )
    assert torch.equal(none(digits["images"]), fast(digits["images"]))
    units = q.plan.info["reconstruction"]
    assert any(unit["accepted"] for unit in units)
    for unit in units:
        assert unit["after"] < unit["before"] if unit["accepted"] else unit["after"] == unit["before"]
    held = q.plan.info["held_out"]
    assert torch.equal(q(digits["images"]), fast(digits["images"])) == (held["after"] >= held["before"])


@pytest.mark.parametrize(("logits", "harm"), [(10, False), (10, True), (1, False)])
def test_best_is_fast_where_training_harms_images_that_it_did_not_see(logits, harm, fresh, pictures, monkeypatch):
    from quantlens.methods import quantlens_best

    held = []

    def trained(graph, plan, images, run, settings, *, reference, **_):
        held.extend(settings.held_out)
        name = next(name for name in graph.tensors() if name.endswith("fc2.bias"))
        near = {} if harm else reference.tensors()
        graph.set_tensor(name, near.get(name, graph.tensor(name) + 20 * (torch.arange(32) % 3)))
        plan.quantizers = {} if not harm else dict(plan.quantizers)
        return []

    model = fresh("vit")
    if logits == 1:
        model = ql.load_model(nn.Sequential(model.module, nn.Linear(10, 1)), input_size=(3, 32, 32))
    fast = ql.quantize(model, pictures, "quantlens-fast", "W3A3")(pictures)
    monkeypatch.setattr(quantlens_best, "train", trained)
    q = ql.quantize(model, pictures, "quantlens-best", "W3A3", views_per_image=2)
    assert held == [7, 15, 23]
    told = q.plan.info["held_out"]
    assert (told["after"] > told["before"] > 0) == harm
    assert torch.equal(q(pictures), fast) == harm


@pytest.mark.slow
def test_best_trains_norms_and_biases_and_sees_views_where_asked(digits):
    def vectors(method, **options):
        q = ql.quantize(digits["model"], digits["calibration"][:8], method=method, bits="W4A4", **options)
        return {name: t for name, t in q.graph.tensors().items() if t.dim() == 1}, q.plan.info

    fast, _ = vectors("quantlens-fast")
    without, info = vectors("quantlens-best", iterations=16, train_norms_and_biases=False)
    trained, other = vectors("quantlens-best", iterations=16, views_per_image=0)
    seen, more = vectors("quantlens-best", iterations=16, views_per_image=2)
    _, less = vectors("quantlens-best", iterations=16, views_per_image=2, ood_view_share=0.0)
    assert all(torch.equal(without[name], value) for name, value in fast.items())
    assert sum(not torch.equal(trained[name], value) for name, value in fast.items()) > 10
    assert sum(not torch.equal(trained[name], value) for name, value in seen.items()) > 10
    assert len({told["reconstruction"][0]["before"] for told in (other, more, less)}) == 3, "measured on views, too"
    assert info["iterations"] == 4, "8 images are a quarter of 32"
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(QuantlensError, match="views_per_image"):
            vectors("quantlens-best", views_per_image=wrong)
        with pytest.raises(QuantlensError, match="ood_view_share"):
            vectors("quantlens-best", ood_view_share=wrong)


def test_best_trains_narrow_networks_longer(loaded, pictures, monkeypatch):
    from quantlens.methods import _reconstruction, quantlens_best
    from quantlens.reconstruction import Report

    asked = []

    def recorded(*arguments, **_):
        asked.append(arguments[3].iterations)
        return Report(())

    monkeypatch.setattr(_reconstruction, "reconstruct", recorded)
    monkeypatch.setattr(quantlens_best, "STEPS", 8)
    monkeypatch.setattr(quantlens_best, "LONG", 16)
    narrow = {"default": "W4A4", "blocks.0": "W3A4"}
    for bits, options in (("W4A4", {}), ("W4A3", {}), (narrow, {}), ("W3A3", {"iterations": 7})):
        q = ql.quantize(loaded["vit"], pictures, "best", bits, **options)
        assert q.plan.info["iterations"] == asked[-1]
    assert asked == [2, 4, 4, 2], "8 images are a quarter of 32"


def test_what_quantizes_where_no_method_is_named(digits):
    import inspect

    from quantlens.cli.quantize import quantize
    from quantlens.methods.registry import DEFAULT

    q = ql.quantize(digits["model"], digits["calibration"][:4], bits="W4A4")
    assert q.method == DEFAULT == "quantlens-fast"
    assert inspect.signature(quantize).parameters["method"].default == DEFAULT


def test_what_they_use_can_be_shipped(digits):
    """One uniform scale per activation tensor and output channel; at the softmax squares of integers of 8 bits, on
    request uniform too."""
    for softmax, other in (("sqrt", SqrtSoftmax), ("uniform", ())):
        q = ql.quantize(digits["model"], digits["calibration"][:4], method="fast", bits="W4A4", softmax=softmax)
        for key, quantizer in q.plan.quantizers.items():
            if isinstance(quantizer, other):
                assert key.endswith(".probs.output")
                assert quantizer.qmax**2 < 256
            else:
                assert isinstance(quantizer, Uniform)
                assert quantizer.granularity == ("channel" if key.endswith(".weight") else "tensor"), key


@pytest.mark.slow
def test_narrow_activations_find_their_scales_at_run_time(digits):
    def groups(bits, **options):
        q = ql.quantize(digits["model"], digits["calibration"][:8], method="fast", bits=bits, **options)
        found = {key: f for key, f in q.plan.quantizers.items() if isinstance(f, GroupAffine)}
        inputs = {k for k, f in q.plan.quantizers.items() if not k.endswith((".weight", ".probs.output"))}
        assert found.keys() <= inputs - {"patch_embed.proj.input"}, "not the image, weights or softmax outputs"
        said = q.plan.info["activations"]
        assert (said.get("group", 0), said["tensor"]) == (len(found), len(inputs) - len(found))
        return found, inputs

    narrow, inputs = groups("W4A3")
    assert narrow.keys() >= inputs - {"patch_embed.proj.input", "head.input"}, "a head reads one token"
    assert all(f.axis == (-2 if key.endswith("scores.k") else -1) for key, f in narrow.items())
    assert groups("W3A4")[0] == groups("W3A3", activation_granularity="tensor")[0] == {}
    assert len(groups("W4A4", activation_granularity="group")[0]) > 0.8 * len(narrow)
    assert {f.group_size for f in groups("W4A3", group_size=8)[0].values()} == {8}
    for wrong in (4, 24, "all"):
        with pytest.raises(QuantlensError, match=r"power of two|whole number"):
            groups("W4A3", group_size=wrong)


def test_scales_found_at_run_time_depend_on_the_token_alone(digits):
    """A token 32 times as large as anything in calibration: in blocks 32 times the value, other tokens untouched; under
    a scale per tensor it is clipped."""
    generator = torch.Generator().manual_seed(0)
    block, tensor = (
        _fast(digits, "W4A4", activation_granularity=which).plan.quantizers for which in ("group", "tensor")
    )
    found = {key: q for key, q in block.items() if isinstance(q, GroupAffine) and q.axis == -1}
    assert len(found) > 8
    for key, quantizer in found.items():
        tokens = torch.randn(2, 5, 64, generator=generator)
        large = tokens.clone()
        large[:, 3] *= 32
        expected = quantizer(tokens)
        expected[:, 3] *= 32
        assert torch.equal(quantizer(large), expected), key
        one = tensor[key]
        ends = (torch.tensor([one.qmin, one.qmax]) - one.zero_point) * one.scale
        assert float(one(large * 1e4).abs().max()) == pytest.approx(float(ends.abs().max())), key


def test_a_layer_without_its_massive_channel_is_rotated_too(small_models, pictures):
    import copy

    network = copy.deepcopy(small_models["vit"])
    mlp = network.blocks[1].mlp
    mlp.fc1.bias.data[9] = 600.0
    mlp.fc2.weight.data[:, 9] *= 0.005
    model = ql.load_model(network, input_size=(3, 32, 32))
    q = ql.quantize(model, pictures, method="fast", bits={"default": "W32A32", "blocks.1.mlp": "W32A4"})
    read = q.graph.sites["blocks.1.mlp.fc2"].weight
    assert q.graph.tensor(read).shape[1] == 128, "127 channels and one of zeros"
    assert q.graph.tensor("blocks.1.mlp.fc2.massive.weight").shape[1] == 1
    torch.testing.assert_close(q.graph(pictures), model(pictures), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_coarse_values_alone_are_rotated_at_run_time(digits):
    def rotated(bits, **options):
        q = ql.quantize(digits["model"], digits["calibration"][:2], method="fast", bits=bits, **options)
        return sum("_rotation" in str(node.args) for node in q.graph.fx.nodes)

    some = {"default": "W8A8", "blocks.0": "W4A4"}
    blocks = len(digits["model"].module.blocks)
    # the second layer of every MLP; the first ones of attentions and MLPs, and the classifier
    for other, option, on, layers in (
        ({"rotate_norm_outputs": "none"}, "rotate_mlp_hidden", "all", blocks),
        ({"rotate_mlp_hidden": "none"}, "rotate_norm_outputs", "all", 2 * blocks + 1),
    ):
        off = {"rotate_mlp_hidden": "none", "rotate_norm_outputs": "none"}
        assert rotated("W4A4", **other) == rotated("W8A6", **other) == layers
        assert rotated("W4A8", **other, **{option: on}) == layers
        assert rotated("W4A8") == rotated("W4A4", **off) == 0
        assert rotated(some, **other) == (1 if option == "rotate_mlp_hidden" else layers)
    assert rotated("W4A4", rotate="none") == 0

    def centred(bits, **options):
        q = ql.quantize(digits["model"], digits["calibration"][:2], method="fast", bits=bits, **options)
        return any("means taken out" in told for told in q.plan.rewrites)

    assert centred(some)
    assert centred("W4A8", subtract_mean="all")
    assert not centred("W4A8")
    assert not centred("W4A4", subtract_mean="none")


def test_seeds_rotate_differently_and_reproducibly(loaded, pictures):
    model = loaded["vit"]

    def logits(seed):
        return ql.quantize(model, pictures, method="quantlens-fast", bits="W4A4", seed=seed)(pictures)

    first = logits(0)
    assert torch.equal(first, logits(0))
    assert not torch.equal(first, logits(1))
