from __future__ import annotations

import pytest

import quantlens as ql
from quantlens.errors import QuantlensError
from quantlens.export import bench as module
from quantlens.export.bench import Contender, bench, contender, eager, race


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


def test_a_race_of_files(monkeypatch):
    """In one call: timings in the order of the files, with what each of them is."""
    monkeypatch.setattr(module, "Artefact", Exported)
    timings, facts = race(["4.onnx", "4.xml"], rounds=3, memory=False)
    assert [t["label"] for t in timings] == ["4.onnx", "4.xml"]
    assert facts == [{"fingerprint": "f", "runtime": "r"}] * 2
    for files, options, words in (
        (["4.onnx", "8.onnx"], {}, "different sizes of image"),
        ([], {}, "at least one"),
        (["4.onnx"], {"with_peers": True}, "give it, too"),
    ):
        with pytest.raises(QuantlensError, match=words):
            race(files, **options)
