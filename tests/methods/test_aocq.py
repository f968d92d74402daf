"""AOCQ: three levels, each of which can be switched off (what each is worth: benchmarks/quality)."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.calibration import Observation
from quantlens.errors import QuantlensError
from quantlens.formats import PowerOfTwo, Uniform
from quantlens.graph import graph_of
from quantlens.methods import registry
from quantlens.methods.aocq import add_alpha, residual_edges, shift_axis
from quantlens.methods.base import everything_edges
from quantlens.zoo.detectors import RtDetr

SHORT = {"iterations": 16, "scale_iterations": 8, "batch_size": 16}


@pytest.fixture(scope="module")
def digits(digits):
    return {**digits, "images": digits["images"][:200], "expected": digits["expected"][:200]}


@pytest.fixture(scope="module")
def vit(loaded):
    return loaded["vit"]


@pytest.mark.slow
def test_balanced_operators_even_out_uneven_channels(digits):
    """Four channels of every LayerNorm made 16 times as large, and the layers behind it undone: the same function.
    Balanced, the channels that a layer reads are of one size again."""
    model, images = ql.load_model("digits-vit"), digits["calibration"][:8]
    for block in model.module.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight[:4] *= 16
            norm.bias[:4] *= 16
            linear.weight[:, :4] /= 16
    assert torch.equal(model(digits["images"]), digits["expected"])
    for operator in (True, False):
        q = ql.quantize(model, images, method="aocq", bits="W32A5", operator=operator, scales=False, rounding=False)
        seen = {}
        nodes = [node for node in q.graph.fx.nodes if node.op == "call_function"]
        q.graph.run(
            nodes,
            {q.graph.input: images},
            hook=lambda key, value, seen=seen: seen.setdefault(key, value),
            keep=[q.graph.output],
        )
        for block in range(len(model.module.blocks)):
            for key in (f"blocks.{block}.attn.qkv.input", f"blocks.{block}.mlp.fc1.input"):
                size = seen[key].flatten(0, -2).square().mean(0).sqrt()
                peak = float(size.max() / size.median())
                assert peak < 4 if operator else peak > 8, (key, peak)


def test_refined_scales_are_all_that_changes(vit, pictures):
    """And a unit keeps them where its loss on the calibration images fell."""
    refined, start = (
        ql.quantize(vit, pictures, method="aocq", bits="W32A3", rounding=False, **{**SHORT, "scales": scales})
        for scales in (True, False)
    )
    assert all(torch.equal(t, start.graph.tensor(n)) for n, t in refined.graph.tensors().items())
    moved = [
        key
        for key, q in refined.plan.quantizers.items()
        if any(not torch.equal(t, start.plan.quantizers[key].tensors()[n]) for n, t in q.tensors().items())
    ]
    assert moved
    units = refined.plan.info["reconstruction"]["scales"]
    assert any(unit["accepted"] for unit in units)
    for unit in units:
        assert unit["after"] < unit["before"] if unit["accepted"] else unit["after"] == unit["before"]


def test_learned_rounding_goes_to_a_neighbouring_code(vit, pictures):
    """Of the same scale; activations keep their quantizers."""
    learned, nearest = (
        ql.quantize(vit, pictures, method="aocq", bits="W3A8", **{**SHORT, "scales": False, "rounding": rounding})
        for rounding in (True, False)
    )
    moved = 0
    for edge, quantizer in nearest.weight_edges():
        name = str(edge.value.target)
        assert torch.equal(learned.plan.quantizers[edge.key].scale, quantizer.scale)
        apart = quantizer.encode(learned.graph.tensor(name)).int() - quantizer.encode(nearest.graph.tensor(name)).int()
        assert int(apart.abs().max()) <= 1, name
        moved += int(apart.abs().sum())
    assert moved
    for key, quantizer in nearest.plan.quantizers.items():
        if not key.endswith(".weight"):
            assert all(
                torch.equal(learned.plan.quantizers[key].tensors()[n], t) for n, t in quantizer.tensors().items()
            )


def test_everything_is_quantized(architecture, loaded, pictures):
    model = loaded[architecture]
    q = ql.quantize(model, pictures, method="aocq", bits="W4A8", iterations=1, scale_iterations=4)
    keys, plan = set(q.plan.quantizers), q.plan.quantizers
    for group in everything_edges(q.graph):
        assert {e.key for e in group} <= keys
        assert len({id(plan[e.key]) for e in group}) == 1
    for site in q.graph.sites.of_kind("linear", "conv"):
        assert plan[f"{site.name}.weight"].bits == 4
    shifts = [k for k, v in plan.items() if isinstance(v, PowerOfTwo)]
    free = {e.key for group in everything_edges(q.graph) if shift_axis(q.graph, group) is not None for e in group}
    assert set(shifts) <= residual_edges(q.graph) | free
    gelus = [s for s in q.graph.sites.of_kind("linear") if s.name.endswith("fc1")]
    assert all(f"{s.name}.output" in shifts for s in gelus), "a GELU's input has a shift per channel"
    sums = q.graph.sites.of_kind("add")
    assert sums
    for site in sums:
        assert f"{site.name}.output" in shifts, "a residual sum has a shift per channel"


def test_levels_off_leave_no_trace(vit, pictures):
    def plan(**options):
        return ql.quantize(vit, pictures, method="aocq", bits="W4A8", **{**SHORT, **options})

    q = plan(operator=False, scales=False, rounding=False)
    assert all(isinstance(x, Uniform) or x.kind == "log" for x in q.plan.quantizers.values())
    assert q.plan.info["reconstruction"] == {}
    reference = ql.load_model(vit.module, input_size=(3, 32, 32))
    torch.testing.assert_close(q.graph(pictures), reference(pictures), rtol=1e-4, atol=1e-4)
    changed = [n for n, t in q.graph.tensors().items() if n.endswith("fc2.weight")]
    before = {n: q.graph.tensor(n) for n in changed}
    learned = plan(operator=False, scales=False)
    assert any(not torch.equal(learned.graph.tensor(n), before[n]) for n in changed)
    refined = plan(operator=False, rounding=False)
    assert all(torch.equal(refined.graph.tensor(n), before[n]) for n in changed)
    assert all(len(u["rounds"]) == 4 for u in refined.plan.info["reconstruction"]["scales"] if u["trained"])


def test_the_balanced_graph_is_the_same_function(vit, pictures):
    q = ql.quantize(vit, pictures, method="aocq", bits="W4A8", scales=False, rounding=False)
    torch.testing.assert_close(q.graph(pictures), vit(pictures), rtol=1e-3, atol=1e-3)
    assert any("LN_α" in line for line in q.plan.rewrites)


def test_shifts_follow_the_channels():
    """Channels 16 times and 2 times as large get 4 and 1 more bits of shift, and lose far less than with one scale."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 4000, generator=generator).clamp(-3, 3) * torch.tensor([1, 16, 2, 1, 1, 32.0])[:, None]
    quantizer = add_alpha(Observation.of(values), 8)
    exponents = quantizer.exponents.int()
    assert (exponents - exponents[0]).tolist() == [0, 4, 1, 0, 0, 5]
    error = (quantizer(values.T).T - values).square().mean(1)
    one = Uniform(values.abs().max() / 127, None, 8)
    single = (one(values) - values).square().mean(1)
    assert float(error[0]) < 0.01 * float(single[0])
    assert float(error[5]) < 1.5 * float(single[5])


