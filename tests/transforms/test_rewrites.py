from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlens.graph import capture
from quantlens.graph.graph import op_name
from quantlens.graph.serialize import graph_from_dict, graph_to_dict
from quantlens.transforms import (
    find_norm_groups,
    fold_layer_scale,
    fold_norm,
    graph_of,
    hidden_source,
    permute_hidden,
    rescale_input,
    rescale_norm,
    split_linear,
)


@pytest.fixture
def graph(architecture, loaded):
    """A copy of the captured graph: capturing takes seconds, and every test changes its own."""
    return graph_of(loaded[architecture]).clone()


def test_norm_groups(architecture, graph):
    groups = {g.norm.name: [s.name for s in g.linears] for g in find_norm_groups(graph)}
    if architecture == "plain":  # mean pooling stands between the last norm and the head; q, k and v share a norm
        assert groups["layers.0.before"] == [f"layers.0.attention.{n}" for n in ("query", "key", "value")]
        assert "norm" not in groups
    elif architecture == "swin":
        assert groups["layers.0.blocks.1.norm1"] == ["layers.0.blocks.1.attn.qkv"]  # behind a shifted window
        assert groups["layers.1.downsample.norm"] == ["layers.1.downsample.reduction"]
    elif architecture == "deit-distilled":
        assert groups["norm"] == ["head", "head_dist"]
    elif architecture in ("vit", "deit3"):
        assert groups == {
            **{f"blocks.{i}.norm1": [f"blocks.{i}.attn.qkv"] for i in range(2)},
            **{f"blocks.{i}.norm2": [f"blocks.{i}.mlp.fc1"] for i in range(2)},
            "norm": ["head"],
        }


def test_rescaling_a_norm_keeps_the_function(graph, network, pictures):
    generator = torch.Generator().manual_seed(1)
    for group in find_norm_groups(graph):
        channels = group.norm.node.meta["shape"][-1]
        before = graph.tensor(f"{group.norm.name}.weight")
        scale = torch.rand(channels, generator=generator) * 3 + 0.2
        rescale_norm(graph, group, scale, torch.randn(channels, generator=generator))
        torch.testing.assert_close(graph.tensor(f"{group.norm.name}.weight"), before / scale)
    torch.testing.assert_close(graph(pictures), network(pictures), rtol=1e-4, atol=1e-4)


def test_folding_norms_keeps_the_function(graph, network, pictures):
    for group in find_norm_groups(graph):
        fold_norm(graph, group)
        assert bool((graph.tensor(f"{group.norm.name}.weight") == 1).all())
        assert bool((graph.tensor(f"{group.norm.name}.bias") == 0).all())
    torch.testing.assert_close(graph(pictures), network(pictures), rtol=1e-4, atol=1e-4)


def test_folding_a_dead_channel_is_exact(small_models, pictures):
    import copy

    model = copy.deepcopy(small_models["vit"])
    model.blocks[0].norm1.weight.data[3] = 0.0
    graph = capture(model, pictures)
    for group in find_norm_groups(graph):
        fold_norm(graph, group)
    torch.testing.assert_close(graph(pictures), model(pictures), rtol=1e-4, atol=1e-4)
    assert bool((graph.tensor("blocks.0.attn.qkv.weight")[:, 3] == 0).all())


def test_layer_scale_goes_into_the_linear(architecture, graph, network, pictures):
    changed = fold_layer_scale(graph)
    if architecture == "deit3":
        assert changed == ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc2"]
        gamma, weight = network.blocks[0].ls1.gamma, network.blocks[0].attn.proj.weight
        torch.testing.assert_close(graph.tensor("blocks.0.attn.proj.weight"), gamma[:, None] * weight)
        assert not any("ls1" in name for name in graph.tensors())
    else:
        assert changed == []
    torch.testing.assert_close(graph(pictures), network(pictures), rtol=1e-5, atol=1e-5)


def test_a_norm_that_feeds_a_sum_is_no_group(pictures):
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm, self.fc, self.head = (
                nn.Conv2d(3, 8, 8, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 8),
                nn.Linear(8, 4),
            )

        def forward(self, x):
            y = self.norm(self.patch(x).flatten(2).transpose(1, 2))
            return self.head((y + self.fc(y)).mean(1))

    assert find_norm_groups(capture(PostNorm(), pictures)) == []


def test_a_norm_behind_a_padding_is_no_group(pictures):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm, self.fc = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.norm(self.patch(x).flatten(2).transpose(1, 2))
            return self.fc(nn.functional.pad(y, (0, 0, 0, 1))).mean(1)  # zeros are not LayerNorm outputs

    graph = capture(Padded(), pictures)
    assert any("pad" in op_name(n) for n in graph.fx.nodes)
    assert find_norm_groups(graph) == []


@pytest.mark.parametrize(
    "parts", [{"massive": [5, 0]}, {"wide": [9, 2, 4], "wider": [7]}, {"last": [-2, -1]}], ids=lambda p: "+".join(p)
)
def test_a_split_linear_is_the_same_function(graph, pictures, parts):
    """Linears side by side equal the one, and the graph survives its JSON form."""
    before = graph(pictures)
    clone = graph.clone()
    for site in [s for s in clone.sites.of_kind("linear") if s.block is not None]:
        channels = clone.tensor(site.weight).shape[1]
        made = split_linear(clone, site, {name: torch.tensor(p) % channels for name, p in parts.items()})
        assert made == [f"{site.name}.{name}" for name in parts]
    clone.invalidate()
    torch.testing.assert_close(clone(pictures), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(graph(pictures), before)
    again = graph_from_dict(graph_to_dict(clone), clone.tensors())
    assert torch.equal(again(pictures), clone(pictures))


def test_hidden_channels_in_another_order_are_the_same_function(graph, network, pictures):
    before, changed = graph(pictures), 0
    for site in graph.sites.of_kind("linear"):
        source = hidden_source(graph, site)
        if source is not None:
            order = torch.randperm(graph.tensor(site.weight).shape[1], generator=torch.Generator().manual_seed(changed))
            permute_hidden(graph, source, site, order)
            changed += 1
    assert changed == len(graph.sites.of_kind("gelu"))
    graph.invalidate()
    torch.testing.assert_close(graph(pictures), before, rtol=1e-4, atol=1e-4)


def test_values_that_something_else_reads_keep_their_order(pictures):
    """A second reader of the hidden values, and weights that two layers share."""

    class Mlp(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.patch, self.one, self.two = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.shared = shared

        def forward(self, x):
            y = self.patch(x).flatten(2).transpose(1, 2)
            hidden = nn.functional.gelu(self.one(y))
            return self.two(hidden).mean(1) + (self.one(y).mean(1) if self.shared else hidden.mean(1))

    for shared in (True, False):
        graph = capture(Mlp(shared), pictures)
        assert all(hidden_source(graph, site) is None for site in graph.sites.of_kind("linear"))


def test_rescaled_inputs_keep_the_function(graph, network, pictures):
    generator = torch.Generator().manual_seed(2)
    for site in graph.sites.of_kind("linear"):
        channels = graph.tensor(site.weight).shape[1]
        rescale_input(graph, site, torch.rand(channels, generator=generator) + 0.5, torch.randn(channels) / 10)
    with pytest.raises(ValueError, match="5 factors"):
        rescale_input(graph, graph.sites.of_kind("linear")[0], torch.ones(5))
    graph.invalidate()
    torch.testing.assert_close(graph(pictures), network(pictures), rtol=1e-4, atol=1e-4)
    read = graph_from_dict(graph_to_dict(graph), graph.tensors())
    assert torch.equal(read(pictures), graph(pictures))
