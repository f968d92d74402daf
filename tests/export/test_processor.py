from __future__ import annotations

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.export import exported
from quantlens.export.export import export
from quantlens.export.exported import Artefact, may_saturate


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
    monkeypatch.setattr(exported.platform, "machine", lambda: machine)
    monkeypatch.setattr(exported, "processor", lambda fact: flags)
    exported.saturates.cache_clear()
    assert exported.saturates() is expected
    exported.saturates.cache_clear()


@pytest.fixture(scope="module")
def sums():
    """A layer whose inputs and weights have the largest codes everywhere, where 16-bit sums of two would saturate; with
    images."""
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
    return ql.load_model(Sums(), input_size=(3, 4, 4), name="sums"), images


def _file(sums, bits, path):
    model, images = sums
    qmodel = ql.quantize(model, images, method="minmax", bits=bits, target="openvino-cpu")
    return export(qmodel, path), qmodel(images).numpy(), images.numpy()


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
@pytest.mark.parametrize("bits", ["W8A8", "W7A8"])
def test_the_largest_codes_are_added_exactly(sums, ending, bits, tmp_path):
    path, expected, images = _file(sums, bits, tmp_path / f"m{ending}")
    assert np.allclose(Artefact(path, threads=1).run(images)[0], expected, rtol=1e-4)


def test_seven_bits_need_no_setting(sums, tmp_path, monkeypatch):
    """Sums of 7-bit weights fit 16 bits: a session that knows nothing of quantlens is right on every processor, and no
    advice is given; the same holds of a file that says so, and of none that does not."""
    import onnxruntime

    path, expected, images = _file(sums, "W7A8", tmp_path / "m.onnx")
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert np.allclose(plain.run(["logits"], {"images": images})[0], expected, rtol=1e-4)
    monkeypatch.setattr("quantlens.export.exported.saturates", lambda: True)
    assert Artefact(path).advice() == []
    wide = _file(sums, "W8A8", tmp_path / "w.onnx")[0]
    assert "W7A8" in Artefact(wide).advice()[0]
    assert may_saturate({})