def test_zero_points_centre_the_channels():
    """Channels that lie to one side of zero: a zero point for all leaves them half of the codes, or fewer."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(6, 4000, generator=generator) + torch.tensor([0.0, -1.0, 5.0, -30.0, 0.0, 0.0])[:, None]
    centred = add_alpha(Observation.of(values), 6)
    assert centred.zero_point.shape == (6,)
    error = (centred(values.T).T - values).square().mean(1)
    steps = (1 / 63) ** 2 / 12
    assert bool((error < 1.5 * steps).all()), "as good as each channel alone, but for the power of two"
    constant = add_alpha(Observation.of(torch.full((2, 50), 1e6) + torch.tensor([[0.0], [1e-3]])), 8)
    assert bool(torch.isfinite(constant(torch.full((3, 2), 1e6))).all())


def test_token_norm_chooses_the_shifts_of_sums(vit, pictures):
    def plan(loss):
        off = {"scales": False, "rounding": False}
        return ql.quantize(vit, pictures, method="aocq", bits="W8A4", loss=loss, **off).plan.quantizers

    token, squared = plan("token-norm"), plan("mse")
    differ = {k for k, q in token.items() if q.kind == "ptf" and not torch.equal(q.exponents, squared[k].exponents)}
    assert differ
    assert all(".add" in k or "norm" in k for k in differ), "branches and GELU inputs keep the squared error"


def test_names_and_wrong_options(vit, pictures):
    assert type(registry.get("adaptive-outlier-correction")) is type(registry.get("aocq"))
    with pytest.raises(QuantlensError, match="token-norm"):
        ql.quantize(vit, pictures, method="aocq", loss="huber")
    with pytest.raises(QuantlensError, match="iterations"):
        ql.quantize(vit, pictures, method="aocq", iterations=-1)


def test_a_killed_run_goes_on(vit, pictures, tmp_path):
    def run(**more):
        return ql.quantize(vit, pictures, method="aocq", bits="W4A8", **SHORT, **more)

    whole = run()

    def kill(done, total):
        if done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=str(tmp_path), progress=kill)
    assert list(tmp_path.glob("rounding/*.safetensors"))
    assert torch.equal(run(checkpoint=str(tmp_path))(pictures), whole(pictures))


def keys_of(site):
    return [edge.key for edge in site.edges.values()]


@pytest.mark.slow
def test_boxes_and_sampled_places_of_a_detector_stay_float():
    """Every sum and output between the layers that give them and the boxes or the sampling; what a layer reads of
    them, and features, are quantized."""
    shape = {"widths": (4, 4, 4), "dim": 16, "heads": 2, "hidden": 16, "encoder": 1, "decoder": 1, "queries": 4}
    graph = graph_of(ql.load_model(RtDetr(3, 32, points=2, **shape).eval(), input_size=(3, 32, 32)))
    quantized = {edge.key for group in everything_edges(graph) for edge in group}
    places = {"memory_box.layers.1.output", "box_heads.0.layers.1.output", "decoder.0.cross.offsets.output"}
    places |= {
        e.key for s in graph.sites for e in s.edges.values() if s.name in ("add2", "add3", "decoder.0.cross.add1")
    }
    assert places <= set(graph.sites.edges)
    assert not places & quantized
    assert {"class_heads.0.output", "decoder.0.cross.weights.output", "query_position.layers.0.input"} <= quantized
    assert "decoder.0.mlp.layers.1.output" in quantized
