"""Contenders of a race evaluated on the same images, and the front of quality against latency."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from study_fakes import FakeModel, quantized

import quantlens as ql
from quantlens.errors import QuantlensError
from quantlens.export.bench import Contender
from quantlens.studies import bench as module
from quantlens.studies.benchmarks import evaluated as stored, timed
from quantlens.studies.quality import HIGHEST_DB, OF_QUALITY, add_quality, quality
from quantlens.studies.store import Store

IMAGES = "embedded:digits-test[0:24]"
OOD = {"letters": "embedded:letters[0:16]", "near": "embedded:digits-held-out[0:16]"}


def result(logits, task="classify", **ids):
    return SimpleNamespace(
        id=ids,
        task=task,
        ood_mean={"all": {"energy": {"aupr_out": 0.1}, "msp": {"aupr_out": 0.75}}},
        outputs=SimpleNamespace(logits=None if logits is None else np.array(logits, np.float16)),
    )


def test_quality_against_the_float_model():
    true = result([[3.0, 0.0], [0.0, 4.0]], top1=1.0, nll=0.5)
    own = result([[3.0, 0.0], [5.0, 4.0]], top1=0.5, nll=0.75)
    expected = {"top1": 0.5, "nll": 0.75, "aupr_out": 0.75, "sqnr_db": 0.0, "agreement": 0.5}
    assert quality(own, true) == pytest.approx(expected), "signal 25, noise 25; one of two agrees"
    assert quality(true, true)["sqnr_db"] == HIGHEST_DB
    near = result([[3.0, 0.0], [0.0, 4.5]])
    assert quality(near, true)["sqnr_db"] == pytest.approx(20), "signal 25, noise 0.25"
    assert [quality(own, None)[name] for name in OF_QUALITY] == [0.75, None, None]
    boxes = quality(result(None, "detect", map=0.25, map50=0.5), true)
    assert boxes == {"map": 0.25, "map50": 0.5, "aupr_out": 0.75, "sqnr_db": None, "agreement": None}


def rows(*times):
    return [{"fingerprint": name, "batch": b, "threads": 1, "median_ms": ms} for name, b, ms in times]


def contenders(*names):
    return [{"fingerprint": n, "bits": "FP32" if n == "fp32" else "W8A8", "integers": f"of {n}"} for n in names]


def test_the_front_is_that_of_each_place():
    """Of SQNR against latency: at batch 1 the near one is as fast as any, at batch 8 it is slower than the float."""
    true = result([[3.0, 0.0], [0.0, 4.0]], top1=0.5, nll=1.0)
    near, far = (result([[3.0, 0.0], [0.0, 4.0 + d]], top1=1.0, nll=1.0) for d in (0.5, 2.0))
    found = rows(("fp32", 1, 9), ("near", 1, 4), ("far", 1, 4), ("fp32", 8, 9), ("near", 8, 10), ("far", 8, 3))
    by = add_quality(found, contenders("fp32", "near", "far"), {"fp32": true, "near": near, "far": far})
    assert by == "sqnr_db"
    assert [row["front"] for row in found] == [True, True, False, True, False, True]
    assert found[1]["integers"] == "of near"
    assert found[1]["sqnr_db"] == found[4]["sqnr_db"] == pytest.approx(20)


def test_without_a_float_model_the_front_is_of_accuracy():
    found = rows(("a", 1, 4), ("b", 1, 5), ("c", 1, 6))
    logits = [[1.0, 0.0]]
    measured = {name: result(logits, top1=top1, nll=1.0) for name, top1 in (("a", 0.5), ("b", 0.25), ("c", 0.75))}
    assert add_quality(found, contenders("a", "b", "c"), measured) == "top1"
    assert [row["front"] for row in found] == [True, False, True]


@pytest.fixture
def raced(monkeypatch):
    """A race of a float model with two quantized ones that stand for files: the call, these, the float one, and what
    the contenders are made with."""
    model = FakeModel()
    made = {bits: quantized(model, bits) for bits in ("W8A8", "W3A3")}

    def contender(name, one, bits):
        facts = {"fingerprint": name, "model": "digits-vit", "method": "minmax", "bits": bits, "size_mb": 1.0}
        facts |= {"runtime": "r", "integers": None}
        return Contender(name, lambda threads: lambda images: None, None, facts, lambda threads: one)

    lined = [contender("fp32", model, "FP32"), *(contender(bits, one, bits) for bits, one in made.items())]
    given = {}
    monkeypatch.setattr(module, "line_up", lambda paths, folder, **how: given.update(how) or lined)
    monkeypatch.setattr(module, "_float", lambda model, weights: model)
    return lambda **options: ql.bench("any.onnx", fp32=model, rounds=3, **options), made, model, given


def test_a_race_with_images(raced, tmp_path):
    """Every contender's metrics are those that `evaluate` gives it on these images; FP32 is the reference; all of it is
    kept in a store, and the timings there are as without images."""
    run, made, model, given = raced
    told = []
    found = run(
        id=IMAGES, ood=OOD, store=tmp_path, peers=True, calibration="c", evaluating=lambda *said: told.append(said)
    )
    assert (given["with_peers"], given["peer_images"]) == (True, "c")
    assert told[-1] == ("evaluating", 3 * (24 + 32), 3 * (24 + 32))
    assert sorted(done for what, done, _ in told if what == "evaluating") == [
        d for w, d, _ in told if w == "evaluating"
    ]
    rows = {row["label"]: row for row in found.timings}
    alone = ql.evaluate(made["W3A3"], IMAGES, OOD, reference=model)
    assert rows["W3A3"]["top1"] == alone.id["top1"] == found.results["W3A3"].id["top1"]
    assert rows["W3A3"]["aupr_out"] == pytest.approx(alone.ood_mean["all"]["msp"]["aupr_out"])
    assert found.results["W3A3"].change["id"] == pytest.approx(alone.change["id"])
    images = ql.data.load_images(ql.data.open_source(IMAGES), model.preprocess).tensor()
    true, own = (one.outputs(images).logits.double() for one in (model, made["W3A3"]))
    expected = 10 * torch.log10(true.square().sum() / (true - own).square().sum())
    assert rows["W3A3"]["sqnr_db"] == pytest.approx(float(expected), abs=0.05)
    assert rows["W3A3"]["agreement"] == pytest.approx(float((true.argmax(1) == own.argmax(1)).double().mean()))
    assert (rows["fp32"]["sqnr_db"], rows["fp32"]["agreement"]) == (HIGHEST_DB, 1)
    assert rows["W3A3"]["sqnr_db"] < rows["W8A8"]["sqnr_db"] <= HIGHEST_DB
    with Store(tmp_path) as store:
        assert {facts["fingerprint"] for facts, _ in stored(store)} == set(rows)
        kept = timed(store)
    assert all(one.result is not None and "top1" not in one.timing for one in kept)


def test_mistakes(raced):
    run = raced[0]
    for options, words in (
        ({"ood": OOD}, "give these, too"),
        ({"id": IMAGES, "peers": True}, "--calibration"),
        ({"id": "embedded:letters[0:8]"}, "label"),
    ):
        with pytest.raises(QuantlensError, match=words):
            run(**options)
