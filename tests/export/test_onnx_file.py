"""Files written piece by piece are those that ONNX reads."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import psutil
import pytest
import torch

import quantlens as ql
from quantlens.errors import UnsupportedError
from quantlens.export.onnx_file import Initializer, check, pieces

onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")


def _model():
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 50])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_the_pieces_are_the_file():
    weight = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32).T
    other = np.arange(5, dtype=np.int64)
    initializers = [Initializer.of("w", weight), Initializer.of("k", other)]
    check(_model(), initializers)
    content = b"".join(pieces(_model(), initializers))
    read = onnx.load_from_string(content)
    onnx.checker.check_model(read, full_check=True)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in read.graph.initializer}
    assert np.array_equal(held["w"], weight)
    assert np.array_equal(held["k"], other)
    assert len(read.SerializeToString()) == len(content)
    with pytest.raises(onnx.shape_inference.InferenceError):
        check(_model(), [Initializer.of("w", np.zeros((41, 50), np.float32))])


def test_two_gigabytes_are_refused(monkeypatch):
    monkeypatch.setattr("quantlens.export.onnx_file.LIMIT", 1000)
    with pytest.raises(UnsupportedError, match="fewer bits"):
        list(pieces(_model(), [Initializer.of("w", np.zeros((40, 50), np.float32))]))


def test_export_keeps_weights_in_memory_once(tmp_path):
    """The peak of an export stays below half of the model: what is written is read from the model itself."""
    from quantlens.export.export import export

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(1536, 1536) for _ in range(12))
            self.first = torch.nn.Linear(48, 1536)

        def forward(self, images):
            x = self.first(images.flatten(1))
            for layer in self.layers:
                x = layer(x)
            return x

    model = ql.qmodel.float_model(ql.load_model(Wide(), input_size=(3, 4, 4), name="wide"))
    size = 4 * model.num_parameters
    export(ql.qmodel.float_model(ql.load_model("digits-vit")), tmp_path / "warm.onnx")
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.001)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    path = export(model, tmp_path / "m.onnx")
    done.set()
    watcher.join()
    assert os.path.getsize(path) > size
    assert peak[0] - before < size / 2
