"""The race of benchmarks/race.py: what is kept of it, without running it."""

from __future__ import annotations

import json

import pytest
from benchmarks import race
from benchmarks.support import cells


def line(model="DeiT-Tiny", cpu="P", images=None, ms=8.0):
    """A line of the file that a race writes."""
    facts = [
        {"fingerprint": name, "runtime": f"r {name}", "method": m, "bits": bits, "integers": kept, "size_mb": size}
        for name, m, bits, kept, size in (("a", "fp32", "FP32", None, None), ("b", "nncf", "W8A8", "saturate", 6.1234))
    ]
    timings = [
        {"label": f"label {name}", "fingerprint": name, "batch": batch, "threads": 2, "speedup": 1.2345}
        | {"median_ms": ms * batch, "front": True, "top1": 0.78125, "nll": 0.5, "aupr_out": 0.9, "sqnr_db": 20.12345}
        | {"agreement": None, "p10_ms": 1.0}
        for batch in (1, 8)
        for name in "ab"
    ]
    about = {"cpu": cpu, "vnni": True, "model": model, "date": "2026-12-01", "versions": {"torch": "2"}, "rounds": 30}
    return about | {"images": images, "minutes": 1.0, "contenders": facts, "timings": timings}


def test_a_row_for_each_contender():
    found = race.shown(line())
    assert {key: found[key] for key in ("cpu", "vnni", "model")} == {"cpu": "P", "vnni": True, "model": "DeiT-Tiny"}
    first, second = found["rows"]
    assert (first["size_mb"], second["size_mb"], second["integers"]) == (None, 6.12, "saturate")
    assert (second["top1"], second["aupr_out"], second["sqnr_db"]) == (78.12, 90.0, 20.123)
    assert "agreement" not in second
    assert second["latency"] == {
        "1 on 2": {"median_ms": 8.0, "speedup": 1.23, "front": True},
        "8 on 2": {"median_ms": 64.0, "speedup": 1.23, "front": True},
    }


def test_published_by_processor(monkeypatch, tmp_path):
    """A later race of a model on the same processor takes the place of the earlier one; others stay. A try is not
    published."""
    results, out = tmp_path / "results.json", tmp_path / "race.jsonl"
    results.write_text(json.dumps({"sets": {}, "rows": []}))
    monkeypatch.setattr(cells, "FILE", results)

    def publish(*lines):
        out.write_text("".join(json.dumps(one) + "\n" for one in lines))
        monkeypatch.setattr("sys.argv", ["race", "--out", str(out), "--publish"])
        race.main()
        return [(r["cpu"], r["model"], r["rows"][0]["latency"]["1 on 2"]["median_ms"]) for r in kept()]

    def kept():
        return json.loads(results.read_text())["races"]

    publish(line(), line("Swin-T"))
    assert publish(line(ms=4.0), line(cpu="Q")) == [("P", "DeiT-Tiny", 4), ("P", "Swin-T", 8), ("Q", "DeiT-Tiny", 8)]
    with pytest.raises(SystemExit, match="a try"):
        publish(line(images=8))
    assert len(kept()) == 3


def test_what_is_there_is_not_run_again(monkeypatch, tmp_path):
    out = tmp_path / "race.jsonl"
    out.write_text(json.dumps(race.here() | {"model": "Swin-T"}) + "\n")
    asked = []
    monkeypatch.setattr(race, "numbers", lambda cell, rounds, images: asked.append((cell["model"], rounds)) or {})
    monkeypatch.setattr("sys.argv", ["race", "--out", str(out), "--rounds", "7"])
    race.main()
    assert [model for model, _ in asked] == [*race.MODELS, "DeiT-Small", "DINOv2-S, 224 px", "scenes-detr"]
    assert {rounds for _, rounds in asked} == {7}
