from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.calibration import Calibration, images as calibration_images
from quantlens.calibration.gradients import sample_products
from quantlens.calibration.ranges.guided import HEADS, Side, alternate, sample_rows, search
from quantlens.calibration.sampling import ProductSampler, find_products
from quantlens.methods.ptq4vit import GELU_MINIMUM, fisher, fused_projections, gelu_steps
from quantlens.metrics.divergence import damage, kl_of_logits
from quantlens.qmodel import float_model


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


def own_label(logits, reference, generator):
    """Cross-entropy against the float model's own top-1."""
    return torch.nn.functional.cross_entropy(logits, reference.argmax(-1), reduction="sum")


def _sampler(**sizes):
    return ProductSampler(torch.Generator().manual_seed(0), **sizes)


def _collect(model, pictures, loss, sampler=None, **settings):
    graph = float_model(model).graph.clone()
    calibration = Calibration.of(pictures, model.preprocess)
    with torch.no_grad():
        return sample_products(graph, calibration, find_products(graph), sampler or _sampler(), loss, **settings)


# -- the gradient ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("outputs", ["softmax", "sigmoid", "values"])
def test_the_probe_has_the_hessian_of_the_damage(outputs):
    one = torch.tensor([[1.0, 0.0, -1.0, 0.5]]).double()
    logits = one.repeat(40_000, 1).requires_grad_(True)
    fisher(logits, logits.detach(), torch.Generator().manual_seed(0), outputs).backward()
    expected = torch.autograd.functional.hessian(lambda z: damage(one, z, outputs, "sum"), one)[0, :, 0]
    torch.testing.assert_close(logits.grad.mT @ logits.grad / len(logits), expected, rtol=0, atol=1e-2)


def test_the_papers_gradient_is_zero_and_ours_is_not():
    """KL of the float model against itself has its minimum there; what the authors store is rounding."""
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    losses = {
        "paper": kl_of_logits(logits.detach(), logits, "sum"),
        "ours": fisher(logits, logits.detach(), torch.Generator().manual_seed(1)),
    }
    sizes = {name: float(torch.autograd.grad(loss, logits)[0].abs().amax()) for name, loss in losses.items()}
    assert sizes["paper"] < 1e-6
    assert sizes["ours"] > 0.05


def test_every_product_has_a_gradient(architecture, loaded, pictures):
    model = loaded[architecture]
    for name, sample in _collect(model, pictures, fisher).items():
        assert sample.joined, name
        assert sample.gradient is not None, name
        a, b = sample.operands
        assert sample.gradient.shape == (*a.shape[:-1], b.shape[-2]), name
        assert float(sample.gradient.abs().max()) == pytest.approx(1.0)


@pytest.mark.parametrize("rows", [3, 512])
def test_inputs_and_gradients_are_of_the_same_rows(rows, model, pictures):
    """With the loss ½·Σ logits², the gradient at the classifier's output is that output."""
    sample = _collect(model, pictures, lambda logits, *_: logits.square().sum() / 2, _sampler(rows=rows))["head"]
    weight, inputs = sample.operands
    output = weight @ inputs.mT + model.module.head.bias[:, None]
    assert inputs.shape[0] == min(rows, len(pictures))
    cosine = torch.nn.functional.cosine_similarity(output, sample.gradient, dim=0)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-4)


def test_the_floor_adds_squared_error(model, pictures):
    """Σ (g² + mean g²)·e² = Σ (g·e)² + mean g²·Σ e²."""
    plain, raised = (_collect(model, pictures, own_label, floor=f)["blocks.0.mlp.fc1"] for f in (0.0, 1.0))
    squares = plain.gradient.square() + plain.gradient.square().mean()
    torch.testing.assert_close(raised.gradient.square(), squares / squares.max(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 3), (20, 2), (4,), ()])
