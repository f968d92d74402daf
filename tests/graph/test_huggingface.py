"""Models of Hugging Face as they come: fused attention with masks, keyword inputs, what they return."""

from __future__ import annotations

import pytest
import torch
from hf_models import CONFIGURATIONS, redrawn, small
from torch import Tensor
from torch.utils import _pytree as pytree

from quantlens.errors import CaptureError, QuantlensError
from quantlens.graph import capture, op_name

transformers = pytest.importorskip("transformers")
QUICK = ("vit-body", "clip-projected")


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CONFIGURATIONS]
)
def test_it_is_captured_and_returns_what_it_returned(name):
    model, images = small(name)
    graph = capture(model, images[:1])
    for batch in (1, 3):
        expected, found = model(images[:batch]), graph(pixel_values=images[:batch])
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        for a, b in zip(tensors(found), tensors(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    names = [op_name(node) for node in graph.fx.nodes]
    assert "aten.scaled_dot_product_attention.default" not in names
    assert not {"aten.full.default", "aten.arange.start_step", "aten.ge.Tensor"} & set(names)  # no mask that allows all


@pytest.mark.slow
def test_what_is_measured_is_the_logits_or_the_pooled_output():
    for name, width in (("vit-body", 32), ("clip-projected", 16), ("deit-distilled", 2)):
        model, images = small(name)
        assert capture(model, images).output.meta["shape"] == (None, width), name


def test_hidden_states_and_several_inputs():
    model = redrawn(transformers.ViTMAEModel(transformers.ViTMAEConfig(**CONFIGURATIONS["vit"][2])))
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    with pytest.raises(CaptureError, match=r"embeddings draws random numbers"):
        capture(model, images)
    graph = capture(model, ((images,), {"noise": noise, "output_hidden_states": True}))
    expected = model(images, noise=noise, output_hidden_states=True)
    found = graph(images, noise=noise, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(QuantlensError, match="also takes noise"):
        graph(images)
    with pytest.raises(QuantlensError, match="interpolate_pos_encoding=True was not given when"):
        graph(images, noise=noise, interpolate_pos_encoding=True)
