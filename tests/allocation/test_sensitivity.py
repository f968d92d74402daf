from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.allocation import find_groups, sensitivity
from quantlens.allocation.sensitivity import Candidates, nuclear_norm
from quantlens.calibration import Calibration
from quantlens.errors import QuantlensError
from quantlens.graph import graph_of
from quantlens.metrics.divergence import kl_of_logits
from quantlens.qmodel import QuantizedModel
from quantlens.qmodel.model import Plan
from quantlens.zoo.detectors import Detr

WIDTHS = (3, 5, 8)


@pytest.fixture(scope="module")
def prepared(loaded, pictures):
    """(model, calibration, candidates) by architecture."""
    made = {}

    def of(kind):
        if kind not in made:
            model = loaded[kind]
            graph = graph_of(model).clone()
            calibration = Calibration.of(pictures, model.preprocess)
            with torch.no_grad():
                made[kind] = model, calibration, Candidates(graph, calibration, find_groups(graph), WIDTHS)
        return made[kind]

    return of


def one_group(model, candidates, group, bits) -> QuantizedModel:
    """The model with one group quantized, by the ordinary simulation."""
    plan = Plan({edge.key: candidates.quantizer(edge, bits) for edge in candidates.edges[group]})
    return QuantizedModel(graph_of(model).clone(), plan, preprocess=model.preprocess)


# -- nuclear norm ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 2, 9, 5), (17, 17)])
def test_nuclear_norm_is_torch_s(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        nuclear_norm(matrices), torch.linalg.matrix_norm(matrices.double(), ord="nuc"), rtol=1e-10, atol=0
    )


def test_nuclear_norm_of_a_rank_one_map():
    rows = torch.softmax(torch.randn(1, 30), -1).expand(30, 30)
    assert float(nuclear_norm(rows)) == pytest.approx(float(rows.norm()), rel=1e-5)
    assert float(nuclear_norm(torch.zeros(4, 4))) == 0


@pytest.mark.parametrize("kind", ["vit", "swin", "plain"])
@pytest.mark.parametrize("formula", ["balanced", "paper"])
def test_omega_is_the_formula_on_the_values_of_the_quantized_model(kind, formula, prepared, pictures):
    """Against whole forwards of the float model and of the model with one group quantized."""
    _, calibration, candidates = prepared(kind)
    with torch.no_grad():
        omega, _ = sensitivity.nuclear_norm_sensitivity(candidates, calibration, formula=formula)
    sites, graph = candidates.graph.sites, candidates.graph

    def values(group, bits):
        """What crosses every output edge."""
        seen = {}
        hook = candidates.hook(group, bits) if bits else None

        def note(key, value):
            seen[key] = value if hook is None else hook(key, value)
            return seen[key]

        graph.run([n for n in graph.fx.nodes if n.op == "call_function"], {graph.input: pictures}, hook=note)
        return seen

    for index, group in ((0, candidates.groups[0]), (3, candidates.groups[3])):
        maps = [f"{s}.output" for s in group.sites if sites[s].kind == "probs"]
        out = [f"{s}.output" for s in group.sites if sites[s].kind == "linear"][-1]
        expected, got = values(index, None), values(index, 5)
        featured = maps or [out]
        compared = featured if formula == "paper" else [out]
        matrices = [expected[key] if maps else expected[key].flatten(1, -2) for key in featured]
        norm = sum(torch.linalg.matrix_norm(m.double(), ord="nuc").sum() for m in matrices) / len(pictures)
        if formula == "balanced":
            norm = norm / (sum(m.double().square().sum() for m in matrices) / len(pictures)).sqrt()
        error = sum((got[key] - expected[key]).double().square().sum() for key in compared) / len(pictures)
        assert float(omega[index, 1]) == pytest.approx(float(norm * error), rel=1e-3)