def test_pairs_and_gradients_are_of_the_same_rows(shape):
    sampler = _sampler(pair_rows=24, per_pair=6)
    generator = sampler.generator
    left = torch.randn(*shape, 9, 5, generator=generator, dtype=torch.float64)
    right = torch.randn(*shape, 5, 7, generator=generator, dtype=torch.float64)
    a, b, kept = sampler.weighted_pairs(left, right, left @ right, 1)
    assert a.shape[2] == 6
    assert len(a) <= 4
    cosine = torch.nn.functional.cosine_similarity(a @ b.mT, kept, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_samples_do_not_depend_on_how_many_images_fit(model, pictures, monkeypatch):
    """Where every row is kept, batches change the order of the rows and nothing else."""
    whole = _collect(model, pictures, own_label)
    monkeypatch.setattr(calibration_images, "BACKWARD_MEMORY", 1)
    single = _collect(model, pictures, own_label)
    for name, sample in whole.items():
        assert sample.largest.keys() == single[name].largest.keys()
        for key, value in sample.largest.items():
            torch.testing.assert_close(single[name].largest[key], value, rtol=1e-5, atol=1e-6)
    a, b = (s["blocks.1.mlp.fc1"] for s in (whole, single))
    torch.testing.assert_close(a.operands[1], b.operands[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-3, atol=1e-4)


def test_inference_mode_changes_nothing(pictures, small_models):
    """A method has gradients on tensors of its own, wherever it is called."""

    def logits():
        model = ql.load_model(small_models["plain"], input_size=(3, 32, 32))
        return ql.quantize(model, pictures, method="ptq4vit", bits="W4A4", candidates=10, rounds=1)(pictures)

    with torch.inference_mode():
        found = logits()
    assert torch.equal(found, logits())


# -- the sample of rows -----------------------------------------------------------------------------------------------
def test_sampled_rows_estimate_the_sum():
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(300, generator=generator) ** 4
    importance[17] = 50.0
    terms = importance * (0.5 + torch.rand(300, generator=generator))
    totals, single = [], []
    for _ in range(300):
        index, weight = sample_rows(importance, 30, generator)
        assert len(index.unique()) == 30
        assert 17 in index, "what dominates the sum is always there"
        totals.append(float((terms[index] * weight).sum()))
        plain = torch.randperm(300, generator=generator)[:30]
        single.append(float(terms[plain].sum() * 10))
    totals, single = torch.tensor(totals), torch.tensor(single)
    assert float(totals.mean()) == pytest.approx(float(terms.sum()), rel=0.02)
    assert float(totals.std()) < 0.2 * float(single.std())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-30])
def test_rows_without_importance_are_drawn_evenly(value):
    index, weight = sample_rows(torch.full((2, 10), value), 5, torch.Generator().manual_seed(0))
    assert index.shape == weight.shape == (2, 5)
    assert all(len(row.unique()) == 5 for row in index)
    torch.testing.assert_close(weight, torch.full((2, 5), 2.0))


