from __future__ import annotations

import pytest
import torch

import quantlens as ql
from quantlens.errors import QuantlensError


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


def _divergence(digits, **settings) -> float:
    """KL of the float model's class probabilities from the quantized one's, on images not calibrated on."""
    qmodel = ql.quantize(digits["model"], digits["calibration"], **settings)
    with torch.inference_mode():
        expected = digits["expected"].double().log_softmax(-1)
        got = qmodel(digits["images"]).double().log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def test_it_beats_its_ablations_and_repq(digits):
    """The paper's Table 4 in small: each of the two steps helps, both together most."""
    found = {
        name: _divergence(digits, method="erq", bits="W3A3", **options)
        for name, options in {
            "both": {},
            "activations": {"weight_error": "none"},
            "weights": {"activation_error": "none"},
            "none": {"weight_error": "none", "activation_error": "none"},
        }.items()
    }
    found["repq"] = _divergence(digits, method="repq-vit", bits="W3A3")
    assert found["both"] < found["activations"] < found["none"], found
    assert found["both"] < found["weights"] < found["none"], found
    assert found["both"] < 0.7 * found["repq"], found


def test_the_bias_takes_up_the_mean(model, pictures):
    """Mean outputs of the first layer behind the image are the float network's."""
    qmodel = ql.quantize(model, pictures, method="erq", bits="W3A3", patch_bits=3)
    twin, key = qmodel.graph, "patch_embed.proj"
    image = qmodel.plan.quantizers[f"{key}.input"](pictures)
    got = torch.nn.functional.conv2d(image, twin.tensor(f"{key}.weight"), twin.tensor(f"{key}.bias"), stride=8)
    expected = model.module.patch_embed.proj(pictures)
    torch.testing.assert_close(got.mean((0, 2, 3)), expected.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_its_weights_are_on_the_grid(model, pictures):
    for how in ("halves", "columns", "none"):
        qmodel = ql.quantize(model, pictures, method="erq", bits="W4A8", weight_error=how)
        for edge, quantizer in qmodel.weight_edges():
            weight = qmodel.graph.tensor(str(edge.value.target))
            torch.testing.assert_close(quantizer(weight), weight, rtol=1e-6, atol=1e-7)


def test_float_activations_leave_nothing_to_the_first_step(model, pictures):
    a, b = (ql.quantize(model, pictures, method="erq", bits="W4A32", activation_error=how) for how in ("ridge", "bias"))
    torch.testing.assert_close(a(pictures), b(pictures), rtol=1e-3, atol=1e-3)


def test_more_flips_change_weights(model, pictures):
    a, b = (ql.quantize(model, pictures, method="erq", bits="W3A8", flips=n) for n in (0, 100))
    assert not torch.equal(a(pictures), b(pictures))


@pytest.mark.parametrize("options", [{"activation_damping": 0.0}, {"weight_damping": -1.0}, {"flips": -1}])
def test_wrong_options_are_named(options, model, pictures):
    with pytest.raises(QuantlensError, match="damping"):
        ql.quantize(model, pictures, method="erq", bits="W4A8", **options)


def test_saved_and_read_back_the_logits_are_equal(model, pictures, tmp_path):
    qmodel = ql.quantize(model, pictures, method="erq", bits="W4A4")
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), qmodel(pictures))
