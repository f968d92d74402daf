"""Features of a quantized classifier are on the axes of the float model, whatever exact transforms its last layers went
through: scores of features compare them with the float model's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlens as ql
from quantlens.calibration import Calibration, subtract_means
from quantlens.graph import Graph, graph_of
from quantlens.methods.base import Run, Widths
from quantlens.methods.quantlens_fast import QuantlensFast
from quantlens.methods.registry import available
from quantlens.qmodel import Plan, QuantizedModel
from quantlens.qmodel.model import float_model
from quantlens.qmodel.plan import Bits
from quantlens.transforms import (
    find_norm_groups,
    find_value_pairs,
    fold_norm,
    permute_hidden,
    rescale_norm,
    rescale_values,
    rotate_values,
)
from quantlens.transforms.rotation import find_residuals, hadamard, mean_keeping, rotate_input, rotate_residual


def folded(graph: Graph, images: Calibration) -> None:
    for group in find_norm_groups(graph):
        fold_norm(graph, group)


def rescaled(graph: Graph, images: Calibration) -> None:
    generator = torch.Generator().manual_seed(1)
    for group in find_norm_groups(graph):
        size = graph.tensor(group.parameters[0]).shape
        rescale_norm(graph, group, torch.rand(size, generator=generator) + 0.3, torch.randn(size, generator=generator))
        fold_norm(graph, group)


def rotated_anyhow(graph: Graph, images: Calibration) -> None:
    """All of them in a row, the last on zeros put after the channels."""
    generator = torch.Generator().manual_seed(2)
    for residual in find_residuals(graph):
        rotate_residual(graph, residual, mean_keeping(residual.channels, generator))
    subtract_means(graph, images)
    for site in graph.sites.head:
        channels = graph.tensor(site.weight).shape[1]
        rotate_input(graph, site, hadamard(64, generator), torch.randn(channels, generator=generator).double())
    graph.invalidate()


def by_our_method(bits: str) -> Callable[[Graph, Calibration], None]:
    def rewrite(graph: Graph, images: Calibration) -> None:
        method = QuantlensFast()
        options = method.options({})
        method.rewrite(graph, images, Widths(Bits.parse(bits), options), Run(options, 0))

    return rewrite


TRANSFORMS = {
    "rescale": rescaled,
    "rotate": rotated_anyhow,
    "quantlens-fast": by_our_method("W4A4"),
}


def check(model: Any, images: Tensor, transform: Callable[[Graph, Calibration], Any], path: Any) -> Graph:
    """With nothing quantized, features and classifier are the float model's, also out of a file."""
    graph = graph_of(model).clone()
    transform(graph, Calibration.of(images, model.preprocess))
    graph.invalidate()
    made = QuantizedModel(graph, Plan(), preprocess=model.preprocess)
    expected, found = float_model(model).outputs(images), made.outputs(images)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-4, atol=1e-4)
    for own, its in zip(made.classifier(), float_model(model).classifier(), strict=True):
        torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-4)
    again = ql.load(made.save(path / "q.safetensors"))
    for one in (again, QuantizedModel(graph.clone(), Plan(), preprocess=None).to(torch.float64).to(torch.float32)):
        assert torch.equal(one.outputs(images).features, found.features)
        assert all(map(torch.equal, one.classifier(), made.classifier()))
    return graph


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_exact_transforms_keep_the_features(architecture, loaded, pictures, tmp_path, transform) -> None:
    check(loaded[architecture], pictures, TRANSFORMS[transform], tmp_path)


def test_a_channel_without_a_scale_is_left_out_of_the_classifier(pictures, fresh, small_models) -> None:
    model = fresh("vit")
    graph = model.derived["graph"]
    graph.change("norm.weight", lambda value: value.index_fill(0, torch.tensor([3]), 0))
    graph.invalidate()
    folded(graph, Calibration.of(pictures, model.preprocess))
    made = QuantizedModel(graph, Plan(), preprocess=None)
    found, (weight, bias) = made.outputs(pictures), made.classifier()
    torch.testing.assert_close(found.features[:, 3], small_models["vit"].norm.bias[3].expand(len(pictures)))
    assert not bool(weight[:, 3].any())
    torch.testing.assert_close(found.features @ weight.T + bias, found.logits, rtol=1e-4, atol=1e-4)


class Pooling(nn.Module):
    """A classifier that reads an attention; with ``hidden``, an activation function."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        self.patches, self.q, self.kv = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 32), nn.Linear(32, 64)
        self.up = nn.Linear(32, 48) if hidden else None
        self.head = nn.Linear(48 if hidden else 32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 1, 4)
        q = self.q(x[:, :1]).unflatten(-1, (2, 16)).transpose(1, 2)
        x = (torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v).transpose(1, 2).flatten(1)
        return self.head(x if self.up is None else nn.functional.gelu(self.up(x)))


def test_a_classifier_after_an_attention(pictures, tmp_path) -> None:
    torch.manual_seed(0)
    model = ql.load_model(Pooling(hidden=False), input_size=(3, 32, 32))

    def transform(graph: Graph, images: Calibration) -> None:
        generator = torch.Generator().manual_seed(3)
        (pair,) = find_value_pairs(graph)
        rescale_values(graph, pair, torch.rand(32, generator=generator) + 0.3)
        rotate_values(graph, pair, generator)
        subtract_means(graph, images)

    assert len(check(model, pictures, transform, tmp_path).axes["head.weight"]) == 3


def test_a_classifier_after_an_activation(pictures, tmp_path) -> None:
    torch.manual_seed(0)
    model = ql.load_model(Pooling(hidden=True), input_size=(3, 32, 32))

    def transform(graph: Graph, images: Calibration) -> None:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(4))
        permute_hidden(graph, graph.sites["up"], graph.sites["head"], order)

    check(model, pictures, transform, tmp_path)


def near(model: Any, images: Tensor, method: str, bits: str, **options: Any) -> float:
    """The least cosine of an image's features to the float model's."""
    qmodel = ql.quantize(model, images, method=method, bits=bits, head_bits=32, **options)
    found, expected = (one.outputs(images).features for one in (qmodel, float_model(model)))
    return float(nn.functional.cosine_similarity(found, expected).min())


def test_the_features_of_a_trained_model_stay_where_they_were(digits) -> None:
    assert near(digits["model"], digits["calibration"], "quantlens-fast", "W8A8") > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(available()))
def test_every_method_keeps_the_axes(digits, method) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert near(digits["model"], digits["calibration"], method, "W8A8") > 0.95
