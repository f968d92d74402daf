"""Files timed in one call."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.errors import QuantlensError
from quantlens.export import bench as module
from quantlens.export.exported import Opened, Port
from quantlens.studies.benchmarks import timed
from quantlens.studies.store import Store


def _opened(path, threads=None, inner=()):
    """A file that is the mean of its images, without a runtime."""
    record = {
        "plan": json.dumps({"model": "m", "method": "minmax", "bits": "W8A8", "seed": 0}),
        "preprocess": json.dumps(ql.load_model("digits-vit").preprocess.to_dict()),
        "guard": json.dumps({"score": None, "threshold": None}),
        "num_parameters": "10",
    }

    def run(values):
        return {"logits": values["images"].mean((2, 3)).astype(np.float32)}

    return Opened(run, [Port("images", None, "float32")], [Port("logits", (None, 3), "float32")], record, "none 1", ())


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("quantlens.export.exported.open_file", _opened)
    monkeypatch.setattr(module, "_memory", lambda path: 7.0)
    paths = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for k, path in enumerate(paths):
        path.write_bytes(bytes(1000 * (k + 1)))
    return paths


def test_one_call_gives_what_the_command_gives(files, tmp_path):
    steps = []
    found = ql.bench(
        files, batch=[1, 2], threads=1, rounds=3, store=tmp_path / "s", progress=lambda *step: steps.append(step)
    )
    assert [(t["label"], t["batch"], t["threads"]) for t in found.timings] == [
        *(("a.onnx", 1, 1), ("b.onnx", 1, 1)),
        *(("a.onnx", 2, 1), ("b.onnx", 2, 1)),
    ]
    assert steps[-1] == (6, 6)
    data = json.loads(json.dumps(found.to_dict()))
    assert set(data) == {"timings", "contenders", "machine"}
    assert [one["size_mb"] for one in data["contenders"]] == [0.001, 0.002]
    assert data["timings"][0]["speedup"] == 1
    assert "cpu" in data["machine"]
    with Store(tmp_path / "s") as store:
        assert [one.timing for one in timed(store)] == found.timings
    if importlib.util.find_spec("pandas"):
        table = found.to_pandas()
        assert list(table["median_ms"]) == [t["median_ms"] for t in found.timings]
        assert set(table["bits"]) == {"W8A8"}


def test_a_float_model_is_the_baseline(files, monkeypatch):
    """A name, a model or a module; the float files of the runtimes follow, where they are installed."""
    monkeypatch.setattr(module, "float_files", lambda model, folder: [])

    class Net(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    for fp32 in ("digits-vit", ql.load_model("digits-vit"), Net()):
        found = ql.bench(str(files[0]), fp32=fp32, rounds=1)
        assert [t["label"] for t in found.timings] == ["PyTorch eager FP32", "a.onnx"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch is"),
        ({"threads": []}, "threads is"),
        ({"rounds": 0}, "rounds is"),
        ({"rounds": "many"}, "a whole number"),
        ({"peers": True}, "give it, too"),
        ({"weights": "random"}, "give it as fp32"),
        ({"fp32": "digits-vitt"}, "did you mean"),
    ],
    ids=str,
)
def test_mistakes(files, options, words):
    with pytest.raises(QuantlensError, match=words):
        ql.bench(files, **options)
