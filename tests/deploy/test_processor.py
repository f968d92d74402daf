from __future__ import annotations

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.deploy import processor
from quantlens.deploy.artefact import Artefact
from quantlens.deploy.export import export


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fma avx avx2", True),
        ("x86_64", "avx2 avx512f avx512bw", True),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("AMD64", "avx2 avx_vnni", False),
        ("x86_64", "avx2 avx512bw amx_tile amx_int8", False),
        ("x86_64", "", True),
        ("aarch64", "", False),
    ],
)
def test_which_processors_saturate(machine, flags, expected, monkeypatch):
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(processor, "_flags", lambda: frozenset(flags.split()))
    processor.saturates.cache_clear()
    assert processor.saturates() is expected
    processor.saturates.cache_clear()


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_the_largest_codes_are_added_exactly(ending, tmp_path):
    """A layer whose inputs and weights have the largest codes everywhere, where 16-bit sums of two would saturate."""
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package, reason="the deploy extra is not installed")

    class Sums(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(48, 4)
            torch.nn.init.constant_(self.linear.weight, 0.5)

        def forward(self, images):
            return self.linear(images.flatten(1))

    images = torch.ones(2, 3, 4, 4)
    images[1] *= 0.75  # no tie between two codes
    model = ql.load_model(Sums(), input_size=(3, 4, 4), name="sums")
    qmodel = ql.quantize(model, images, method="minmax", bits="W8A8", target="openvino-cpu")
    got = Artefact(export(qmodel, tmp_path / f"m{ending}"), threads=1).run(images.numpy())[0]
    assert np.allclose(got, qmodel(images).numpy(), rtol=1e-4)
