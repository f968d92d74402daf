from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.quantizers import float_model
from quantlens.reconstruction.massive import channel_groups, find_massive, split_groups


def _with_massive_channel(network, channel: int = 9):
    network = copy.deepcopy(network)
    block = network.blocks[1].mlp
    block.fc1.bias.data[channel] = 600.0
    block.fc2.weight.data[:, channel] *= 0.005
    return ql.load_model(network, input_size=(3, 32, 32))


def _kl(model, qmodel, images) -> float:
    expected, got = model(images).log_softmax(1), qmodel(images).log_softmax(1)
    return float((expected.exp() * (expected - got)).sum(1).mean())


def test_only_the_massive_channel_is_found(small_models, pictures):
    model = _with_massive_channel(small_models["vit"])
    found = find_massive(float_model(model).graph, Calibration.of(pictures, model.preprocess))
    assert {site.name: channels.tolist() for site, channels in found.items()} == {"blocks.1.mlp.fc2": [9]}


def test_ordinary_models_are_left_alone(architecture, network, pictures):
    model = ql.load_model(network, input_size=(3, 32, 32))
    assert find_massive(float_model(model).graph, Calibration.of(pictures, model.preprocess)) == {}


def test_splitting_restores_the_other_channels(small_models, pictures, tmp_path):
    model = _with_massive_channel(small_models["vit"])
    kept = ql.quantize(model, pictures, method="minmax", bits="W8A5")
    split = ql.quantize(model, pictures, method="minmax", bits="W8A5", massive_channels="split")
    assert _kl(model, split, pictures) < 0.5 * _kl(model, kept, pictures)
    torch.testing.assert_close(split.graph(pictures), model(pictures), rtol=1e-3, atol=1e-3)
    assert "channel 9 of blocks.1.mlp.fc2" in split.plan.rewrites[0]
    assert split.plan.quantizers["blocks.1.mlp.fc2.massive.input"].bits == 5
    split.save(tmp_path / "q.safetensors")
    assert torch.equal(ql.load(tmp_path / "q.safetensors")(pictures), split(pictures))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=2, max_size=7), st.integers(1, 3))
def test_groups_are_the_best_of_all_cuts(channels, groups):
    spread, energy = (torch.tensor(v) for v in zip(*channels, strict=True))

    def error(parts) -> float:
        return sum(float(spread[p].max() ** 2 * energy[p].sum()) for p in parts)

    found = channel_groups(spread, energy, groups, 0.0)
    assert sorted(torch.cat(found).tolist()) == list(range(len(spread)))
    labellings = itertools.product(range(groups), repeat=len(spread))
    best = min(error([torch.tensor([c == g for c in lab]) for g in set(lab)]) for lab in labellings)
    assert error(found) == pytest.approx(best, rel=1e-4)


def test_even_channels_make_one_group():
    assert len(channel_groups(torch.ones(8), torch.ones(8), 3, 1.0)) == 1


def test_groups_of_channels_lower_the_error(digits, tmp_path):
    """Exact as a rewrite, and steps that fit each group keep more of a trained model than one step for all."""
    model, images, calibration = digits["model"], digits["images"], digits["calibration"]
    graph = float_model(model).graph.clone()
    done = split_groups(graph, Calibration.of(calibration, model.preprocess), groups=3, gain=0.0)
    assert len(done) == 6
    assert not any(str(n.target) == "aten.index_select.default" for n in graph.fx.nodes)
    torch.testing.assert_close(graph(images), model(images), rtol=1e-3, atol=1e-3)
    bits = {"default": "W32A32", **{f"blocks.{n}.mlp.fc2": "W32A4" for n in range(6)}}
    made = {
        choice: ql.quantize(model, calibration, method="minmax", bits=bits, massive_channels=choice)
        for choice in ("keep", "groups")
    }
    assert _kl(model, made["groups"], images) < 0.8 * _kl(model, made["keep"], images)
    made["groups"].save(tmp_path / "q.safetensors")
    assert torch.equal(ql.load(tmp_path / "q.safetensors")(images), made["groups"](images))
