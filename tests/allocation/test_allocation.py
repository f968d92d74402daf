from __future__ import annotations

import itertools
import json

import pytest
import torch

import quantlens as ql
from quantlens.allocation import Allocation, default_candidates, is_target, parse_target
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError


@pytest.fixture(scope="module")
def vit(loaded):
    return loaded["vit"]


@pytest.fixture(scope="module")
def chosen(vit, pictures):
    return ql.allocate(vit, pictures, "MP6", front=True)


# -- targets -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "width"), [("MP6", 6), ("mp8", 8), ("W6A6", 6), ("w10a10", 10), ("4", 4), (3, 3)])
def test_targets(text, width):
    assert parse_target(text) == width


@pytest.mark.parametrize("text", ["W6A8", "MP", "MP6A6", "6A6", "W6", "MP11", "MP1", "six", "FP32"])
def test_what_is_no_target(text):
    with pytest.raises(QuantlensError, match="target"):
        parse_target(text)


def test_candidates_are_the_paper_s():
    assert default_candidates(6) == (4, 5, 6, 7, 8)
    assert default_candidates(8) == (6, 7, 8, 9, 10)
    assert default_candidates(3) == (2, 3, 4, 5)
    assert default_candidates(10) == (8, 9, 10)
    assert [is_target(t) for t in ("MP6", "mp 6", "W6A6", None)] == [True, False, False, False]


# -- the choice --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cost", ["size", "bops"])
def test_no_choice_of_widths_is_better(cost, vit, pictures):
    """All 5⁴ choices, by their own sums."""
    found = ql.allocate(vit, pictures, "MP6", cost=cost)
    budget = found.cost_of(cost, 6)
    assert found.budget == budget
    assert found.total == found.cost_of(cost) <= budget
    fixed = found.fixed[cost]
    losses = [
        sum(g.sensitivity[b] for g, b in zip(found.groups, pick, strict=True))
        for pick in itertools.product(found.candidates, repeat=len(found.groups))
        if fixed + sum(getattr(g, cost)[b] for g, b in zip(found.groups, pick, strict=True)) <= budget
    ]
    assert found.loss == pytest.approx(min(losses))
    assert found.loss < found.loss_of(6) or all(g.bits == 6 for g in found.groups)


def test_the_front_holds_the_choice_and_beats_one_width_everywhere(chosen):
    costs, losses = [p.cost for p in chosen.front], [p.sensitivity for p in chosen.front]
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    assert (chosen.total, pytest.approx(chosen.loss)) in list(zip(costs, losses, strict=True))
    for width in chosen.candidates:
        below = [p.sensitivity for p in chosen.front if p.cost <= chosen.cost_of("size", width)]
        assert min(below) <= chosen.loss_of(width) * (1 + 1e-9)
    assert chosen.front[0].bits == (4, 4, 4, 4)
    assert chosen.front[-1].bits == (8, 8, 8, 8)


def test_a_larger_budget_is_used_and_a_smaller_one_refused(vit, pictures):
    small = ql.allocate(vit, pictures, "MP6", sensitivity="random")
    large = ql.allocate(vit, pictures, "MP6", sensitivity="random", budget=small.budget * 1.1)
    assert small.total < large.total <= small.budget * 1.1
    assert large.loss < small.loss
    assert large.name.startswith("MP6-0.0")
    with pytest.raises(QuantlensError, match="the least possible is"):
        ql.allocate(vit, pictures, sensitivity="random", budget=1000)


@pytest.mark.parametrize("sensitivity", ["nuclear-norm", "hessian", "kl", "random"])
def test_every_sensitivity_chooses(sensitivity, vit, pictures):
    options = {"probes": 1} if sensitivity == "hessian" else {}
    found = ql.allocate(vit, pictures, "W5A5", sensitivity=sensitivity, **options)
    assert found.candidates == (3, 4, 5, 6, 7)
    assert found.sensitivity == sensitivity
    assert all(g.sensitivity[3] > g.sensitivity[7] > 0 for g in found.groups)


def test_mistakes_are_told(vit, pictures):
    with pytest.raises(UnknownNameError, match="nuclear-norm"):
        ql.allocate(vit, pictures, sensitivity="nuclear")
    with pytest.raises(UnknownNameError, match="probes"):
        ql.allocate(vit, pictures, sensitivity="hessian", probe=3)
    labels = ql.load_model(vit.module, preprocess=vit.preprocess, task="multilabel")
    with pytest.raises(UnsupportedError, match=r"'kl' is of the softmax .* 'multilabel'; take nuclear-norm"):
        ql.allocate(labels, pictures, sensitivity="kl")
    with pytest.raises(UnknownNameError, match="cost"):
        ql.allocate(vit, pictures, cost="speed")
    with pytest.raises(QuantlensError, match="2 to 10 bits"):
        ql.allocate(vit, pictures, candidates=[1, 4])


