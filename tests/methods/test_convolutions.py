"""Models whose convolutions pad, stride, dilate, have groups or no bias: what a method makes of them is the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quantlens as ql
from quantlens.data import Preprocess
from quantlens.graph import capture

NEAR = 3.0
"""Decibels that the default method may be below minmax at 8 bits."""


def drawn(model: nn.Module) -> nn.Module:
    """The model with every vector and statistic away from its initial value."""
    generator = torch.Generator().manual_seed(1)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            value.data = 0.5 + torch.rand(value.shape, generator=generator)
        elif value.is_floating_point() and value.dim() == 1:
            value.data = value.data + 0.2 * torch.randn(value.shape, generator=generator)
    return model.eval().requires_grad_(False)


def decibels(expected: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - got).square().sum()))


def check(network: nn.Module, size: int, methods=("quantlens-fast",), **options) -> None:
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(3))
    preprocess = Preprocess.from_timm(
        {
            "input_size": (3, size, size),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }
    )
    model = ql.load_model(network, preprocess=preprocess)
    expected = network(images)
    plain = decibels(expected, ql.quantize(model, images, method="minmax")(images))
    assert plain > 20
    for method in methods:
        got = decibels(expected, ql.quantize(model, images, method=method, **options)(images))
        assert got > plain - NEAR, f"{method}: {got:.1f} dB, minmax {plain:.1f}"


class Convolution(nn.Module):
    """A 3 x 3 convolution that pads and has no bias."""

    def __init__(self, **attributes):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, bias=False, **attributes)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(x))).mean((2, 3)))


class Hybrid(nn.Module):
    """Convolutions without biases in front of an attention without biases, as in LeViT; strided, grouped, dilated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.Hardswish(),
            nn.Conv2d(8, 16, 3, 2, 2, dilation=2, groups=4, bias=False),
            nn.BatchNorm2d(16),
        )
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.local, self.head = nn.Conv2d(16, 16, 3, padding="same", groups=16, bias=False), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        x = x + self.local(x.transpose(1, 2).reshape(b, c, 8, 8)).flatten(2).transpose(1, 2)
        return self.head(x.mean(1))


METHODS = ("quantlens-fast", "erq", "repq-vit")


@pytest.mark.parametrize(
    "attributes",
    [
        {"padding": 1},
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "dilation": 2},
    ],
    ids=str,
)
def test_a_convolution_that_pads_and_has_no_bias(attributes):
    check(drawn(Convolution(**attributes)), 32, METHODS)


def test_convolutions_in_front_of_an_attention():
    check(drawn(Hybrid()), 32, METHODS)


@pytest.mark.slow
def test_a_stem_with_a_norm_of_its_own():
    """As in CLIP: the patch embedding has no bias, and a LayerNorm makes the residual stream."""
    from timm.models.vision_transformer import VisionTransformer

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    network = drawn(VisionTransformer(**size, pre_norm=True))
    assert network.patch_embed.proj.bias is None
    check(network, 32, ("quantlens-fast", "vt-ptq"))
    check(network, 32, target="openvino-cpu")


def test_a_bias_is_made_for_the_convolution_as_it_is(pictures):
    """The issue's smallest input, at the rewrite itself."""
    from quantlens.transforms.layers import ensure_bias

    network = drawn(Convolution(padding=1, stride=2))
    graph = capture(network, pictures)
    name = ensure_bias(graph, graph.sites["first"])
    torch.testing.assert_close(graph(pictures), network(pictures))
    graph.set_tensor(name, torch.randn(16))
    network.norm.running_mean -= graph.tensor(name)
    torch.testing.assert_close(graph(pictures), network(pictures), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("levit_128s", 64),
        ("mobilevit_xxs", 64),
        ("fastvit_t8", 64),
        ("xcit_nano_12_p16_224", 64),
        ("maxvit_rmlp_pico_rw_256", 64),
    ],
)
def test_models_with_convolutions_inside(name, size):
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        known = {} if name.startswith(("mobilevit", "fastvit", "xcit")) else {"img_size": size}
        network = drawn(timm.create_model(name, num_classes=10, **known))
    check(network, size)
