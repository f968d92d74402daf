from __future__ import annotations

import copy

import pytest
import torch

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.calibration.measured_transforms import find_outlier_channels
from quantlens.qmodel import float_model


def _with_massive_channel(network, channel: int = 9):
    network = copy.deepcopy(network)
    block = network.blocks[1].mlp
    block.fc1.bias.data[channel] = 600.0
    block.fc2.weight.data[:, channel] *= 0.005
    return ql.load_model(network, input_size=(3, 32, 32))


def test_only_the_massive_channel_is_found(small_models, pictures):
    model = _with_massive_channel(small_models["vit"])
    found = find_outlier_channels(float_model(model).graph, Calibration.of(pictures, model.preprocess))
    assert {name: channels.tolist() for name, channels in found.items()} == {"blocks.1.mlp.fc2": [9]}


def test_ordinary_models_are_left_alone(architecture, loaded, pictures):
    model = loaded[architecture]
    assert find_outlier_channels(float_model(model).graph, Calibration.of(pictures, model.preprocess)) == {}


def test_splitting_restores_the_other_channels(small_models, pictures, tmp_path):
    model = _with_massive_channel(small_models["vit"])
    kept = ql.quantize(model, pictures, method="minmax", bits="W8A5")
    split = ql.quantize(model, pictures, method="minmax", bits="W8A5", outlier_channels="split")
    steps = [float(q.plan.quantizers["blocks.1.mlp.fc2.input"].scale) for q in (split, kept)]
    assert steps[0] < 0.1 * steps[1], "the other channels have a range without the massive one"
    torch.testing.assert_close(split.graph(pictures), model(pictures), rtol=1e-3, atol=1e-3)
    for part, channels in (("", 127), (".massive", 1)):
        held = split.graph.tensor(f"blocks.1.mlp.fc2{part}_channels")
        assert len(held) == channels
        assert torch.equal(held, torch.arange(int(held[0]), int(held[0]) + channels)), (
            "contiguous: slices when exported"
        )
    assert "channel 9 of blocks.1.mlp.fc2" in split.plan.rewrites[0]
    assert split.plan.quantizers["blocks.1.mlp.fc2.massive.input"].bits == 5
    split.save(tmp_path / "q.safetensors")
    assert torch.equal(ql.load(tmp_path / "q.safetensors")(pictures), split(pictures))


@pytest.mark.parametrize("method", ["fq-ptq", "aocq"])
def test_what_quantizes_everything_gives_each_part_a_range_of_its_own(small_models, pictures, method):
    model = _with_massive_channel(small_models["vit"])
    options = {"scales": False, "rounding": False} if method == "aocq" else {}
    q = ql.quantize(model, pictures, method=method, bits="W8A8", outlier_channels="split", **options)
    plan = q.plan.quantizers
    assert "blocks.1.mlp.act.output" not in plan, "the parts are quantized where they are read"
    rest, massive = (plan[f"blocks.1.mlp.fc2{part}.input"] for part in ("", ".massive"))
    assert rest is not massive
    assert float(massive(torch.tensor(600.0))) > 500
    assert float(rest(torch.tensor(600.0))) < 100


def test_an_exported_part_is_a_slice(small_models, pictures, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
    model = _with_massive_channel(small_models["vit"])
    q = ql.quantize(model, pictures, method="minmax", bits="W8A8", target="openvino-cpu")
    kept = ql.quantize(model, pictures, method="minmax", bits="W8A8", target="openvino-cpu", outlier_channels="keep")
    counts = [
        [n.op_type for n in onnx.load(ql.export(x, tmp_path / f"{i}.onnx")).graph.node] for i, x in enumerate((q, kept))
    ]
    assert counts[0].count("Slice") == counts[1].count("Slice") + 2
    assert counts[0].count("Gather") == counts[1].count("Gather")
