"""Rotations: exact, found wherever the graph proves them, and good for something."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from quantlens.calibration import Calibration
from quantlens.calibration.measured_transforms import channel_means
from quantlens.graph import graph_of
from quantlens.transforms import fold_layer_scale
from quantlens.transforms.rotation import (
    find_residuals,
    hadamard,
    mean_keeping,
    orthogonal,
    rotate_input,
    rotate_residual,
)

ROTATABLE = ("vit", "deit-distilled", "deit3", "torchvision")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [2, 3, 8, 192])
def test_the_rotation_commutes_with_layernorm(size):
    q = mean_keeping(size, _generator())
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(q @ torch.ones(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64))
    x = 3 + torch.randn(5, size, generator=_generator(1), dtype=torch.float64)
    torch.testing.assert_close(F.layer_norm(x @ q.T, (size,)), F.layer_norm(x, (size,)) @ q.T)
    other = orthogonal(size, _generator())
    torch.testing.assert_close(other @ other.T, torch.eye(size, dtype=torch.float64))
    assert not torch.equal(q, mean_keeping(size, _generator(2)))


def test_the_function_stays_when_the_residual_stream_is_rotated(loaded, architecture, pictures):

    model = loaded[architecture]
    graph = graph_of(model).clone()
    fold_layer_scale(graph)
    graph.invalidate()
    expected, residuals = graph(pictures), find_residuals(graph)
    assert bool(residuals) == (architecture in ROTATABLE)
    before = {name: t.clone() for name, t in graph.tensors().items()}
    for residual in residuals:
        rotate_residual(graph, residual, mean_keeping(residual.channels, _generator()))
        linears = [linear for group in residual.norms for linear in group.linears]
        for site in (*residual.layers, *linears):
            assert not torch.allclose(graph.tensor(site.weight), before[site.weight]), f"{site.name} is as it was"
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-4)


def test_a_stream_that_something_else_reads_is_left_alone(loaded, pictures):
    """One more reader of the residual stream, which would see rotated channels."""

    model = loaded["vit"]
    graph = graph_of(model).clone()
    stream = find_residuals(graph)[0].norms[0].norm.node.args[0]
    last = graph.output
    with graph.fx.inserting_after(last):
        probe = graph.fx.call_function(torch.ops.aten.relu.default, (stream,))
        probe.meta = dict(stream.meta)
    graph.invalidate()
    assert find_residuals(graph) == []


def test_massive_channels_of_a_stream_are_spread(loaded, pictures):
    """A LayerNorm that puts most of its output into two channels: rotated, no channel stands out."""

    model = loaded["vit"]
    graph = graph_of(model).clone()
    residual = find_residuals(graph)[0]
    group = residual.norms[0]
    gamma = str(group.norm.node.args[2].target)
    graph.set_tensor(gamma, torch.cat([torch.full((2,), 40.0), graph.tensor(gamma)[2:]]))
    expected = graph(pictures)
    rotate_residual(graph, residual, mean_keeping(residual.channels, _generator()))
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(graph.tensor(gamma), torch.ones(residual.channels)), "the scale went into the weights"


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_is_orthogonal_and_spreads_every_channel(size):
    matrix = hadamard(size, _generator())
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))
    assert size < 64 or float((matrix.T @ torch.ones(size, dtype=torch.float64)).abs().max()) < 0.6 * size**0.5
    with pytest.raises(ValueError, match="power of"):
        hadamard(size + 2 if size > 2 else 3, _generator())


def test_what_a_layer_reads_is_rotated_exactly(loaded, architecture, pictures):
    from quantlens.transforms.rotation import layers_after_activations, rotation_size

    graph = graph_of(loaded[architecture]).clone()
    expected, layers, names = graph(pictures), layers_after_activations(graph), [site.name for site in graph.sites]
    assert layers
    before = {site.name: graph.tensor(site.weight).clone() for site in layers}
    calibration = Calibration.of(pictures, loaded[architecture].preprocess)
    keys = [f"{site.name}.input" for site in layers]
    means = channel_means(graph, calibration, keys)
    for site, key in zip(layers, keys, strict=True):
        rotate_input(graph, site, hadamard(rotation_size(graph, site), _generator()), means[key])
    graph.invalidate()
    assert all(float(mean.abs().max()) < 1e-5 for mean in channel_means(graph, calibration, keys).values())
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-4)
    assert [site.name for site in graph.sites] == names, "the products are no sites"
    assert not any(torch.allclose(graph.tensor(site.weight), before[site.name]) for site in layers)
    made = [name for name in graph.tensors() if name.endswith("_rotation")]
    assert len(made) == len({rotation_size(graph, site) for site in layers}), "one constant per size"


def test_a_rotation_that_does_not_fit_gets_channels_of_zeros(loaded, pictures):
    from quantlens.transforms.rotation import layers_after_activations

    graph = graph_of(loaded["vit"]).clone()
    expected, layer = graph(pictures), layers_after_activations(graph)[0]
    width = graph.tensor(layer.weight).shape[1]
    assert width % 7
    rotate_input(graph, layer, orthogonal(7, _generator()), torch.ones(width))
    graph.invalidate()
    assert graph.tensor(layer.weight).shape[1] == -(-width // 7) * 7
    torch.testing.assert_close(graph(pictures), expected, rtol=1e-3, atol=1e-4)


def test_one_scale_fits_rotated_hidden_values_better(shared_data):
    """DeiT-Tiny's GELUs on real images: what the layer behind loses to 4 bits, in dB, mean of the blocks."""
    import quantlens as ql
    from quantlens.calibration import Observation
    from quantlens.calibration.ranges import affine, clipping
    from quantlens.data import as_image_set

    name = "deit_tiny_patch16_224"
    model = ql.load_model(name, weights=str(shared_data / "weights" / f"{name}.safetensors"))
    images = as_image_set(f"imagenet:{shared_data}/imagenet[0:80:20]", model.preprocess).tensor(0, 4)
    graph, seen = graph_of(model), {}

    def hook(key: str, value: torch.Tensor) -> torch.Tensor:
        if key.endswith("mlp.fc2.input"):
            seen[key.removesuffix(".input")] = value.flatten(0, -2)
        return value

    with torch.no_grad():
        nodes = [node for node in graph.fx.nodes if node.op == "call_function"]
        graph.run(nodes, {graph.input: images}, hook=hook, keep=[graph.output])
    block = hadamard(64, _generator()).float()

    def error(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        quantizer = affine(*clipping(Observation.of(x.reshape(1, -1)), 4), 4)
        return ((quantizer(x) - x) @ weight.T).square().sum()

    gains = []
    for layer, x in seen.items():
        weight, rotation = graph.tensor(f"{layer}.weight"), torch.block_diag(*[block] * (x.shape[1] // 64))
        gains.append(10 * torch.log10(error(x, weight) / error(x @ rotation, weight @ rotation)))
    assert len(gains) == 12
    assert float(torch.stack(gains).mean()) > 2.5


def test_a_norms_scale_in_front_of_the_rotation_helps(shared_data):
    """ViT-Tiny's first MLP, whose LayerNorm turns down large channels that the layer behind does not need: a rotated
    residual stream has them spread over all others before the scale is folded into the weights. In dB."""
    import quantlens as ql
    from quantlens.calibration.ranges import block_scaled
    from quantlens.data import as_image_set

    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = ql.load_model(name, weights=str(shared_data / "weights" / f"{name}.safetensors"))
    images = as_image_set(f"imagenet:{shared_data}/imagenet[0:80:20]", model.preprocess).tensor(0, 4)
    block, seen = model.module.blocks[0], []
    handle = block.norm2.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    with torch.no_grad():
        model(images)
    handle.remove()
    scale, weight = block.norm2.weight, block.mlp.fc1.weight
    scaled = seen[0].flatten(0, -2) - block.norm2.bias
    scaled = scaled - scaled.mean(0)

    def error(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ((block_scaled(x, 3, 64)(x) - x) @ weight.T).square().sum()

    stream = mean_keeping(192, _generator()).float()
    rotation = torch.block_diag(*[hadamard(64, _generator()).float()] * 3)
    folded = error(scaled / scale @ stream, weight * scale @ stream)
    assert float(10 * torch.log10(folded / error(scaled @ rotation, weight @ rotation))) > 3
