from __future__ import annotations

import pytest

import quantlens as ql
from quantlens.allocation import find_groups
from quantlens.allocation.groups import cover
from quantlens.errors import UnsupportedError
from quantlens.graph import graph_of
from quantlens.qmodel import Bits

PROJECTION = {"plain": "out", "torchvision": "out_proj"}
NAMES = {
    "vit": ("blocks.1.attn", "blocks.1.mlp"),
    "deit-distilled": ("blocks.1.attn", "blocks.1.mlp"),
    "deit3": ("blocks.1.attn", "blocks.1.mlp"),
    "swin": ("layers.1.blocks.1.attn", "layers.1.blocks.1.mlp"),
    "torchvision": (
        "encoder.layers.encoder_layer_1.self_attention",
        "encoder.layers.encoder_layer_1.mlp",
    ),
    "plain": ("layers.1.attention", "layers.1.mlp"),
}


def test_two_groups_per_block_cover_it(architecture, loaded):
    graph = graph_of(loaded[architecture])
    groups = find_groups(graph)
    assert len(groups) == 2 * len(graph.sites.blocks)
    assert tuple(group.name for group in groups[-2:]) == NAMES[architecture]
    for block, attention, mlp in zip(graph.sites.blocks, groups[::2], groups[1::2], strict=True):
        assert (attention.kind, mlp.kind) == ("attention", "MLP")
        assert attention.block == mlp.block == block.name
        inside = [site.name for site in graph.sites if site.block == block.name]
        assert sorted(attention.sites + mlp.sites) == sorted(inside)
        kinds = [graph.sites[name].kind for name in attention.sites]
        assert {"scores", "probs", "context", "layer_norm"} <= set(kinds)
        assert kinds[-1] == "linear"
        assert attention.sites[-1].endswith(PROJECTION.get(architecture, "proj"))
        assert {"gelu", "layer_norm", "add"} <= {graph.sites[name].kind for name in mlp.sites}
        assert sum(graph.sites[name].kind == "linear" for name in mlp.sites) == 2


def test_the_names_given_to_bits_reach_these_sites_and_no_other(architecture, loaded):
    graph = graph_of(loaded[architecture])
    groups = find_groups(graph)
    for wide in range(len(groups)):
        named = {module: 9 if i == wide else 4 for i, group in enumerate(groups) for module in group.modules}
        bits = Bits.parse({"default": "W2A2", **named})
        by_width = {w: {site.name for site in graph.sites if bits.of(site.name).weights == w} for w in (2, 4, 9)}
        assert by_width[9] == set(groups[wide].sites)
        assert by_width[2] == {site.name for site in graph.sites} - {name for g in groups for name in g.sites}
    if architecture == "vit":
        assert set(groups[2].modules) == {"blocks.1.norm1", "blocks.1.attn"}


def test_cover_prefers_the_outermost_name():
    everything = ["a.x.p", "a.x.q", "a.y", "a.yy", "b.z"]
    assert cover(["a.x.p", "a.x.q"], everything) == ("a.x",)
    assert cover(["a.x.p", "a.y"], everything) == ("a.x.p", "a.y")
    assert cover(["b.z"], everything) == ("b",)
    assert cover(["a", "a.x"], ["a", "a.x", "a.y"]) == ("a", "a.x")


def test_a_model_without_blocks_is_refused():
    from torch import nn

    model = ql.load_model(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 5)), input_size=(3, 32, 32))
    with pytest.raises(UnsupportedError, match="no transformer block"):
        find_groups(graph_of(model))
