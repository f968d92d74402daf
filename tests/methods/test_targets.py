"""Methods that learn how weights are rounded learn it on the grid that ships."""

from __future__ import annotations

import pytest
import torch

import quantlens as ql

LEARNED = ("aocq", "aphq-vit", "bit-split", "erq", "fima-q", "gptq", "i-and-s-vit", "qdrop", "quantlens-fast")


@pytest.mark.parametrize("method", LEARNED)
def test_weights_of_blocks_lie_on_the_grid_of_the_target(loaded, method):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    qmodel = ql.quantize(loaded["vit"], images, method=method, bits="W4A8", target="onnxruntime-cpu")
    graph, found = qmodel.graph, 0
    for site in graph.sites.of_kind("linear"):
        quantizer = qmodel.plan.quantizers[site.edges["weight"].key]
        assert quantizer.symmetric
        if site.block is not None:
            weight = graph.tensor(site.weight)
            torch.testing.assert_close(quantizer(weight), weight, rtol=1e-5, atol=1e-6)
            found += 1
    assert found == 8
