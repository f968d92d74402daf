from __future__ import annotations

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.errors import QuantlensError
from quantlens.export import bench as module
from quantlens.export.bench import Contender, bench, contender, eager, line_up


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def sleeper(self, label: str, seconds: float) -> Contender:
        """Takes so long for an image."""

        def make(threads: int):
            def run(images):
                self.now += seconds * len(images)

            return run

        return Contender(label, make)


def test_ratios_and_throughput(monkeypatch):
    clock = Clock(monkeypatch)
    slow, fast = clock.sleeper("slow", 0.004), clock.sleeper("fast", 0.002)
    found = bench([slow, fast], input_size=(3, 2, 2), batches=(1, 2), rounds=8)
    assert [(t["label"], t["batch"]) for t in found] == [("slow", 1), ("fast", 1), ("slow", 2), ("fast", 2)]
    assert [t["median_ms"] for t in found] == pytest.approx([4, 2, 8, 4])
    assert [t["speedup"] for t in found] == pytest.approx([1, 2, 1, 2])
    assert found[3]["images_per_second"] == pytest.approx(500)
    assert all(t["p10_ms"] == pytest.approx(t["p90_ms"]) for t in found)
    assert found[0]["size_mb"] is None


def test_runs_are_interleaved():
    """A machine that gets slower in the middle slows both contenders, not one."""
    order = []
    contenders = [
        Contender(name, lambda threads, name=name: lambda images: order.append(name)) for name in ("a", "b", "c")
    ]
    bench(contenders, input_size=(3, 2, 2), rounds=20)
    counted = order[6:]
    assert all(sorted(counted[i : i + 3]) == ["a", "b", "c"] for i in range(0, 60, 3))
    assert len({tuple(counted[i : i + 3]) for i in range(0, 60, 3)}) > 2, "the order is drawn anew"


@pytest.mark.slow
def test_files_and_the_float_model(tmp_path):
    pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")
    from quantlens.export.export import export

    model = ql.load_model("digits-vit")
    path = export(model, tmp_path / "m.onnx")
    found = bench([eager(model), contender(path)], input_size=(3, 32, 32), rounds=3)
    assert found[1]["label"] == "m.onnx"
    assert found[1]["size_mb"] == pytest.approx(path.stat().st_size / 1e6)
    assert found[1]["memory_mb"] is not None
    assert 1 < found[1]["memory_mb"] < 500
    assert set(found[0]) >= {"label", "median_ms", "speedup"}


def test_nothing_to_time():
    with pytest.raises(QuantlensError, match="at least one"):
        bench([], input_size=(3, 2, 2))


class Exported:
    """A file that takes images of the size of its name."""

    def __init__(self, path, threads=1):
        side = int(str(path).partition(".")[0])
        self.preprocess = type("", (), {"input_size": (3, side, side)})

    def run(self, images):
        return images

    def facts(self):
        return {"fingerprint": "f", "runtime": "r"}


def test_who_is_timed(monkeypatch, tmp_path):
    """The float model, its files, what the tools made of them with the images given, the files; in this order."""
    monkeypatch.setattr(module, "Artefact", Exported)
    monkeypatch.setattr(module, "float_files", lambda model, folder: [contender("4.float.onnx")])
    seen = []
    monkeypatch.setattr(module, "peer_files", lambda images, folder: seen.append(images) or {"a tool": "4.tool.onnx"})
    model = ql.load_model("digits-vit")
    images = torch.ones(2, 3, 32, 32)
    found = line_up(["4.onnx", "4.xml"], tmp_path, fp32=model, with_peers=True, peer_images=images)
    assert [c.label for c in found] == ["PyTorch eager FP32", "4.float.onnx", "a tool", "4.onnx", "4.xml"]
    assert np.array_equal(seen[0], images.numpy())
    assert found[0].model(1) is model
    line_up(["4.onnx"], tmp_path, fp32=model, with_peers=True, peer_images="embedded:digits-train")
    assert len(seen[1]) == 32, "as many as ours are calibrated with"
    assert [c.label for c in line_up(["4.onnx"], tmp_path)] == ["4.onnx"]
    for files, options, words in (
        (["4.onnx", "8.onnx"], {}, "different sizes of image"),
        ([], {}, "at least one"),
        (["4.onnx"], {"with_peers": True}, "give it, too"),
    ):
        with pytest.raises(QuantlensError, match=words):
            line_up(files, tmp_path, **options)
