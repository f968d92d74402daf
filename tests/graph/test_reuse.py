"""A second quantization of the same module does not capture it again, unless something about it has changed."""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.graph import capture, graph_of, reuse


@pytest.fixture
def captures(monkeypatch):
    """The modules that were captured; weights are drawn with one seed."""
    torch.manual_seed(0)
    found = []
    capturing = importlib.import_module("quantlens.graph.capture")
    real = capturing.capture
    monkeypatch.setattr(capturing, "captured", reuse.captured)  # not by what the tests keep
    monkeypatch.setattr(reuse, "_NAMED", OrderedDict())

    def counted(model, *args, **kwargs):
        found.append(model)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(capturing, "capture", counted)
    return found


class Net(nn.Module):
    """With a constant that is folded: x @ (scale · weight)ᵀ."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 3)), nn.Linear(8, 5)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.factor = 1.0

    def forward(self, x):
        return self.head((x.mean((2, 3)) @ (self.scale * self.weight).T).relu() * self.factor)


def quantized(module, images):
    return ql.quantize(module, images, method="minmax", bits="W8A8")


def test_a_second_time_is_not_captured_and_gives_the_same(captures):
    module, images = Net().eval(), torch.randn(4, 3, 8, 8)
    first = quantized(module, images)
    second = quantized(module, images)
    ql.quantize(module, images, method="percentile", bits="W4A8")
    assert len(captures) == 1
    assert torch.equal(first(images), second(images))
    second.graph.set_tensor("head.bias", second.graph.tensor("head.bias") + 1)  # the two share nothing
    assert torch.equal(quantized(module, images)(images), first(images))
    quantized(module, torch.randn(4, 3, 6, 6))
    assert len(captures) == 2


def _new_head(module):
    module.head = nn.Sequential(module.head, nn.ReLU())


CHANGES = {
    "in place": lambda m: m.weight.mul_(2),
    "through .data": lambda m: m.weight.data.mul_(2),
    "another tensor": lambda m: setattr(m, "weight", nn.Parameter(m.weight * 2)),
    "a buffer that is not saved": lambda m: m.scale.mul_(2),
    "a setting": lambda m: setattr(m, "factor", 0.5),
    "a part": _new_head,
    "a hook": lambda m: m.head.register_forward_hook(lambda module, inputs, output: output * 2),
}


@pytest.mark.parametrize(("change", "loaded"), [*((c, False) for c in CHANGES), ("through .data", True)])
def test_whatever_changes_the_module_is_captured_again(change, loaded, captures):
    module, images = Net().eval(), torch.randn(4, 3, 8, 8)
    model = ql.load_model(module, input_size=(3, 8, 8)) if loaded else module
    quantized(model, images)
    with torch.no_grad():
        CHANGES[change](model.module if loaded else module)
        expected = (model.module if loaded else module)(images)
    after = quantized(model, images)
    assert len(captures) == 2
    assert (after(images) - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_copy_is_another_module(captures):
    module, images = Net().eval(), torch.randn(4, 3, 8, 8)
    quantized(module, images)
    quantized(copy.deepcopy(module), images)
    assert len(captures) == 2


def test_a_model_that_is_loaded_by_its_name_again_is_not_captured_again(captures):
    first, second = (ql.load_model("test_vit", input_size=32, num_classes=4, seed=seed) for seed in (0, 0))
    for model in (first, second):
        images = torch.randn(3, 3, 32, 32)
        assert torch.allclose(graph_of(model)(images), model(images), atol=1e-5)
    assert len(captures) == 1
    own = {value.data_ptr() for value in second.module.state_dict().values()}
    assert own >= {value.data_ptr() for key, value in graph_of(second).tensors().items() if "folded" not in key}


def test_another_model_of_the_name_is_captured_and_few_are_kept(captures, monkeypatch):
    module, images = Net().eval(), torch.zeros(2, 3, 8, 8)
    graph, made = capture(module, images), []

    def captured_again(module, name="net"):
        before = len(made)
        reuse.captured(name, module, images, lambda: made.append(module) or graph)
        return len(made) > before

    assert captured_again(module)
    assert not captured_again(copy.deepcopy(module))
    assert captured_again(module, "another")
    forward = Net.forward
    with monkeypatch.context() as patch:
        patch.setattr(Net, "forward", lambda self, x: 2 * forward(self, x))
        assert captured_again(module)
    module.weight.data.mul_(2)
    assert captured_again(module)
    assert len(reuse._NAMED) == reuse.MOST_NAMED == 2