def test_a_detectors_errors_are_those_of_the_residual_sum_relative_to_it():
    """Of encoder and decoder alike, whatever their streams' sizes and lengths; and with the errors of all attentions
    that write to the stream before it, of which the decoder has two."""
    torch.manual_seed(0)
    shape = {"widths": (4, 4, 4), "dim": 16, "heads": 2, "hidden": 16, "encoder": 1, "decoder": 2, "queries": 4}
    model = ql.load_model(Detr(3, 32, **shape).eval(), input_size=(3, 32, 32))
    graph, images = graph_of(model).clone(), torch.randn(4, 3, 32, 32)
    groups, sums = find_groups(graph), {"encoder.0.attn": "encoder.0.add1", "decoder.1.attn": "decoder.1.add2"}
    with torch.no_grad():
        candidates = Candidates(graph, Calibration.of(images, model.preprocess), groups, WIDTHS)
        info = sensitivity.nuclear_norm_sensitivity(candidates, Calibration.of(images, model.preprocess))[1]
    calls, found = [n for n in graph.fx.nodes if n.op == "call_function"], {g.name: i for i, g in enumerate(groups)}
    for name, site in sums.items():
        node = graph.sites[site].node
        hooks = [None, candidates.hook(found[name], 5)]
        float_, got = (graph.run(calls, {graph.input: images}, hook=hook, keep=[node])[node] for hook in hooks)
        expected = float((got - float_).square().sum() / float_.square().sum())
        assert info["squared_errors"][found[name]][1] == pytest.approx(expected, rel=1e-4)


def test_an_unknown_formula_is_refused(loaded, pictures):
    with pytest.raises(QuantlensError, match="balanced or paper"):
        ql.allocate(loaded["vit"], pictures, formula="other")


# -- kl ----------------------------------------------------------------------------------------------------------------
def test_kl_is_that_of_the_model_with_one_group_quantized(architecture, prepared, pictures):
    model, calibration, candidates = prepared(architecture)
    with torch.no_grad():
        found, _ = sensitivity.kl_sensitivity(candidates, calibration)
        for group, column in ((0, 0), (1, 1), (3, 0)):
            quantized = one_group(model, candidates, group, WIDTHS[column])
            expected = kl_of_logits(graph_of(model)(pictures).double(), quantized(pictures).double()).mean()
            assert float(found[group, column]) == pytest.approx(float(expected), rel=2e-2, abs=1e-7)


def test_chunks_give_what_one_chunk_gives(prepared, monkeypatch):
    from quantlens.calibration import images

    _, calibration, candidates = prepared("swin")
    with torch.no_grad():
        whole = [
            f(candidates, calibration)[0] for f in (sensitivity.nuclear_norm_sensitivity, sensitivity.kl_sensitivity)
        ]
        monkeypatch.setattr(images, "CHUNK", 3)
        parts = [
            f(candidates, calibration)[0] for f in (sensitivity.nuclear_norm_sensitivity, sensitivity.kl_sensitivity)
        ]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)


def test_no_candidate_runs_the_whole_model(prepared, monkeypatch):
    """The nuclear norm's pass costs less than one forward per width: groups run from where they begin."""
    _, calibration, candidates = prepared("vit")
    graph, ran = candidates.graph, []
    run = graph.run
    monkeypatch.setattr(graph, "run", lambda nodes, *a, **k: ran.append(len(nodes)) or run(nodes, *a, **k))
    with torch.no_grad():
        sensitivity.nuclear_norm_sensitivity(candidates, calibration)
    calls = sum(node.op == "call_function" for node in graph.fx.nodes)
    assert sum(ran) < (1 + len(WIDTHS)) * calls


