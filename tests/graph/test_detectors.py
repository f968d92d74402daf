"""Detectors as graphs: what they give, BatchNorm within convolutions, heads, what a model keeps of its first call."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hf_detectors import CONFIGURATIONS, small
from torch import nn

from quantlens.graph import capture, choices, exporting, op_name

FAST = "detr"


@lru_cache
def captured(name: str):
    """(a detector, images, its graph), captured before it was ever called.

    In double precision, as small detectors of drawn weights make a rounding error a hundred times larger; but DAB-DETR,
    whose own code has float32 constants.
    """
    pytest.importorskip("transformers")
    module, images = (part.to(torch.float32 if name == "dab-detr" else torch.float64) for part in small(name))
    return module, images, capture(module, images)


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGURATIONS])
def test_a_detector_is_captured(name):
    module, images, graph = captured(name)
    near = 1e-9 if images.dtype == torch.float64 else 1e-4
    with torch.no_grad():
        for batch in (images, images[:1]):
            expected, found = module(batch), graph(batch)
            assert type(found) is type(expected)
            assert list(found) == list(expected)
            for key in ("logits", "pred_boxes"):
                torch.testing.assert_close(found[key], expected[key], rtol=near, atol=near)
    assert float(module(images).logits.std(0).mean()) > 1e-2  # it looks at its images
    assert graph.boxes is not None
    assert not any("batch_norm" in op_name(node) for node in graph.fx.nodes)


def test_sites_have_names_that_a_person_knows():
    sites = captured(FAST)[2].sites
    for name in ("self_attn.q_proj", "encoder_attn.probs", "encoder_attn.k_proj", "mlp.fc1"):
        assert f"model.decoder.layers.1.{name}" in sites
    assert [site.name for site in sites.head] == [
        "class_labels_classifier",
        *(f"bbox_predictor.layers.{i}" for i in range(3)),
    ]


class Chooser(nn.Module):
    """Rows of an image's first channel chosen in several ways; their values alone; by what no pixel decides."""

    def forward(self, images):
        rows = images[:, 0]
        best, ordered, largest = rows.mean(-1).topk(4).indices, rows.amax(-1).sort().indices, rows.sum(-1).argmax(-1)
        scores, classes = rows.max(-1)
        fixed = torch.arange(16).flip(0).topk(4).indices
        chosen = (rows.gather(1, index[:, :, None].expand(-1, -1, 16)) for index in (best, ordered, largest[:, None]))
        more = rows[:, fixed], rows.topk(2).values, scores, classes
        return torch.cat([x.flatten(1).float() for x in (*chosen, *more)], 1)


def test_what_the_pixels_choose_is_known():
    graph = capture(Chooser(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    made = [node.args[0] if op_name(node).startswith("<built-in") else node for node in choices(graph)]
    assert sorted(op_name(node).split(".")[1] for node in made) == ["argmax", "max", "sort", "topk"]
    assert choices(capture(stem(boxes=True), IMAGES)) == []


class Frozen(nn.Module):
    """BatchNorm as DETR's backbones have it: buffers."""

    def __init__(self, channels: int):
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels, generator=draw) + 0.3)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class Stem(nn.Module):
    """Two convolutions with a norm each, and class logits, or those and boxes."""

    def __init__(self, norm: type[nn.Module], *, boxes: bool, bias: bool = False, twice: bool = False):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 4, 4, bias=bias), nn.Conv2d(6, 6, 1, groups=2, bias=bias)
        self.norms, self.boxes, self.twice = nn.ModuleList([norm(6), norm(6)]), boxes, twice
        self.head, self.place = nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, images):
        made = self.one(images)
        x = self.norms[1](self.two(self.norms[0](made).relu()))
        x = (x + made if self.twice else x).flatten(2).mT
        return {"logits": self.head(x), "pred_boxes": self.place(x).sigmoid()} if self.boxes else self.head(x.mean(1))