# -- quantizing with it ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_every_architecture_gets_the_widths_it_was_allocated(architecture, loaded, pictures):
    model = loaded[architecture]
    allocation = ql.allocate(model, pictures, "MP6", sensitivity="random", seed=2)
    qmodel = ql.quantize(model, pictures, method="minmax", bits=allocation)
    sites, widths = qmodel.graph.sites, allocation.bits()
    grouped = {name: g.bits for g in allocation.groups for name in sites_of(qmodel.graph, g)}
    first = next(site for site in sites if site.kind == "conv").name
    assert len(set(grouped.values())) > 1
    for key, quantizer in qmodel.plan.quantizers.items():
        site = sites.edges[key].site
        expected = 8 if key == f"{first}.input" else grouped.get(site, 6)
        assert quantizer.bits == expected == (8 if key == f"{first}.input" else widths.of(site).weights), key
    uniform = ql.quantize(model, pictures, method="minmax", bits="W6A6")
    assert qmodel.size_bytes() <= uniform.size_bytes()
    assert bool(torch.isfinite(qmodel(pictures)).all())


def sites_of(graph, choice):
    from quantlens.allocation import find_groups

    return next(group.sites for group in find_groups(graph) if group.name == choice.name)


def test_mp6_is_the_nuclear_norm_s_allocation(vit, pictures, chosen, tmp_path):
    qmodel = ql.quantize(vit, pictures, method="minmax", bits="mp6")
    assert qmodel.bits == "MP6"
    assert qmodel.plan.info["widths"] == chosen.bits().to_mapping()
    kept = qmodel.plan.info["allocation"]
    assert [g["bits"] for g in kept["groups"]] == [g.bits for g in chosen.groups]
    assert kept["sensitivity"] == "nuclear-norm"
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), qmodel(pictures))
    assert again.plan.info["allocation"] == json.loads(json.dumps(kept))


def test_methods_share_an_allocation_on_the_same_images_alone(vit, pictures, monkeypatch):
    from quantlens import api

    made = []
    monkeypatch.setattr(api, "choose_widths", lambda *a, **k: made.append(a) or "stands for one")
    for images, seed in ((pictures, 11), (pictures, 11), (pictures, 12), (pictures[:4], 11)):
        assert api.allocation_of(vit, images, "MP5", seed) == "stands for one"
    assert len(made) == 3


def test_a_module_of_one_s_own(small_models, pictures):
    assert ql.quantize(small_models["plain"], pictures, method="minmax", bits="MP4").bits == "MP4"


# -- files -------------------------------------------------------------------------------------------------------------
def test_a_file_gives_back_what_was_saved(chosen, vit, pictures, tmp_path):
    path = chosen.save(tmp_path / "new" / "alloc.json")
    assert Allocation.load(path) == chosen
    by_file, by_value = (ql.quantize(vit, pictures, method="minmax", bits=b) for b in (str(path), chosen))
    assert torch.equal(by_file(pictures), by_value(pictures))


def test_a_file_of_another_model_is_refused(chosen, loaded, pictures, tmp_path):
    path = chosen.save(tmp_path / "alloc.json")
    with pytest.raises(QuantlensError, match=r"was made for vit .* not for deit3"):
        ql.quantize(loaded["deit3"], pictures, method="repq-vit", bits=path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "no allocation"),
        ('{"groups": []}', "format None"),
        ('{"format": 1, "groups": [{"name": 1}]}', "damaged"),
    ],
)
def test_files_that_are_no_allocation(text, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(QuantlensError, match=words):
        Allocation.load(path)
    with pytest.raises(QuantlensError, match="No such file"):
        Allocation.load(tmp_path / "none.json")


def test_same_seed_same_choice(vit, pictures):
    a, b = (ql.allocate(vit, pictures, sensitivity="hessian", probes=1, seed=4) for _ in range(2))
    assert a.bits() == b.bits()
    assert [g.sensitivity for g in a.groups] == [g.sensitivity for g in b.groups]


def test_a_quantized_model_remembers_the_front(vit, pictures):
    """Enough of it to draw: the ends, the uniform models and the choice, as plain data."""
    from quantlens.plots.points import front

    frontier = ql.quantize(vit, pictures, method="minmax", bits="MP6").plan.info["allocation"]["frontier"]
    whole = ql.allocate(vit, pictures, "MP6", front=True)
    assert frontier == json.loads(json.dumps(frontier))
    assert frontier["points"][0] == [whole.front[0].cost, whole.front[0].sensitivity]
    assert frontier["points"][-1] == [whole.front[-1].cost, whole.front[-1].sensitivity]
    assert frontier["chosen"] == [whole.total, whole.loss]
    assert frontier["chosen"] in whole.frontier()["points"]
    assert [6, whole.budget, whole.loss_of(6)] in frontier["uniform"]
    drawn = front(frontier, "front").rows
    assert [r["y"] for r in drawn if r["line"] == "Pareto front"] == [
        loss for _, loss in frontier["points"] if loss > 0
    ]
    assert any(r["said"].startswith("W6A6, ") for r in drawn)
