from __future__ import annotations

import pytest
import torch

import quantlens as ql


@pytest.fixture(scope="module")
def model(loaded):
    return loaded["vit"]


def test_weights_alone_change(model, pictures):
    """Activations keep repq-vit's quantizers; the paper's order and judgement give other codes."""
    ours, paper = (
        ql.quantize(model, pictures, method="erq", bits="W3A3", variant=how, patch_bits=8) for how in ("ours", "paper")
    )
    repq = ql.quantize(model, pictures, method="repq-vit", bits="W3A3")
    for key, quantizer in repq.plan.quantizers.items():
        if not key.endswith(".weight"):
            for one in (ours, paper):
                assert all(
                    torch.equal(one.plan.quantizers[key].tensors()[n], t) for n, t in quantizer.tensors().items()
                )
    assert not torch.equal(ours(pictures), paper(pictures))
    for edge, quantizer in ours.weight_edges():
        assert torch.equal(paper.plan.quantizers[edge.key].scale, quantizer.scale), edge.key


def test_the_bias_takes_up_the_mean(model, pictures):
    """Mean outputs of the first layer behind the image are the float network's."""
    qmodel = ql.quantize(model, pictures, method="erq", bits="W3A3", patch_bits=3)
    twin, key = qmodel.graph, "patch_embed.proj"
    image = qmodel.plan.quantizers[f"{key}.input"](pictures)
    got = torch.nn.functional.conv2d(image, twin.tensor(f"{key}.weight"), twin.tensor(f"{key}.bias"), stride=8)
    expected = model.module.patch_embed.proj(pictures)
    torch.testing.assert_close(got.mean((0, 2, 3)), expected.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_its_weights_are_on_the_grid(model, pictures):
    for how in ("ours", "paper"):
        qmodel = ql.quantize(model, pictures, method="erq", bits="W4A8", variant=how)
        for edge, quantizer in qmodel.weight_edges():
            weight = qmodel.graph.tensor(str(edge.value.target))
            torch.testing.assert_close(quantizer(weight), weight, rtol=1e-6, atol=1e-7)


def test_saved_and_read_back_the_logits_are_equal(model, pictures, tmp_path):
    qmodel = ql.quantize(model, pictures, method="erq", bits="W4A4")
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(pictures), qmodel(pictures))
