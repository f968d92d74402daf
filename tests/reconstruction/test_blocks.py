"""Block reconstruction: lower loss, on images it has not seen; the same twice; the same after a kill."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql
from detectors import selecting
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.formats import Uniform
from quantlens.graph import choices
from quantlens.qmodel import Plan, QuantizedModel
from quantlens.reconstruction import Context, Settings, find_units, mse, reconstruct, token_norm
from quantlens.reconstruction.scales import AdaRound


def _start(model, images, bits="W3A8", method="minmax"):
    """A graph and a plan to begin with, and the images as calibration."""
    q = ql.quantize(model, images, method=method, bits=bits)
    return q.graph, q.plan, Calibration.of(images, model.preprocess)


def _run(start, settings, **more):
    """Reconstruct copies; returns graph, plan and report."""
    graph, plan, calibration = start
    graph, plan = graph.clone(), Plan(dict(plan.quantizers))
    return graph, plan, reconstruct(graph, plan, calibration, settings, **more)


def _equal(a, b) -> bool:
    """Whether two (graph, plan, …) hold equal tensors and quantizers."""
    tensors = all(torch.equal(v, b[0].tensors()[k]) for k, v in a[0].tensors().items())
    return tensors and all(
        torch.equal(v, b[1].quantizers[k].tensors()[n])
        for k, q in a[1].quantizers.items()
        for n, v in q.tensors().items()
    )


# -- units ---------------------------------------------------------------------------------------------------------
def test_units_make_up_the_whole_network(small, architecture, pictures):
    model = small[architecture]
    graph = ql.quantize(model, pictures, method="repq-vit", bits="W8A32").graph
    units, env = find_units(graph), {graph.input: pictures}
    assert {b.name for b in graph.sites.blocks} <= {u.name for u in units}
    for unit in units:
        inputs = {graph.input: torch.empty_like(pictures, device="meta")} | {s: env[s] for s in unit.sources}
        out = graph.run(unit.nodes, dict(inputs), keep=unit.results)
        env |= {r: out[r] for r in unit.results}
    torch.testing.assert_close(env[graph.output], model(pictures), rtol=1e-4, atol=1e-4)
    keys = [e.key for u in units for e in u.edges]
    assert len(keys) == len(set(keys)) == len(graph.sites.edges)


# -- it works ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", [("rounding",), ("scales",), ("rounding", "scales"), ("weights",), ("vectors",)])
def test_every_architecture_comes_nearer_to_its_float_model(what, small, architecture, pictures):
    start = _start(small[architecture], pictures, "W3A6")
    settings = Settings(
        what, iterations=8, batch_size=4, straight_through=True, lr_rounding=0.1, lr_weights=0.05, lr_vectors=0.02
    )
    graph, plan, report = _run(start, settings)
    assert all(u.after <= u.before for u in report.units)
    assert sum(u.accepted for u in report.units) >= 2, report
    assert bool(torch.isfinite(QuantizedModel(graph, plan, preprocess=small[architecture].preprocess)(pictures)).all())
    for edge, quantizer in ((e, plan.quantizers[e.key]) for e in graph.sites.edges.values() if e.is_weight):
        weight = graph.tensor(str(edge.value.target))
        changed = not torch.equal(weight, start[0].tensor(str(edge.value.target)))
        assert not changed or torch.equal(quantizer(weight), weight), "a changed weight must lie on its grid"


def test_reported_losses_are_those_of_the_blocks(small, pictures):
    """Before and after, on the images that were trained on, behind the quantized prefix: what the units put out says
    the same, and a unit is kept where it fell."""
    start = _start(small["vit"], pictures, "W4A8")
    settings = Settings(("rounding",), iterations=10, batch_size=8, straight_through=True, lr_rounding=0.05)
    graph, plan, report = _run(start, settings)
    assert any(unit.accepted for unit in report.units)
    losses = _block_losses(graph, plan, start[0], start[2])
    for unit, loss in zip(report.units, losses, strict=True):
        assert unit.after < unit.before if unit.accepted else unit.after == unit.before
        assert unit.after == min(unit.before, *unit.rounds)
        assert unit.after == pytest.approx(loss, rel=1e-3)


def _block_losses(graph, plan, original, calibration):
    """Mean squared error of every unit behind the quantized prefix; the target is the original graph's output."""
    found, images = [], calibration.chunk(0)
    exact, quantized = {original.input.name: images}, {original.input.name: images}

    def hook(key, value):
        quantizer = plan.quantizers.get(key)
        return value if quantizer is None else quantizer(value)

    def run(graph, unit, values, hook=None):
        inputs = {graph.input: torch.empty_like(images, device="meta")} | {s: values[s.name] for s in unit.sources}
        out = graph.run(unit.nodes, inputs, hook=hook, keep=unit.results)
        return {r.name: out[r] for r in unit.results}

    for mine, theirs in zip(find_units(graph), find_units(original), strict=True):
        exact |= run(original, theirs, exact)
        quantized |= run(graph, mine, quantized, hook)
        name = mine.results[0].name
        found.append(float((quantized[name] - exact[name]).square().mean()))
    return found


