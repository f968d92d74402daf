from __future__ import annotations

import copy

import torch

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.quantizers import float_model
from quantlens.reconstruction.massive import find_massive


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
    assert not any(str(n.target) == "aten.index_select.default" for n in split.graph.fx.nodes), "slices, no gather"
    assert "channel 9 of blocks.1.mlp.fc2" in split.plan.rewrites[0]
    assert split.plan.quantizers["blocks.1.mlp.fc2.massive.input"].bits == 5
    split.save(tmp_path / "q.safetensors")
    assert torch.equal(ql.load(tmp_path / "q.safetensors")(pictures), split(pictures))
