"""The decision page: exported files by accuracy, OOD detection, latency and size."""

from __future__ import annotations

import re
from typing import Any

from quantlens.report import write_report
from quantlens.studies.benchmarks import put_artefact, put_timings
from quantlens.studies.choices import pareto
from quantlens.studies.store import Store

CHECKPOINT = "c" * 64
MACHINE = {"cpu": "a <fast> processor (2 cores)", "platform": "Linux"}


def facts(name: str, bits: str = "W8A8", runtime: str = "openvino 1") -> dict[str, Any]:
    return {
        "fingerprint": f"print of {name}",
        "file": name,
        "runtime": runtime,
        "model": "m",
        "method": "fp32" if bits == "FP32" else "minmax",
        "bits": bits,
        "seed": 0,
        "checkpoint_sha256": CHECKPOINT,
        "size_mb": 1.0,
    }


def timing(name: str, median: float, size: float | None = 1.0, batch: int = 1) -> dict[str, Any]:
    return {
        "label": name,
        "batch": batch,
        "threads": 2,
        "median_ms": median,
        "p10_ms": median - 1,
        "p90_ms": median + 1,
        "images_per_second": 1000 / median,
        "size_mb": size,
        "memory_mb": None,
        "speedup": 1.0,
        "fingerprint": f"print of {name}",
        "runtime": "openvino 1",
    }


def result(top1: float, aupr: float, *, images: str = "i", **more: Any) -> dict[str, Any]:
    figures = {"msp": {"aupr_out": aupr}}
    return {
        "checkpoint_sha256": CHECKPOINT,
        "id": {"fingerprint": images, "top1": top1, "nll": 1.0},
        "ood": {"far": {"fingerprint": "o", **figures}},
        "ood_mean": {"all": figures},
        **more,
    }


def test_the_front():
    points = [(1.0, 4.0), (2.0, 2.0), (2.0, 3.0), None, (2.0, 2.0), (4.0, 1.0)]
    assert pareto(points) == [0, 1, 1, None, 4, 5]
    assert pareto([]) == []


def page(store: Store) -> str:
    return write_report(store.directory).read_text(encoding="utf-8")


def rows(html: str) -> dict[str, list[str]]:
    """The decision table's rows by file."""
    table = html.split("<figcaption>Exported files")[1].split("</table>")[0]
    found = [re.findall(r"<td[^>]*>([^<\n]*)", row) for row in table.split("<tbody>")[1].split("<tr>")]
    return {row[1]: row for row in found if len(row) > 1}


def test_a_store_of_files_alone_becomes_a_page(tmp_path):
    store = Store(tmp_path)
    guard = {
        "score": "energy",
        "keep": 0.95,
        "threshold": {"value": 7.5, "n": 200, "kept": 0.955, "images": "mine:pictures"},
        "separation": {"energy": {"shuffled": 0.9, "noise": 0.8}, "gen": {"shuffled": 0.7, "noise": 0.9}},
        "id": {"n": 400, "kept": 0.9375},
        "ood": {"far": {"n": 100, "flagged": 0.5, "balanced_accuracy": 0.71875}},
    }
    fp32 = {"id": {"top1": 0.8, "nll": 0.9}, "ood_mean": {"all": {"msp": {"aupr_out": 0.71}}}}
    put_artefact(store, facts("good.xml"), result(0.79, 0.7, guard=guard, fp32=fp32))
    put_artefact(store, facts("bad.xml"), result(0.75, 0.6))
    put_artefact(store, facts("elsewhere.xml"), result(0.99, 0.99, images="other"))
    put_artefact(store, facts("good.xml"), result(0.79, 0.7, guard=guard, fp32=fp32))
    names = ["fp32.xml", "good.xml", "bad.xml", "elsewhere.xml", "new.xml"]
    times = [10.0, 5.0, 6.0, 4.0, 3.0]
    sizes = [4.0, 1.0, 1.0, 1.0, None]
    described = [facts(n, "FP32" if n == "fp32.xml" else "W8A8") for n in names]
    described[2]["integers"] = "saturate"
    put_timings(store, [timing(*t) for t in zip(names, times, sizes, strict=True)], described, MACHINE)
    html = page(store)
    found = rows(html)
    assert found["good.xml"][5:8] == ["79.00", "1.000", "70.0"]
    assert found["good.xml"][9] == "2.00", "twice as fast as FP32 in the same runtime"
    assert found["good.xml"][2] == "on the front"
    assert found["fp32.xml"][5] == "80.00 (measured in PyTorch)"
    assert found["fp32.xml"][2] == "on the front", "slower and larger, but more accurate"
    assert found["bad.xml"][2] == "no: 2 is better"
    assert [found[name][3] for name in ("good.xml", "bad.xml")] == ["openvino 1", "openvino 1, integers saturate"]
    assert found["elsewhere.xml"][5:8] == ["evaluated on other images"] * 3
    assert found["elsewhere.xml"][2] == "not weighed"
    assert found["new.xml"][5:8] == ["not evaluated"] * 3
    assert found["new.xml"][11] == "no file"
    told = html.split("How often the guards are right")[-1]
    assert all(text in told for text in ("93.8", "200 images (mine:pictures)", "Energy 85.0; GEN 80.0"))
    assert "a &lt;fast&gt; processor" in html
    assert "<fast>" not in html
    assert html.count('class="chart decision"') == 2


def test_files_of_detectors_are_weighed_by_map(tmp_path):
    store = Store(tmp_path)
    names, found = ["good.xml", "bad.xml"], [(0.5, 0.7), (0.4, 0.6)]
    for name, (value, aupr) in zip(names, found, strict=True):
        scores = {"max_confidence": {"aupr_out": aupr}}
        ids = {"fingerprint": "i", "map": value, "map50": value + 0.2, "d_ece": 0.1}
        ood = {"ood": {"far": {"fingerprint": "o", **scores}}, "ood_mean": {"all": scores}}
        put_artefact(store, facts(name), {"checkpoint_sha256": CHECKPOINT, "task": "detect", "id": ids, **ood})
    put_timings(store, [timing(name, 5.0) for name in names], [facts(name) for name in names], MACHINE)
    html = page(store)
    table = rows(html)
    assert table["good.xml"][5:8] == ["50.00", "70.00", "70.0"]
    assert table["good.xml"][2] == "on the front"
    assert table["bad.xml"][2] == "no: 1 is better"
    assert "at least as good in mAP, AUPR-out (largest confidence)" in html
    assert "mAP against latency" in html
    assert "top-1" not in html.split('id="decision"')[1].split("</section>")[0]


def test_latencies_of_several_runs_are_told_apart(tmp_path):
    store = Store(tmp_path)
    put_timings(store, [timing("a.xml", 5.0)], [facts("a.xml")], MACHINE)
    put_timings(store, [timing("a.xml", 4.0)], [facts("a.xml")], MACHINE)
    assert "different runs" not in page(store)
    assert rows(page(store))["a.xml"][8].startswith("4.00 "), "the newest timing of a file counts"
    put_timings(store, [timing("fp32.xml", 8.0)], [facts("fp32.xml", "FP32")], MACHINE)
    html = page(store)
    assert "different runs" in html
    assert rows(html)["a.xml"][9] == "FP32 not timed", "a ratio is one of a single run"


def test_a_study_without_files_has_no_such_section(small_store, tmp_path):
    html = write_report(small_store, tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'id="decision"' not in html