@pytest.fixture(scope="module")
def detector():
    """(graph, plan, calibration) of a detector that selects its queries by scores, which alone are quantized."""
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    graph, plan, calibration = _start(selecting(), images, "W2A8")
    return graph, Plan({k: q for k, q in plan.quantizers.items() if k.startswith("score.")}), calibration


def test_both_networks_read_at_the_places_that_the_float_one_chooses(detector):
    """Other queries would be chosen; what is made of the same ones is the same. The scores are wrong, which is seen."""
    graph, plan, calibration = detector
    (chosen,) = choices(graph)
    nodes = [node for node in graph.fx.nodes if node.op == "call_function"]

    def places(hook=None):
        return graph.run(nodes, {graph.input: calibration.chunk(0)}, hook=hook, keep=[chosen])[chosen]

    quantizers = plan.quantizers
    assert not torch.equal(places(), places(lambda key, x: quantizers[key](x) if key in quantizers else x))
    report = _run(detector, Settings(("rounding",), iterations=0))[2]
    losses = {unit.unit: unit.before for unit in report.units if unit.trained}
    assert list(losses) == [next(unit.name for unit in find_units(graph) if unit.choices)]
    plan = Plan({**plan.quantizers, "kind.weight": plan.quantizers["score.weight"]})
    last = _run((graph, plan, calibration), Settings(("rounding",), iterations=0))[2].units[-1]
    alone = Plan({"kind.weight": plan.quantizers["kind.weight"]})
    assert last.before == _run((graph, alone, calibration), Settings(("rounding",), iterations=0))[2].units[-1].before


def test_the_scores_that_queries_are_chosen_by_are_trained(detector):
    settings = Settings(("rounding",), iterations=40, batch_size=6, straight_through=True, lr_rounding=0.05)
    (unit,) = [unit for unit in _run(detector, settings)[2].units if unit.trained]
    assert 0 < unit.after < 0.9 * unit.before


def test_scales_alone(small, pictures):
    """Activation quantizers change and nothing that was given does; a unit's loss falls or stays."""
    start = _start(small["vit"], pictures, "W32A4")
    before = {key: q.scale.clone() for key, q in start[1].quantizers.items()}
    settings = Settings(("scales",), inputs="quantized", iterations=8, rounds=4, batch_size=8, lr_scales=0.03)
    found = _run(start, settings)[1].quantizers
    assert all(torch.equal(start[1].quantizers[key].scale, scale) for key, scale in before.items())
    assert any(not torch.equal(found[key].scale, scale) for key, scale in before.items())
    losses = [
        _block_losses(start[0], Plan(dict(quantizers)), start[0], start[2])[0]
        for quantizers in (start[1].quantizers, found)
    ]
    assert losses[1] <= losses[0], "the first unit, which reads the same in both"


def test_a_quantizer_that_edges_share_stays_shared(small, pictures):
    model = small["vit"]
    graph, _, calibration = _start(model, pictures, "W8A32")
    shared = Uniform(torch.tensor(0.5), torch.tensor(8), 4, signed=False)
    plan = Plan({"blocks.0.norm1.input": shared, "blocks.0.add1.lhs": shared})
    _, plan, _ = _run((graph, plan, calibration), Settings(("scales",), iterations=8, batch_size=8, lr_scales=0.05))
    a, b = plan.quantizers.values()
    assert a is b
    assert not torch.equal(a.scale, shared.scale)