def stem(norm: type[nn.Module] = Frozen, **settings) -> Stem:
    torch.manual_seed(0)
    module = Stem(norm, **settings)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.weight, part.bias, part.running_mean, part.running_var):
                value.data = torch.rand(6) + 0.3
    return module.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"norm": Frozen, "boxes": False}, 0),
        ({"norm": Frozen, "boxes": True, "bias": True}, 0),
        ({"norm": Frozen, "boxes": True, "twice": True}, 1),  # the first convolution's value is read without the norm
        ({"norm": nn.BatchNorm2d, "boxes": True, "bias": True}, 0),
        ({"norm": nn.BatchNorm2d, "boxes": True}, 0),
        ({"norm": nn.BatchNorm2d, "boxes": False}, 2),  # a classifier's numbers stay what they were
    ],
)
def test_batch_norm_is_part_of_its_convolution(settings, left):
    module = stem(**settings)
    graph = capture(module, IMAGES)
    assert sum("batch_norm" in op or "mul.Tensor" in op for op in map(op_name, graph.fx.nodes)) == left
    expected, found = module(IMAGES), graph(IMAGES)
    for a, b in zip(*(x.values() if isinstance(x, dict) else [x] for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [site.name for site in graph.sites.of_kind("conv")] == ["one", "two"]
    torch.testing.assert_close(module(IMAGES), expected)  # and it stays itself


def test_a_convolution_that_is_called_twice_stays_one_weight():
    class Levels(Stem):
        def forward(self, images):
            fine = self.norms[0](self.one(images)).flatten(2)
            coarse = self.norms[0](self.one(images[..., ::2, ::2])).flatten(2)
            x = torch.cat([fine, coarse], 2).mT
            return {"logits": self.head(x), "pred_boxes": self.place(x)}

    torch.manual_seed(0)
    module = Levels(Frozen, boxes=True).eval()
    graph = capture(module, IMAGES)
    assert [(site.name, site.weight) for site in graph.sites.of_kind("conv")] == [
        ("one.call1", "one.weight_folded"),
        ("one.call2", "one.weight_folded"),
    ]
    torch.testing.assert_close(graph(IMAGES)["logits"], module(IMAGES)["logits"])


def test_a_scale_by_place_is_no_batch_norm():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale, self.shift = nn.Conv2d(3, 4, 4, 4), *(nn.Parameter(torch.rand(4, 1)) for _ in "ab")

        def forward(self, images):
            return (self.conv(images) * self.scale + self.shift).mean((2, 3))

    module = Scaled().eval()
    torch.testing.assert_close(capture(module, IMAGES)(IMAGES), module(IMAGES))


@lru_cache
def kept_grid(side: int) -> torch.Tensor:
    return torch.linspace(0, 1, side)


class Lengths(nn.Module):
    """Asks for the length of a batch, and keeps a tensor of its first call, as RT-DETR does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, images):
        queries = torch.zeros(1, 2, 3).tile([len(images), 1, 1])
        return self.fc(images.mean((1, 2)) * kept_grid(images.shape[-1]))[:, None] + queries


def test_the_length_of_a_batch_and_what_a_model_keeps(monkeypatch):
    def only_quickly(call, *, strict: bool):
        assert not strict, "torch reads the code itself, which is several times slower"
        return plain(call, strict=strict)

    module, plain = Lengths().eval(), exporting.Call._exported
    monkeypatch.setattr(exporting.Call, "_exported", only_quickly)
    kept_grid.cache_clear()
    graph = capture(module, IMAGES)
    assert type(module(IMAGES)) is torch.Tensor
    for batch in (IMAGES, IMAGES[:1]):
        torch.testing.assert_close(graph(batch), module(batch))
    assert "len" not in globals()


def test_a_mean_with_given_weights_is_no_layer():
    """As D-FINE makes a place of a distribution over bins."""

    class Bins(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 5)
            self.register_buffer("bins", torch.linspace(-1, 1, 5))

        def forward(self, images):
            return nn.functional.linear(self.fc(images.mean((1, 2))).softmax(-1), self.bins)

    module = Bins().eval()
    graph = capture(module, IMAGES)
    assert [site.name for site in graph.sites] == ["fc"]
    torch.testing.assert_close(graph(IMAGES), module(IMAGES))
