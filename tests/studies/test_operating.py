"""The operating point of a study: in results, in the report, kept for the next one, and its absence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from study_fakes import FakeBackend, config

from quantlens.errors import QuantlensError
from quantlens.evaluation import outputs as kept
from quantlens.metrics import threshold_keeping
from quantlens.metrics.operating import Promise
from quantlens.report.operating import section
from quantlens.studies.board import board_of
from quantlens.studies.compare import compare
from quantlens.studies.config import parse_config
from quantlens.studies.operating import operating
from quantlens.studies.results import results
from quantlens.studies.runner import run_study
from quantlens.studies.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("operating") / "store"
    settings = {"methods": ["minmax"], "bits": ["FP32", "W4A4"], "operating": {"coverage": 0.8, "keep": 0.9}}
    run_study(config(**settings), out, progress=False, backend=FakeBackend(out.parent / "log"))
    return out


def outputs_by_bits(store: Path) -> dict[str, list[kept.Outputs]]:
    found: dict[str, list[kept.Outputs]] = {}
    for cell in Store(store).cells():
        found.setdefault(cell.spec["bits"], []).append(kept.read(kept.path_of(store, cell.key)))
    return found


def test_rows_of_results_are_what_numpy_counts(store: Path) -> None:
    """Two seeds of one quantized model against FP32, with the promises of the study file."""
    found = outputs_by_bits(store)
    (fp32,), cells = found["FP32"], found["W4A4"]
    rows = results(store).operating()
    assert {(row["bits"], row["seeds"]) for row in rows} == {("W4A4", 2)}
    by = {(row["thresholds"], row["set"], row["score"], row["metric"]): row for row in rows}
    for how in ("same", "again"):
        for score in ("msp", "energy"):
            cuts = [threshold_keeping((fp32 if how == "same" else o).id_scores[score], 0.9) for o in cells]
            own = threshold_keeping(fp32.id_scores[score], 0.9)
            alarms = by[how, "id", score, "false_alarms"]
            assert alarms["fp32"] == pytest.approx((fp32.id_scores[score] < own).mean())
            of_each = [(o.id_scores[score] < t).mean() for o, t in zip(cells, cuts, strict=True)]
            assert alarms["quantized"] == pytest.approx(np.mean(of_each))
            misses = by[how, "letters", score, "misses"]
            of_each = [(o.ood_scores["letters"][score] >= t).mean() for o, t in zip(cells, cuts, strict=True)]
            assert misses["quantized"] == pytest.approx(np.mean(of_each))
            assert misses["change"] == pytest.approx(misses["quantized"] - misses["fp32"])
            assert misses["low"] <= misses["high"]
        coverage = by[how, "id", "", "coverage"]
        assert coverage["fp32"] >= 0.8
    assert by["again", "id", "", "coverage"]["quantized"] >= 0.8
    other = results(store).operating(accuracy=0.5)
    assert {row["metric"] for row in other} == {row["metric"] for row in rows}


def test_answers_are_kept_for_the_next_report_and_depend_on_the_promise(store: Path) -> None:
    first = operating(board_of(store))
    file = store / "outputs" / "operating.json"
    held = json.loads(file.read_text())
    assert operating(board_of(store)) == first
    other = operating(board_of(store), Promise(coverage=0.5))
    assert other.rows[0].metrics["operating.same.id.coverage"].a < 0.8
    assert json.loads(file.read_text()) == held, "another promise leaves what the report needs"
    file.write_text("damaged")
    again = operating(board_of(store))
    assert [dataclasses.asdict(r)["metrics"] for r in again.rows] == [
        dataclasses.asdict(r)["metrics"] for r in first.rows
    ]


def test_compare_sets_thresholds_on_fp32_whichever_side_it_is(store: Path) -> None:
    settings = {"coverage": 0.8, "keep": 0.9, "resamples": 100, "scores": ["all"]}
    straight = compare(f"{store}:bits=FP32", f"{store}:bits=W4A4", **settings).groups[0]
    turned = compare(f"{store}:bits=W4A4", f"{store}:bits=FP32", **settings).groups[0]
    assert (straight.set_on, turned.set_on) == ("A", "B")
    for one, other in zip(straight.operating, turned.operating, strict=True):
        assert (one.path, one.a, one.b) == (other.path, other.b, other.a)
        assert one.difference == -other.difference
    rows = {r["metric"]: r for r in results(store).operating() if r["thresholds"] == "same" and r["set"] == "id"}
    coverage = next(one for one in straight.operating if one.path == "operating.same.id.coverage")
    assert coverage.difference == rows["coverage"]["change"]
    assert [f.counts for f in straight.flips] == operating(board_of(store)).rows[0].flips


def test_the_same_model_does_not_change(store: Path) -> None:
    found = compare(f"{store}:bits=FP32", f"{store}:bits=FP32", resamples=100).groups[0]
    assert found.flips[0].images == []
    assert all(one.difference == one.low == one.high == 0 for one in found.operating)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["operating"]


def test_without_outputs_everyone_says_so(store: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(store, bare)
    shutil.rmtree(bare / "outputs")
    shown = section(board_of(bare))
    assert shown is not None
    assert shown["reason"].startswith("There is no operating point, as the per-image outputs")
    with pytest.raises(QuantlensError, match=r"no operating point.*outputs: false"):
        results(bare).operating()
    group = compare(f"{bare}:bits=FP32", f"{bare}:bits=W4A4").groups[0]
    assert group.without_interval.startswith("no intervals, operating point, flips or classes")
    assert (group.operating, group.flips, group.classes) == ([], [], [])


def test_a_promise_in_a_study_file_is_checked() -> None:
    given = {"models": ["digits-vit"], "bits": ["FP32"], "id": "embedded:digits-test"}
    assert parse_config(given).operating.keep == 0.95
    for wrong in ({"keep": 2}, {"coverage": 0.5, "accuracy": 0.5}):
        with pytest.raises(QuantlensError, match="operating"):
            parse_config({**given, "operating": wrong})
