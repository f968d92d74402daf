"""Layers that share a weight: one quantizer of it, ranges of their own for what they read, one copy in a file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quantlens as ql

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Twice(nn.Module):
    """`fc.0` is called twice, with values of other sizes; `tied`: it is the classifier, too."""

    def __init__(self, *, tied: bool = False):
        super().__init__()
        self.fc, self.tied = nn.ModuleList([nn.Linear(12, 12)]), tied
        self.head = nn.Identity() if tied else nn.Linear(12, 3)

    def forward(self, images):
        x = images.flatten(2).mean(2).repeat(1, 4)
        x = self.fc[0](self.fc[0](x).relu() * 3).relu()
        return self.fc[0](x) if self.tied else self.head(x)


def quantized(**settings):
    torch.manual_seed(0)
    module = Twice(tied=settings.pop("tied", False)).eval()
    return ql.quantize(module, IMAGES, **{"method": "minmax", "bits": "W4A4", **settings})


@pytest.mark.parametrize("method", ["minmax", "easyquant", "gptq", "quantlens-fast"])
def test_one_quantizer_of_the_weight_and_a_range_for_each_input(method, tmp_path):
    qmodel = quantized(method=method)
    found = qmodel.plan.quantizers
    assert found["fc.0.call1.weight"] is found["fc.0.call2.weight"]
    assert not torch.equal(found["fc.0.call1.input"].scale, found["fc.0.call2.input"].scale)
    path = qmodel.save(tmp_path / "q.safetensors")
    again = ql.load(path)
    assert again.plan.quantizers["fc.0.call1.weight"] is again.plan.quantizers["fc.0.call2.weight"]
    assert list(again.plan.quantizers) == list(found)
    assert torch.equal(again(IMAGES), qmodel(IMAGES))
    twin = copy.deepcopy(qmodel)
    assert twin.plan.quantizers["fc.0.call1.weight"] is twin.plan.quantizers["fc.0.call2.weight"]


def test_its_codes_count_once():
    weights = quantized(bits="W4A32")
    floats = sum(p.numel() for p in Twice().parameters()) * 4
    codes, scales = (12 * 12 + 12 * 3) // 2, (12 + 3) * 8  # a scale and a zero point per output channel
    assert weights.size_bytes() == floats - (12 * 12 + 12 * 3) * 4 + codes + scales


def test_a_weight_that_one_of_its_layers_reads_in_float_stays_float(tmp_path):
    qmodel = quantized(tied=True, head_bits=32)
    assert "fc.0.call3.weight" not in qmodel.plan.quantizers
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert torch.equal(again(IMAGES), qmodel(IMAGES))


def test_widths_of_a_layer_are_those_of_all_its_calls():
    qmodel = quantized(bits={"default": "W4A4", "fc.0": "W6A6"})
    for key in ("call1.input", "call2.input", "call1.weight"):
        assert qmodel.plan.quantizers[f"fc.0.{key}"].bits == 6