# -- the search -------------------------------------------------------------------------------------------------------
def _grid(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (x / step).round().clamp(-4, 3) * step


def _sides(groups) -> tuple[Side, Side, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (5, 2) if groups == HEADS else ()
    a = torch.randn(*shape, 12, 8, generator=generator, dtype=torch.float64) ** 3
    b = torch.randn(*shape, 9, 8, generator=generator, dtype=torch.float64) ** 3
    gradient = torch.randn(*shape, 12, 9, generator=generator, dtype=torch.float64) ** 3
    count = {None: 1, HEADS: 2}.get(groups, 3) if not isinstance(groups, torch.Tensor) else 3
    steps = torch.linspace(0.05, 3, 40, dtype=torch.float64)[:, None, None].expand(-1, count, 1)
    own = Side(a, _grid, steps, steps[30], groups)
    other = steps[:, :1]
    return own, Side(b, _grid, other, other[20]), gradient


@pytest.mark.parametrize("groups", [None, HEADS, torch.arange(3).repeat_interleave(4)], ids=["tensor", "heads", "rows"])
def test_search_is_brute_force(groups):
    a, b, gradient = _sides(groups)
    found = search(a, b, gradient)
    expected, fixed = a.values @ b.values.mT, b.quantized().mT
    for group in range(a.current.shape[0]):
        if groups is None:
            part = (...,)
        elif groups == HEADS if isinstance(groups, str) else False:
            part = (slice(None), group)
        else:
            part = (groups == group,)
        losses = []
        for step in a.candidates[:, group, 0]:
            error = (_grid(a.values, step) @ fixed - expected) * gradient
            losses.append(float(error[part].square().sum()))
        best = min(range(len(losses)), key=losses.__getitem__)
        assert int(found.place[group]) == best
        assert float(found.current[group, 0]) == float(a.candidates[best, group, 0])


def _weighted_error(a, b, gradient) -> float:
    """Σ (g ∘ (Â·B̂ᵀ − A·Bᵀ))² with the current parameters."""
    error = a.quantized() @ b.quantized().mT - a.values @ b.values.mT
    return float((error if gradient is None else error * gradient).double().square().sum())


def test_weights_change_what_is_chosen():
    a, b, gradient = _sides(None)
    guided, plain = search(a, b, gradient), search(a, b, None)
    assert _weighted_error(guided, b, gradient) < _weighted_error(plain, b, gradient)
    assert _weighted_error(plain, b, None) < _weighted_error(guided, b, None)


def test_rounds_do_not_lose():
    a, b, gradient = _sides(None)
    errors = [_weighted_error(*alternate(a, b, gradient, rounds), gradient) for rounds in (1, 2, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < _weighted_error(a, b, gradient)


def test_few_candidates_at_a_time_are_as_good_as_all(monkeypatch):
    from quantlens.calibration.ranges import guided

    a, b, gradient = _sides(None)
    together = search(a, b, gradient)
    monkeypatch.setattr(guided, "TOGETHER", 1)
    assert torch.equal(search(a, b, gradient).current, together.current)


# -- formats ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gelu_steps(bits):
    positive = torch.tensor([0.001, 0.02, 0.3, 7.0])
    for aligned in (True, False):
        negative, given = gelu_steps(positive, bits, aligned=aligned)[:, 0].T
        covered = negative * 2 ** (bits - 1)
        if aligned:
            assert torch.equal(given, positive.repeat_interleave(2))
            shift = torch.log2(given / negative)
            assert torch.equal(shift, shift.round())
            assert bool((covered[0::2] >= GELU_MINIMUM * 0.9999).all())
            assert bool((covered[0::2] < GELU_MINIMUM * 2.0001).all())
            assert torch.equal(covered[1::2] * 2, covered[0::2])
        else:
            torch.testing.assert_close(covered, torch.full_like(covered, GELU_MINIMUM))


def test_formats_and_granularity(architecture, loaded, pictures):
    """Twin formats behind every softmax and GELU, heads of their own for q, k and v; everything else symmetric."""
    model = loaded[architecture]
    qmodel = ql.quantize(model, pictures, method="ptq4-vit", bits="W4A5", candidates=10, rounds=1)
    found = qmodel.plan.quantizers
    sites = qmodel.graph.sites
    signs = [k for k, q in found.items() if q.kind == "twin" and q.split == "sign"]
    assert len(signs) == len(sites.of_kind("gelu"))
    assert all(k.endswith(".input") and found[k].shift is not None and found[k].bits == 5 for k in signs)
    for site in sites.of_kind("probs"):
        assert found[f"{site.name}.output"].split == "magnitude"
    for site, name in [(s, n) for s in sites.of_kind("scores", "context") for n in ("q", "k", "v") if n in s.edges]:
        quantizer = found[f"{site.name}.{name}"]
        heads = site.edges[name].value.meta["shape"][-3]
        assert (quantizer.granularity, quantizer.axis, len(quantizer.scale)) == ("head", -3, heads)
    assert all(q.symmetric for q in found.values() if q.kind == "uniform")
    fused = fused_projections(qmodel.graph)
    assert len(fused) == (0 if architecture == "plain" else len(sites.of_kind("probs")))
    for site in sites.of_kind("linear", "conv"):
        scale = found[f"{site.name}.weight"].scale
        if site.name in fused:
            assert len(scale.reshape(3, -1).unique(dim=1)[0]) == 1, "one scale each for queries, keys and values"
        else:
            assert scale.dim() == (1 if site.kind == "conv" else 0)


def test_options_change_what_they_name(model, pictures):
    def formats(**options):
        quantizers = ql.quantize(
            model, pictures, method="ptq4vit", bits="W4A4", candidates=20, **options
        ).plan.quantizers
        kinds = {k: getattr(q, "split", q.kind) for k, q in quantizers.items()}
        return kinds["blocks.0.attn.probs.output"], kinds["blocks.0.mlp.fc2.input"], quantizers

    assert formats()[:2] == ("magnitude", "sign")
    plan = formats(variant="paper")[2]
    assert float(plan["blocks.0.mlp.fc2.input"].steps[0]) == pytest.approx(GELU_MINIMUM / 8)
    assert "patch_embed.proj.input" not in plan, "the image stays in float"
    weight = formats(weight_granularity="channel")[2]["blocks.0.mlp.fc2.weight"]
    assert (weight.granularity, weight.axis) == ("channel", 0)


def test_saved_and_read_back(model, pictures, tmp_path):
    qmodel = ql.quantize(model, pictures, method="ptq4vit", bits="W3A2", candidates=20)
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), qmodel(pictures))


@pytest.mark.parametrize("how", ["ours", "paper"])
def test_two_bits_and_dead_layers_are_finite(how, small_models, pictures):
    import copy

    network = copy.deepcopy(small_models["vit"])
    network.blocks[0].mlp.fc1.weight.data.zero_()
    network.blocks[1].attn.proj.weight.data.zero_()
    model = ql.load_model(network, input_size=(3, 32, 32))
    logits = ql.quantize(model, pictures, method="ptq4vit", bits="W2A2", variant=how, candidates=20)(pictures)
    assert bool(torch.isfinite(logits).all())
