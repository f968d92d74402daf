from __future__ import annotations

import copy

import pytest
import torch

import quantlens as ql
from quantlens.attention.maps import class_activation, default_layer, gradient_rollout
from quantlens.attention.recording import Lens
from quantlens.errors import QuantlensError, UnknownNameError


def _by_hooks(network, layer, images, target):
    """Grad-CAM and HiResCAM computed with hooks on the module, apart from the graph."""
    kept = {}

    def keep(module, args, out):
        out.retain_grad()
        kept["out"] = out

    handle = layer.register_forward_hook(keep)
    logits = network(images.clone().requires_grad_(True))
    chosen = logits.max(1).values if target is None else logits[:, target]
    chosen.sum().backward()
    handle.remove()
    tokens, gradient = kept["out"][:, 1:].detach(), kept["out"].grad[:, 1:]
    cam = (gradient.mean(1, keepdim=True) * tokens).sum(-1).relu()
    return cam.view(-1, 4, 4), (gradient * tokens).sum(-1).relu().view(-1, 4, 4)


@pytest.mark.parametrize("target", [None, 3])
def test_maps_are_those_of_hooks(target, loaded, small_models, pictures):
    network = copy.deepcopy(small_models["vit"])
    model = loaded["vit"]
    assert default_layer(model) == "blocks.1.norm1.output"
    cam, hires = _by_hooks(network, network.blocks[1].norm1, pictures, target)
    torch.testing.assert_close(class_activation(model, pictures, target=target), cam, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        class_activation(model, pictures, target=target, kind="hires-cam"), hires, rtol=1e-3, atol=1e-5
    )
    early, _ = _by_hooks(network, network.blocks[0].norm2, pictures, target)
    found = class_activation(model, pictures, target=target, layer="blocks.0.norm2")
    torch.testing.assert_close(found, early, rtol=1e-3, atol=1e-5)


def test_the_library_agrees(loaded, small_models, pictures):
    """pytorch-grad-cam, where it is installed, gives the same map up to its scaling per image."""
    library = pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = copy.deepcopy(small_models["vit"]).requires_grad_(True)
    cam = library.GradCAM(
        network,
        [network.blocks[1].norm1],
        reshape_transform=lambda t: t[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2),
    )
    theirs = torch.from_numpy(cam(pictures, [ClassifierOutputTarget(3)] * len(pictures)))
    ours = class_activation(loaded["vit"], pictures, target=3)
    ours = torch.nn.functional.interpolate(ours[:, None], 32, mode="bilinear")[:, 0]
    a, b = theirs.flatten(1), ours.flatten(1)
    assert float(torch.nn.functional.cosine_similarity(a - a.mean(1, True), b - b.mean(1, True)).min()) > 0.95


def test_every_architecture_and_precision(architecture, loaded, pictures):
    model = loaded[architecture]
    full = class_activation(model, pictures)
    quantized = class_activation(ql.quantize(model, pictures, method="minmax", bits="W8A8"), pictures)
    assert full.shape == quantized.shape
    assert full.dim() == 3
    assert bool((full >= 0).all())
    assert bool(torch.isfinite(quantized).all())
    assert float(quantized.amax()) > 0, "gradients pass quantizers straight through"


def test_gradient_rollout(loaded, pictures):
    model = loaded["deit-distilled"]
    maps = gradient_rollout(model, pictures, target=2)
    assert maps.shape == (8, Lens(model).layout.patches)
    assert float(maps.amax()) <= 1 + 1e-6
    assert not torch.allclose(maps, gradient_rollout(model, pictures, target=5))


def test_wrong_targets_and_layers_are_named(loaded, pictures):
    model = loaded["vit"]
    with pytest.raises(QuantlensError, match="class 10"):
        class_activation(model, pictures, target=10)
    with pytest.raises(UnknownNameError, match=r"blocks\.1"):
        class_activation(model, pictures, layer="blocks.1.norm9")
    with pytest.raises(UnknownNameError, match="hires-cam"):
        class_activation(model, pictures, kind="hirescam2")
    with pytest.raises(QuantlensError, match="no tokens"):
        class_activation(model, pictures, layer="head")
