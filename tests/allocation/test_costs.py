from __future__ import annotations

import pytest

import quantlens as ql
from quantlens.allocation import find_groups
from quantlens.allocation.costs import cost_table, packed, site_work
from quantlens.graph import graph_of


def test_vit_by_hand(loaded):
    """32×32 pixels in 16 patches of 8×8 and a class token; 32 channels, 2 heads of 16, MLP of 128, 10 classes."""
    graph = graph_of(loaded["vit"])
    work = site_work(graph)
    assert (work["patch_embed.proj"].weights, work["patch_embed.proj"].macs) == (32 * 3 * 64, 16 * 32 * 3 * 64)
    assert work["patch_embed.proj"].reads_pixels
    assert (work["blocks.0.attn.qkv"].weights, work["blocks.0.attn.qkv"].macs) == (32 * 96, 17 * 32 * 96)
    assert (work["blocks.0.attn.scores"].weights, work["blocks.0.attn.scores"].macs) == (0, 2 * 17 * 16 * 17)
    assert work["blocks.0.attn.context"].macs == 2 * 17 * 17 * 16
    assert work["blocks.0.mlp.fc2"].macs == 17 * 128 * 32
    assert work["head"].macs == 320  # of the class token alone

    table = cost_table(graph, find_groups(graph), (4, 8), 6)
    attention, mlp = 4 * 32 * 32, 2 * 32 * 128
    assert table.groups["size"] == [{4: attention * 4 // 8, 8: attention}, {4: mlp * 4 // 8, 8: mlp}] * 2
    macs = 17 * attention + 2 * 2 * 17 * 17 * 16
    assert table.groups["bops"] == [{4: macs * 16, 8: macs * 64}, {4: 17 * mlp * 16, 8: 17 * mlp * 64}] * 2
    assert table.fixed["bops"] == 16 * 32 * 192 * 6 * 8 + 320 * 36
    floats = loaded["vit"].num_parameters - 2 * (attention + mlp) - 32 * 192 - 320
    assert table.fixed["size"] == 4 * floats + (32 * 192 + 320) * 6 // 8
    assert table.total("size", [8, 8, 8, 8]) == table.fixed["size"] + 2 * (attention + mlp)


def test_windows_count(loaded):
    """Swin's first stage: 16×16 tokens in 16 windows of 4×4."""
    work = site_work(graph_of(loaded["swin"]))
    assert work["layers.0.blocks.1.attn.scores"].macs == 16 * 2 * 16 * 8 * 16
    assert work["layers.0.blocks.0.mlp.fc1"].macs == 256 * 16 * 64


def test_codes_that_do_not_fill_a_byte_take_it():
    assert [packed(n, 3) for n in (0, 1, 3, 8)] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["vit", "swin", "deit3"])
def test_size_is_that_of_the_packed_model_less_its_scales(kind, loaded, pictures):
    """The mixed and the uniform model have the same scales, so that their sizes differ as the table says."""
    model = loaded[kind]
    allocation = ql.allocate(model, pictures, "MP6", sensitivity="random", seed=1)
    mixed, uniform = (ql.quantize(model, pictures, method="minmax", bits=b) for b in (allocation, "W6A6"))
    assert len({group.bits for group in allocation.groups}) > 1
    assert uniform.size_bytes() - mixed.size_bytes() == allocation.cost_of("size", 6) - allocation.cost_of("size")