def test_soft_rounding_is_decided_in_the_end(small, pictures, monkeypatch):
    """Rounding that is hardened while it is still open changes the block that was trained."""
    decided, harden = [], AdaRound.harden

    def spy(rounding):
        decided.append((rounding.h() - 0.5).abs().flatten() > 0.45)
        return harden(rounding)

    monkeypatch.setattr(AdaRound, "harden", spy)
    settings = Settings(("rounding",), iterations=60, batch_size=4, lr_rounding=0.5, guarded=False)
    _run(_start(small["vit"], pictures, "W4A32"), settings)
    assert float(torch.cat(decided).double().mean()) > 0.9


# -- never worse, the same twice, the same after a kill --------------------------------------------------------------
def test_a_block_that_got_worse_keeps_its_start(small, pictures):
    start = _start(small["vit"], pictures, "W8A8")
    settings = Settings(("weights",), iterations=3, batch_size=8, lr_weights=500.0)
    graph, plan, report = _run(start, settings)
    assert not any(u.accepted for u in report.units)
    assert all(r > u.before for u in report.units for r in u.rounds)
    assert _equal((graph, plan), start)


def test_images_that_are_held_out_are_measured_but_not_trained_on(small, pictures):
    start, held = _start(small["vit"], pictures, "W3A8"), (1, 6)
    trained, measured = set(), set()

    def loss(got, expected, context):
        (trained if torch.is_grad_enabled() else measured).update(context.images.tolist())
        return mse(got, expected, context)

    settings = Settings(
        ("rounding",), loss, iterations=6, batch_size=3, straight_through=True, lr_rounding=0.2, held_out=held
    )
    graph, plan, report = _run(start, settings)
    assert measured == set(held)
    assert trained == set(range(len(pictures))) - set(held)
    losses = _block_losses(graph, plan, start[0], Calibration.of(pictures[list(held)], small["vit"].preprocess))
    assert [unit.after for unit in report.units] == pytest.approx(losses, rel=1e-3)
    with pytest.raises(QuantlensError, match="every image is held out"):
        _run(start, Settings(iterations=1, held_out=tuple(range(len(pictures)))))


def test_rounding_is_learned_from_where_the_graph_is(small, pictures):
    """Weights that are rounded otherwise than to nearest stay so without training, and are trained towards the float
    ones."""
    original, plan, calibration = _start(small["vit"], pictures, "W3A32")
    graph, more = original.clone(), {"reference": original}
    unrounded = {str(e.value.target): e for e in graph.sites.edges.values() if e.is_weight}
    more["unrounded"] = {name: original.tensor(name) for name in unrounded}
    for edge in unrounded.values():
        name, quantizer = str(edge.value.target), plan.quantizers[edge.key]
        weight = original.tensor(name)
        graph.set_tensor(name, quantizer(weight + quantizer.spread(quantizer.scale, weight.dim()) * (weight > 0)))
    still, _, report = _run((graph, plan, calibration), Settings(("rounding",), iterations=0), **more)
    assert all(torch.equal(still.tensor(name), graph.tensor(name)) for name in unrounded)
    settings = Settings(("rounding",), iterations=8, straight_through=True, lr_rounding=0.3, batch_size=8)
    _, _, trained = _run((graph, plan, calibration), settings, **more)
    assert trained.units[0].before == report.units[0].before > 0
    assert sum(u.after < 0.5 * u.before for u in trained.units) >= 2


SETTINGS = Settings(iterations=6, rounds=2, batch_size=4, straight_through=True, lr_rounding=0.1, drop=0.5)


def test_deterministic_under_a_seed(small, pictures):
    start = _start(small["vit"], pictures)
    a, b, c = (_run(start, SETTINGS, seed=s) for s in (1, 1, 2))
    assert _equal(a, b)
    assert not _equal(a, c)


def test_in_files_as_in_memory(small, pictures):
    start = _start(small["swin"], pictures)
    assert _equal(_run(start, SETTINGS), _run(start, SETTINGS, memory=0))


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on_bit_equal(small, pictures, tmp_path):
    start = _start(small["vit"], pictures)
    whole = _run(start, SETTINGS, seed=5)
    units = len(whole[2].units)

    def kill(done, total):
        assert total == units * SETTINGS.iterations
        if done > 2 * SETTINGS.iterations + 3:
            raise _Killed

    with pytest.raises(_Killed):
        _run(start, SETTINGS, seed=5, checkpoint=tmp_path, progress=kill)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    calls = []
    again = _run(start, SETTINGS, seed=5, checkpoint=tmp_path, progress=lambda *c: calls.append(c))
    assert again[2].resumed == 2
    assert _equal(again, whole)
    assert [u.after for u in again[2].units] == [u.after for u in whole[2].units]
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]
    finished = _run(start, SETTINGS, seed=5, checkpoint=tmp_path)
    assert finished[2].resumed == units
    assert _equal(finished, whole)


