from __future__ import annotations

import pytest
import torch

import quantlens as ql


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


def test_each_step_changes_weights_alone(model, pictures):
    """The weight step other codes of the same scales, the activation step the scales too; activations keep repq-vit's
    quantizers."""
    none, weights, inputs, both = (
        ql.quantize(model, pictures, method="erq", bits="W3A3", weight_error=how, activation_error=other)
        for how, other in (("none", "none"), ("halves", "none"), ("none", "ridge"), ("halves", "ridge"))
    )
    repq = ql.quantize(model, pictures, method="repq-vit", bits="W3A3")
    for key, quantizer in repq.plan.quantizers.items():
        if not key.endswith(".weight"):
            for one in (none, weights, inputs, both):
                assert all(
                    torch.equal(one.plan.quantizers[key].tensors()[n], t) for n, t in quantizer.tensors().items()
                )
    for one, start, same in ((weights, none, True), (both, inputs, True), (inputs, none, False)):
        for edge, quantizer in start.weight_edges():
            name = str(edge.value.target)
            assert torch.equal(one.plan.quantizers[edge.key].scale, quantizer.scale) is same, name
            assert not torch.equal(one.graph.tensor(name), start.graph.tensor(name)), name


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


def test_saved_and_read_back_the_logits_are_equal(model, pictures, tmp_path):
    qmodel = ql.quantize(model, pictures, method="erq", bits="W4A4")
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), qmodel(pictures))
