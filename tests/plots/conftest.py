"""Made-up stores, and one with data for every figure."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from report_fakes import attention_cells, attention_store, full_store, make

from quantlens.evaluation.shift import shift_means
from quantlens.sensitivity import Inspection
from quantlens.sensitivity.alone import Effect
from quantlens.sensitivity.inspection import Part
from quantlens.sensitivity.statistics import EdgeStatistics
from quantlens.studies.benchmarks import put_artefact, put_timings
from quantlens.studies.store import INSPECTION, Store

__all__ = ["attention_store", "full_store", "make"]

ALLOCATION = {
    "sensitivity": "sqnr",
    "cost": "size",
    "total": 2.5e6,
    "budget": 3e6,
    "seconds": 1.5,
    "groups": [
        {"name": f"blocks.{i}.{kind}", "kind": kind, "block": f"blocks.{i}", "bits": bits}
        for i, kind, bits in ((0, "attention", 8), (0, "MLP", 4), (1, "attention", 4), (1, "MLP", 6))
    ],
    "frontier": {
        "name": "MP4",
        "model": "deit",
        "sensitivity": "sqnr",
        "cost": "size",
        "points": [[1e6, 1.0], [2e6, 0.1], [4e6, 0.001]],
        "uniform": [[4, 1.2e6, 0.9], [8, 4e6, 0.001]],
        "chosen": [2e6, 0.1],
    },
}


def site(name: str, sqnr: float, kind: str = "linear") -> Part:
    edge = EdgeStatistics(f"{name}.input", "input", False, 8, -1.0, 1.0, 3.0, 40.0, 4, 1.5, (2,))
    return Part(name, kind, "blocks.0", "W8A8", Effect(sqnr, 0.01 / sqnr, 0.0), (edge,))


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> Path:
    """The directory of a study with attention, mixed precision, an inspection and timed files."""
    cells = pickle.loads(attention_cells())
    last = cells[-1]
    sites = (site("blocks.0.a", 40.0), site("blocks.0.b", 12.5, "probs"), site("blocks.0.c", 30.0, "norm"))
    found = Inspection("deit", "sha", "minmax", "W8A8", 0, {"site": sites}, {"n": 4})
    folder = tmp_path_factory.mktemp("study")
    with Store(folder) as store:
        for cell in cells:
            store.put(cell.key, cell.spec, "done", cell.result | under_shift(cell.result))
        store.put("mixed", last.spec | {"bits": "MP4"}, "done", last.result | {"bits": "MP4", "allocation": ALLOCATION})
        store.put(f"{INSPECTION}x", {"model": "deit", "inspects": True}, "done", {"inspection": found.to_dict()})
        files = [facts("fast.onnx"), facts("slow.onnx")]
        for one, top1 in zip(files, (0.7, 0.6), strict=True):
            figures = {"msp": {"aupr_out": top1 - 0.1}}
            measured = {"id": {"fingerprint": "i", "top1": top1, "nll": 1.0}, "ood_mean": {"all": figures}}
            put_artefact(store, one, {"checkpoint_sha256": "c", "ood": {}, **measured})
        put_timings(store, [timing("fast.onnx", 5.0), timing("slow.onnx", 9.0)], files, {"cpu": "a processor"})
    return folder


def under_shift(result: dict[str, Any]) -> dict[str, Any]:
    """What a made-up result has of shifted images."""
    top1, nll, ece = (result["id"][name] for name in ("top1", "nll", "ece"))
    amounts = {"v2": 0.05, "fog:1": 0.1, "fog:3": 0.3, "snow:3": 0.4}
    sets = {
        name: {"n": 400, "top1": top1 * (1 - amount), "top5": top1, "nll": nll + amount, "ece": ece, "brier": nll}
        for name, amount in amounts.items()
    }
    means = {"shift_mean": shift_means(sets), "full_spectrum_mean": result["ood_mean"]}
    return {"shift": sets, "full_spectrum": result["ood"], **means}


def facts(name: str) -> dict[str, Any]:
    known = {"file": name, "runtime": "onnxruntime 1", "model": "m", "method": "minmax", "bits": "W8A8", "seed": 0}
    return {"fingerprint": f"print of {name}", "checkpoint_sha256": "c", "size_mb": 2.0, **known}


def timing(name: str, median: float) -> dict[str, Any]:
    known = {"label": name, "batch": 1, "threads": 2, "size_mb": 2.0, "memory_mb": None, "runtime": "onnxruntime 1"}
    spread = {"median_ms": median, "p10_ms": median - 1, "p90_ms": median + 1, "images_per_second": 1000 / median}
    return {"fingerprint": f"print of {name}", "speedup": 1.0, **known, **spread}
