"""Products are found with both operands, and their samples are rows of these."""

from __future__ import annotations

import pytest
import torch

from quantlens.calibration import Calibration, images as chunks
from quantlens.calibration.sampling import ProductSampler, find_products, visit_products
from quantlens.qmodel import float_model


@pytest.fixture
def graph(architecture, loaded):
    return float_model(loaded[architecture]).graph.clone()


def _visit(architecture, loaded, graph, pictures, on_product):
    calibration = Calibration.of(pictures, loaded[architecture].preprocess)
    visit_products(graph, calibration, find_products(graph), on_product)


def _rows(x):
    return {tuple(row) for row in x.reshape(-1, x.shape[-1]).tolist()}


def test_every_layer_and_attention_product_is_found(graph):
    products = find_products(graph)
    sites = graph.sites.of_kind("linear", "conv", "scores", "context", "matmul")
    assert {p.site.name for p in products} == {s.name for s in sites}
    for product in products:
        if product.site.kind == "context":
            assert product.quantized[0].key.endswith("probs.output")
    keys = [edge.key for product in products for edge in product.quantized]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("chunk", [32, 3])
def test_operands_make_the_products_of_the_graph(chunk, architecture, loaded, graph, pictures, monkeypatch):
    """Left and right, multiplied, are outputs (less their bias) that the graph has."""
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    sampler = ProductSampler(torch.Generator().manual_seed(0), rows=24)
    visited = []

    def on_product(product, tensors):
        left, right = sampler.joined(product, tensors)
        assert left.shape[-1] == right.shape[-1]
        if product.site.kind == "linear":
            assert torch.equal(left, tensors[0][0])
            assert len(right) <= 24
            assert _rows(right) <= {row for part in tensors[1] for row in _rows(part)}
        elif product.site.kind in ("scores", "context"):
            whole = torch.cat([(a @ b).flatten(0, -3) for a, b in zip(*tensors, strict=True)])
            got = left @ right.mT
            assert all(any(torch.allclose(one, other, atol=1e-5) for other in whole) for one in got[:3])
        visited.append(product.site.name)

    _visit(architecture, loaded, graph, pictures, on_product)
    assert len(visited) == len(find_products(graph))


def test_samples_of_a_layer_are_tokens_of_one_image(loaded, pictures, monkeypatch):
    graph = float_model(loaded["vit"]).graph.clone()
    monkeypatch.setattr(chunks, "CHUNK", 3)
    sampler = ProductSampler(torch.Generator().manual_seed(0), rows=15, samples=5)

    def on_product(product, tensors):
        left, right = sampler.by_sample(product, tensors, len(pictures))
        if product.site.kind != "linear":
            return
        images = [_rows(image) for part in tensors[1] for image in part]
        assert left.shape[0] == 5
        assert left.shape[1] <= 3
        owners = [[i for i, rows in enumerate(images) if _rows(one) <= rows] for one in left]
        assert all(owners)
        assert owners == sorted(owners)
        assert torch.equal(right, tensors[0][0])

    _visit("vit", loaded, graph, pictures, on_product)