# -- random ------------------------------------------------------------------------------------------------------------
def test_random_follows_its_seed_and_falls_with_the_width():
    groups = [None] * 20
    a, b, c = (sensitivity.random_sensitivity(groups, (4, 5, 6), seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert bool((a[:, :-1] > a[:, 1:]).all())
    assert float(a.max() / a.min()) > 100


# -- hessian -----------------------------------------------------------------------------------------------------------
class Tiny(nn.Module):
    """Pixels [B, 3, 4, 4] -> two small layers -> 3 classes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, images):
        return self.second(torch.tanh(self.first(images.flatten(1)[:, :6])))


def test_hutchinson_finds_the_exact_traces():
    """Against torch's own Hessian of the same loss, by weight and by input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ql.load_model(Tiny(), input_size=(3, 4, 4))
        images = torch.randn(4, 3, 4, 4)
    graph = graph_of(model)
    edges = graph.sites.edges
    weights = [edges["first.weight"], edges["second.weight"]]
    inputs = [edges["second.input"]]
    one, two = (graph.tensor(f"{name}.bias") for name in ("first", "second"))
    probabilities = graph(images).softmax(-1)

    def loss(first, second, shift):
        hidden = torch.tanh(images.flatten(1)[:, :6] @ first.T + one) + shift
        return -(probabilities * (hidden @ second.T + two).log_softmax(-1)).sum()

    point = (graph.tensor("first.weight"), graph.tensor("second.weight"), torch.zeros(4, 5))
    blocks = torch.autograd.functional.hessian(loss, point)
    exact = [float(blocks[i][i].reshape(point[i].numel(), -1).trace()) for i in range(3)]
    assert min(exact) > 0  # Gauss-Newton: soft labels leave no negative part

    logits, leaves = sensitivity.with_leaves(graph, images, weights, inputs)
    leaves = [leaves[k] for k in ("first.weight", "second.weight", "second.input")]
    slopes = torch.autograd.grad(sensitivity.soft_loss(logits), leaves, retain_graph=True)
    assert max(float(s.abs().max()) for s in slopes) < 1e-5  # the loss is least at the float model
    generator = torch.Generator().manual_seed(0)

    def check(sample, chosen):
        drawn = list(sample(logits, [leaves[i] for i in chosen], 400, generator))
        values = torch.tensor([[float(v.detach()) for v in one] for one in drawn])
        errors = values.std(dim=0) / 20
        for i, mean, error in zip(chosen, values.mean(dim=0).tolist(), errors.tolist(), strict=True):
            assert mean == pytest.approx(exact[i], abs=5 * error)
            assert error < 0.15 * exact[i]

    for sample in (sensitivity.hessian_samples, sensitivity.gradient_samples):
        for chosen in ([0], [1], [2], [0, 1, 2]):
            check(sample, chosen)


def test_hessian_sensitivities_follow_seed_and_fall_with_the_width(prepared):
    _, calibration, candidates = prepared("vit")
    options = {"probes": 2, "piece": 4, "seed": 1}
    with torch.no_grad():
        a, info = sensitivity.hessian_sensitivity(candidates, calibration, **options)
        b, _ = sensitivity.hessian_sensitivity(candidates, calibration, **options)
    assert torch.equal(a, b)
    assert bool((a > 0).all())
    assert bool((a[:, :-1] > a[:, 1:]).all())
    assert len(info["traces"]) == len(info["standard_errors"]) == 4


def test_hessian_weighs_errors_by_the_mean_eigenvalue(prepared):
    """A group's Ω at two widths differs as its weights' and inputs' squared errors do: with the inputs left out, the
    ratio is that of ‖Q(W) − W‖²."""
    _, calibration, candidates = prepared("vit")
    edges = candidates.edges
    try:
        candidates.edges = [[e for e in part if e.key.endswith("fc1.weight")] for part in edges]
        with torch.no_grad():
            found, info = sensitivity.hessian_sensitivity(candidates, calibration, probes=2, piece=4)
    finally:
        candidates.edges = edges
    weight = candidates.graph.tensor("blocks.0.mlp.fc1.weight")
    edge = candidates.graph.sites.edges["blocks.0.mlp.fc1.weight"]
    errors = torch.stack([(candidates.quantizer(edge, b)(weight) - weight).double().square().sum() for b in WIDTHS])
    torch.testing.assert_close(found[1], info["traces"][1] / weight.numel() * errors, rtol=1e-4, atol=0)
    assert float(found[0].abs().sum()) == 0