@pytest.mark.parametrize("what", ["seed", "settings", "images", "plan", "unrounded", "damage"])
def test_a_stored_block_is_used_only_for_the_same_run(what, small, pictures, tmp_path):
    start = _start(small["plain"], pictures)
    _run(start, SETTINGS, checkpoint=tmp_path)
    graph, plan, calibration = start
    settings, seed, more = SETTINGS, 0, {}
    if what == "seed":
        seed = 1
    elif what == "settings":
        settings = Settings(**{**SETTINGS.__dict__, "lr_rounding": 0.11})
    elif what == "images":
        calibration = Calibration.of(pictures.flip(0), small["plain"].preprocess)
    elif what == "plan":
        key = next(iter(plan.quantizers))
        plan = Plan({**plan.quantizers, key: Uniform(torch.tensor(0.123), torch.tensor(3), 8, signed=False)})
    elif what == "unrounded":
        more["unrounded"] = {name: t for name, t in graph.tensors().items() if t.dim() > 1}
    else:
        for path in tmp_path.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:50])
    assert _run((graph, plan, calibration), settings, seed=seed, checkpoint=tmp_path, **more)[2].resumed == 0


# -- what the unit reads in training, and what is dropped ------------------------------------------------------------
def _training_error(start, **settings):
    """Mean |ŷ − y| of the second block's output in training, nothing being learned yet."""
    seen = []

    def loss(got, expected, context):
        if context.unit == "blocks.1" and torch.is_grad_enabled():
            seen.append(float((got - expected).detach().abs().mean()))
        return mse(got, expected, context)

    _run(start, Settings(("scales",), loss, iterations=4, batch_size=8, lr_scales=0.0, **settings))
    return sum(seen) / len(seen)


def test_drop_and_inputs(small, pictures):
    """All activations dropped and float inputs: the float block. All inputs float: those of the float network. Half of
    each lies between (benchmarks/quality)."""
    start = _start(small["vit"], pictures, "W32A4")
    nearly = 1 - 1e-7
    none = _training_error(start, inputs="quantized")
    assert _training_error(start, inputs="float", drop=nearly) < 1e-3 * none
    assert _training_error(start, inputs="mixed", input_drop=1.0, drop=nearly) < 1e-3 * none
    assert _training_error(start, inputs="mixed", input_drop=0.0) == pytest.approx(none)
    whole = _training_error(start, inputs="float")
    assert _training_error(start, inputs="mixed", input_drop=1.0) == pytest.approx(whole)
    assert len({none, whole, _training_error(start, inputs="mixed", input_drop=0.5)}) == 3
    assert _training_error(start, inputs="float", drop=0.5) != whole


# -- losses ----------------------------------------------------------------------------------------------------------
def test_token_norm_counts_tokens_by_their_relative_error():
    expected = torch.ones(2, 4, 8)
    expected[0, 0] *= 100.0  # an extreme token
    scale = float(expected.square().sum(-1).mean())
    context = Context("u", False, torch.arange(2), scale)
    epsilon = 0.01 * scale
    norms = expected.square().sum(-1)
    relative = token_norm(expected * 1.1, expected, context)
    assert float(relative) == pytest.approx(float((0.01 * norms / (norms + epsilon)).mean()), rel=1e-4)
    off = expected.clone()
    off[0, 0, 0] += 10.0
    plain = torch.ones_like(expected)
    plain[0, 0] *= 100.0
    plain[1, 1, 0] += 10.0
    # the same absolute error counts less at the extreme token; plainly squared it counts the same
    assert float(token_norm(off, expected, context)) < 0.5 * float(token_norm(plain, expected, context))
    assert float(mse(off, expected, context)) == pytest.approx(float(mse(plain, expected, context)))


# -- what is asked for wrongly -----------------------------------------------------------------------------------------
def test_wrong_settings_are_named():
    with pytest.raises(UnknownNameError, match="rounding"):
        Settings(("roundin",))
    with pytest.raises(UnknownNameError, match="token-norm"):
        Settings(loss="token-nrm")
    with pytest.raises(QuantlensError, match="not both"):
        Settings(("rounding", "weights"))
    with pytest.raises(QuantlensError, match="drop"):
        Settings(drop=1.5)
