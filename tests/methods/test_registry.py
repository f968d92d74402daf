"""What the registry says of every method: at most eight options, each described; its departures, which variant=paper
undoes; all of it as JSON. And keys of cells, which stay what they were."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import quantlens as ql
from quantlens.formats import IntegerLayerNorm, LogIntSoftmax
from quantlens.methods import registry
from quantlens.methods._former_options import former_options
from quantlens.methods.base import SHARED_OPTIONS
from quantlens.studies.backend import Backend
from quantlens.studies.config import MethodSpec

METHODS = registry.available()
DEPARTING = sorted(name for name, info in METHODS.items() if info.departures)
QUICK = {
    **{name: {"iterations": 2} for name in ("qdrop", "fima-q", "i-and-s-vit")},
    "aphq-vit": {"iterations": 2, "mlp_iterations": 2},
    **{name: {"candidates": 10, "rounds": 1} for name in ("ptq4vit", "vt-ptq", "easyquant")},
    "adalog": {"rounds": 1, "steps": 1, "candidates": 16},
    "bit-split": {"rounds": 3},
}
FORMER = {
    "adalog": "b11e01ed2074",
    "aocq": "b620a375b96a",
    "aphq-vit": "bb0ff5e57d1a",
    "base-ptq": "4282af076ce3",
    "bit-split": "9f1585ef829c",
    "easyquant": "4aee1ed1fcb0",
    "erq": "2c6cbd49ff10",
    "fima-q": "ff1b7dc09d67",
    "fq-ptq": "a82dfc9ed806",
    "gptq": "4a41ecc6ae97",
    "i-and-s-vit": "8889f5d2bb2f",
    "minmax": "510dee162aaa",
    "percentile": "d2dc3129fd7d",
    "ptq4vit": "01ded8d4dd41",
    "qdrop": "b2a726ae0ce3",
    "quantlens-best": "76ad4190b58f",
    "quantlens-fast": "e481b0797f17",
    "repq-vit": "5123142a1652",
    "vt-ptq": "51dfa1d292a9",
}
"""Digests of the default options as keys of cells had them before options became arguments, departures or constants."""


@pytest.mark.parametrize("name", METHODS)
def test_at_most_eight_options_each_described(name):
    info = METHODS[name]
    assert len(info.options) <= 8
    assert not info.options.keys() & SHARED_OPTIONS.keys()
    assert info.arguments.keys() <= SHARED_OPTIONS.keys()
    for key, option in {**info.options, **info.shared}.items():
        assert option.help, key
        assert option.type in ("bool", "int", "float", "str"), key
        assert option.choices is None or option.default in option.choices, key


@pytest.mark.parametrize("name", METHODS)
def test_a_variant_where_there_are_departures(name):
    info = METHODS[name]
    assert ("variant" in info.options) is bool(info.departures)
    assert info.departures or info.readings or info.venue == "quantlens"
    if not info.departures:
        return
    assert info.options["variant"].default == "ours"
    assert f"default is ours, {info.because}" in info.options["variant"].help
    method = registry.get(name)
    settings = {v: method.settings({"variant": v}) for v in ("ours", "paper")}
    for departure in info.departures:
        assert departure.what
        assert departure.ours != departure.paper
        assert settings["ours"][departure.setting] == departure.ours
        assert settings["paper"][departure.setting] == departure.paper
        if departure.setting in method.options({}):
            assert method.options({"variant": "paper"})[departure.setting] == departure.paper
            assert method.options({"variant": "ours"})[departure.setting] == departure.ours


@pytest.mark.parametrize("name", DEPARTING)
def test_the_papers_form_differs(name, loaded, pictures):
    ours, paper = (
        ql.quantize(loaded["vit"], pictures, name, "W4A4", variant=variant, **QUICK.get(name, {}))
        for variant in ("ours", "paper")
    )
    assert paper.options["variant"] == "paper"
    assert bool(torch.isfinite(paper(pictures)).all())
    assert not torch.equal(ours(pictures), paper(pictures))


def test_the_forms_that_were_compared_with_the_authors_code(loaded, pictures):
    """PTQ4ViT without floor, with free GELU steps, the image in float, one round; FQ-ViT 8/8/4."""
    method = registry.get("ptq4vit")
    options = method.options({"variant": "paper", "rounds": 1})
    assert (options["patch_bits"], options["rounds"]) == (32, 1)
    assert method.settings(options) == {"patch_bits": 32, "floor": 0.0, "aligned_steps": False}
    plan = ql.quantize(loaded["vit"], pictures, "fq-ptq", "W8A8", variant="paper", softmax_bits=4).plan
    softmax = plan.operators["blocks.0.attn.probs"]
    assert isinstance(softmax, LogIntSoftmax)
    assert softmax.output.bits == 4
    assert isinstance(plan.operators["blocks.0.norm1"], IntegerLayerNorm)


def test_what_is_given_goes_before_the_variant():
    options = registry.get("qdrop").options({"variant": "paper", "iterations": 5, "head_bits": 4})
    assert (options["iterations"], options["head_bits"], options["batch_size"]) == (5, 4, 32)


def test_all_of_it_as_json():
    for name, info in METHODS.items():
        told = json.loads(json.dumps(info.to_dict()))
        assert told["name"] == name
        assert told["quantizes"] in ("partially", "fully")
        assert info.paper in told["citation"]
        assert [o["name"] for o in told["options"]] == list(info.options)
        assert [o["name"] for o in told["arguments"]] == list(SHARED_OPTIONS)
        assert all(o.keys() == {"name", "type", "default", "choices", "help"} for o in told["options"])
        assert all(d.keys() == {"setting", "ours", "paper", "what"} for d in told["departures"])


# -- what every method takes -------------------------------------------------------------------------------------------
def test_arguments_of_quantize(loaded, pictures):
    q = ql.quantize(loaded["vit"], pictures, "minmax", "W4A4", head_bits=8, patch_bits=32, outlier_channels="split")
    assert q.options == {
        "block_scale": "absmax",
        "patch_bits": 32,
        "head_bits": 8,
        "outlier_channels": "split",
        "image": "range",
        "target": None,
    }
    assert q.plan.quantizers["head.weight"].bits == 8
    assert registry.get("aocq").options({"outlier_channels": None})["outlier_channels"] == "split"
    with pytest.warns(DeprecationWarning, match="massive_channels of minmax is outlier_channels now"):
        old = ql.quantize(loaded["vit"], pictures, "minmax", "W4A4", massive_channels="split")
    assert old.options["outlier_channels"] == "split"


def test_the_old_place_in_a_study_warns():
    with pytest.warns(DeprecationWarning, match="is no option of a method any more"):
        old = MethodSpec.model_validate({"name": "minmax", "options": {"head_bits": 8, "massive_channels": "split"}})
    new = MethodSpec.model_validate({"name": "minmax", "head_bits": 8, "outlier_channels": "split"})
    assert old == new
    assert new.settings() == {"head_bits": 8, "outlier_channels": "split"}
    assert new.options == {}


@pytest.mark.parametrize("name", FORMER)
def test_keys_of_cells_spell_options_as_they_were(name):
    """So that a store of an earlier release runs no finished cell again."""
    choice = Backend().method(name, {})
    spelled = json.dumps(choice.spelled(), sort_keys=True)
    assert hashlib.sha256(spelled.encode()).hexdigest()[:12] == FORMER[name], spelled
    if METHODS[name].departures:
        assert Backend().method(name, {"variant": "paper"}).spelled()["variant"] == "paper"
    split = former_options(name, registry.get(name).options({"outlier_channels": "split"}))
    assert split["massive_channels"] == "split"
