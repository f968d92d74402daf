"""Studies with shifted images: keys, cells that go on where they stopped, intervals, and the report's section."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_fakes import FakeBackend, config

import quantlens as ql
from quantlens.errors import QuantlensError
from quantlens.evaluation import outputs as kept
from quantlens.plots import FIGURES
from quantlens.report.build import page_context, write_report
from quantlens.studies import measuring
from quantlens.studies.board import board_of
from quantlens.studies.cells import StudyImages, cell_key, plan_study
from quantlens.studies.config import load_config, parse_config
from quantlens.studies.estimate import estimate
from quantlens.studies.robustness import EXTRA, RATIO, robustness
from quantlens.studies.runner import run_study
from quantlens.studies.significance import mark
from quantlens.studies.store import Store

ROOT = Path(__file__).parents[2]
SHIFT = {"v2": "embedded:digits-test[100:160]", "corrupt": ["fog:1,5", "jpeg_compression:3"]}
SETS = ["v2", "fog:1", "fog:5", "jpeg_compression:3"]
SMALL: dict[str, Any] = {"methods": ["minmax"], "bits": ["W8A8", "W2A2"], "id": "embedded:digits-test[0:60]"}


def run(out: Path, **changes: Any) -> FakeBackend:
    backend = FakeBackend(out.parent / f"{out.name}.log")
    limit = changes.pop("limit", None)
    run_study(config(**{**SMALL, **changes}), out, progress=False, backend=backend, limit=limit)
    return backend


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shift") / "store"
    run(out, shift=SHIFT)
    return out


def without_times(directory: Path) -> list[dict[str, Any]]:
    with Store(directory) as store:
        return [{key: v for key, v in cell.result.items() if key != "seconds"} for cell in store.cells()]


@pytest.mark.slow
def test_every_cell_has_the_shifted_sets_and_their_change(study: Path) -> None:
    results = without_times(study)
    assert len(results) == 5
    for result in results:
        assert set(result["shift"]) == set(SETS)
        assert result["shift"]["fog:5"]["source"] == "embedded:digits-test[0:60]?corrupt=fog:5"
    fp32, worst = results[0], results[-1]
    assert worst["bits"] == "W2A2"
    mean, before = worst["shift_mean"]["corruptions"], fp32["shift_mean"]["corruptions"]
    assert mean["relative_mce"] == pytest.approx(mean["mce"] / before["mce"])
    assert worst["change"]["shift_mean"]["corruptions"]["mce"] == pytest.approx(mean["mce"] - before["mce"])
    columns = ql.results(study).rows()[-1]
    assert columns["shift.fog:5.top1"] == worst["shift"]["fog:5"]["top1"]
    path = "full_spectrum_mean.far.msp.auroc"
    assert columns[f"change.{path}"] == pytest.approx(columns[path] - ql.results(study).rows()[0][path])


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_to_the_same_results(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert len(run(out, shift=SHIFT, limit=2).ended()) == 2
    assert len(run(out, shift=SHIFT).ended()) == 5
    assert without_times(out) == without_times(study)
    assert len(run(out, shift=SHIFT).ended()) == 5, "nothing runs again"
    assert len(run(out).ended()) == 10, "without shift these are other cells"
    with Store(out) as store:
        assert "shift" not in store.cells()[0].result


def test_keys_are_those_of_before_without_shift_and_others_with_each_set() -> None:
    def keys(**changes: Any) -> list[str]:
        study = config(**SMALL, **changes)
        images = StudyImages.open(study)
        return [cell_key(cell, study, images, "sha", {}) for cell in plan_study(study)]

    found = [keys(), keys(shift=SHIFT), keys(shift={"corrupt": "fog:1"}), keys(shift={"v2": SHIFT["v2"]})]
    assert len({key for one in found for key in one}) == 4 * len(found[0])
    assert keys(shift={}) == found[0]
    spelled = {"v2": SHIFT["v2"], "corrupt": ["jpeg_compression:3", "fog:5", "fog:1"]}
    assert keys(shift=spelled) == found[1], "the order of sets is no part of a cell"


def test_the_file_names_corruptions_and_paths_are_its_own(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "models: [m]\nbits: [FP32]\nid: imagenet:val\nshift: {v2: 'imagenet:v2', corrupt: 'all:1,3'}\n", "utf-8"
    )
    found = load_config(file)
    assert found.shift == {"v2": f"imagenet:{tmp_path}/v2", "corrupt": ("all:1,3",)}
    again = parse_config(json.loads(json.dumps(found.to_dict())))
    assert again.shift == found.shift
    for given, words in (({"v2": ["images:a"]}, "v2 is .*give the SOURCE"), ({"corrupt": 3}, "shift.corrupt")):
        with pytest.raises(QuantlensError, match=words):
            parse_config({"models": ["m"], "bits": ["FP32"], "id": "images:x", "shift": given})
    with pytest.raises(QuantlensError, match="smoke"):
        StudyImages.open(config(shift={"corrupt": "smoke"}))


def test_the_ready_made_study_is_the_one_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLENS_DATA", "data")
    found = load_config(ROOT / "examples" / "corruption-study.yaml")
    assert found.shift == {"corrupt": ("all:1,3,5",)}
    quantized = [bits for bits in found.bits if bits != "FP32"]
    assert (len(found.models), len(found.methods), len(quantized), len(found.seeds)) == (2, 3, 3, 1)


@pytest.mark.slow
def test_corrupted_pictures_are_made_once_for_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not kept in memory where there is no cache on disk."""
    loaded: list[str] = []
    load = measuring.load_images

    def counting(source: Any, *arguments: Any, **settings: Any) -> Any:
        loaded.append(f"{source.spec} {settings['keep_corrupted']}")
        return load(source, *arguments, **settings)

    monkeypatch.setattr(measuring, "load_images", counting)
    monkeypatch.setenv("QUANTLENS_CACHE", str(tmp_path / "cache"))
    one = {"corrupt": "fog:5"}
    run(tmp_path / "a", shift=one, cache=True, seeds=[0])
    assert loaded.count("embedded:digits-test[0:60]?corrupt=fog:5 True") == 1
    loaded.clear()
    run(tmp_path / "b", shift=one, cache=False, seeds=[0])
    assert loaded.count("embedded:digits-test[0:60]?corrupt=fog:5 False") == 3, "one for each cell"
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


def test_the_estimate_has_the_making_and_measuring_of_shifted_images(tmp_path: Path) -> None:
    study = config(**SMALL, seeds=[0])
    shifted = study.model_copy(update={"shift": parse_config({**study.to_dict(), "shift": SHIFT}).shift})
    found = []
    for one in (study, shifted):

        class Timed(FakeBackend):
            def evaluate(self, model: Any, id: Any, ood: Any, **settings: Any) -> Any:
                assert "shift" not in settings, "a pilot is of few ID images"
                result = super().evaluate(model, id, ood, **settings)
                result.seconds["evaluation"] = float(len(id))
                return result

        found.append(estimate(one, tmp_path / "out", backend=Timed(tmp_path / "log"), progress=False).models["fake"])
    before, after = (dict(cost.kinds)["FP32"][1] for cost in found)
    assert after - before == pytest.approx(240)  # a second for each of 4 x 60 images
    assert found[1].decoding > 0


# ---- intervals and the report ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_intervals_are_those_of_the_images_drawn(study: Path) -> None:
    """The change of top-1 on corrupted images, less that on ID images, and the ratio, against plain resampling."""
    board = board_of(study)
    (group,) = board.groups
    found = robustness(board)[group.index, "W2A2"]
    keys = [board.groups[0].fp32["cell_key"], *(r["cell_key"] for r in group.results("W2A2"))]
    fp32, *cells = (kept.read(kept.path_of(study, key)) for key in keys)

    def of(outputs: Any, rows: np.ndarray) -> tuple[float, float]:
        top1 = {name: (outputs.shift[name]["rank"][rows] == 0).mean() for name in SETS[1:]}
        corrupted = np.mean([(top1["fog:1"] + top1["fog:5"]) / 2, top1["jpeg_compression:3"]])
        return (outputs.rank[rows] == 0).mean(), corrupted

    whole = np.arange(60)
    (clean0, bad0), after = of(fp32, whole), np.mean([of(one, whole) for one in cells], axis=0)
    assert found.values["shift_mean.corruptions.top1"].value == pytest.approx(after[1])
    assert found.changes[EXTRA].value == pytest.approx((after[1] - bad0) - (after[0] - clean0))
    ratios = [r["shift_mean"]["corruptions"]["relative_mce"] for r in group.results("W2A2")]
    assert found.changes[RATIO].value == pytest.approx(np.mean(ratios))
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(2000):
        rows, chosen = rng.integers(0, 60, 60), rng.integers(0, len(cells), len(cells))
        (clean, bad), them = of(fp32, rows), [of(cells[k], rows) for k in chosen]
        drawn.append(np.mean([(one[1] - bad) - (one[0] - clean) for one in them]))
    expected = np.quantile(drawn, [0.025, 0.975])
    width = expected[1] - expected[0]
    assert found.changes[EXTRA][1:] == pytest.approx(expected, abs=0.12 * width)
    for one in (*found.values.values(), *found.changes.values()):
        assert one.low <= one.value + 1e-9
        assert one.value - 1e-9 <= one.high


@pytest.mark.slow
def test_intervals_are_kept_and_missing_outputs_leave_none(study: Path, tmp_path: Path, monkeypatch: Any) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "copy"))
    first = robustness(board_of(copy))
    file = copy / "outputs" / "robustness.json"
    text = file.read_text(encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr("quantlens.studies.robustness.replicate", None)
        assert robustness(board_of(copy)) == first
    assert file.read_text(encoding="utf-8") == text
    file.write_text("{damaged", encoding="utf-8")
    for path in (copy / "outputs").glob("*.npz"):
        path.unlink()
    without = robustness(board_of(copy))
    for place, cell in without.items():
        assert {path: one.value for path, one in cell.values.items()} == {
            path: one.value for path, one in first[place].values.items()
        }
        assert all(one.low is None for one in (*cell.values.values(), *cell.changes.values()))
    assert page_context(board_of(copy))["shift"]["intervals"] is False


@pytest.mark.slow
def test_the_report_has_the_section_only_where_there_is_shift(study: Path, tmp_path: Path) -> None:
    page = write_report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<a href="#shift">Shift</a>' in page
    section = page.split('<section id="shift">')[1].split("</section>")[0]
    assert "3 corrupted versions of the ID images and v2" in section
    board = board_of(study)
    shown = robustness(board)[0, "W2A2"]
    for path, changed in (("id.top1", False), ("shift_mean.corruptions.top1", True), (EXTRA, True), (RATIO, True)):
        value = 100 * (shown.changes if changed else shown.values)[path].value
        signed = f"{value:+.1f}" if changed and path != RATIO else f"{value:.1f}"
        assert f">{signed.replace('-', '−')} (" in section, path
    assert re.search(r"in \d of 2 cells, less in \d;|In each of 2 cells the", section)
    assert "Further metrics of shifted images" in section
    panels = [panel for row in FIGURES["shift"][1](board) for panel in row.panels]
    (clean,) = (panel for panel in panels if panel.detail == "ID images")
    assert [round(row["mean"], 6) for row in clean.rows] == [
        round(100 * robustness(board)[0, bits].values["id.top1"].value, 6) for bits in board.precisions
    ]
    assert all(row["low"] <= row["mean"] <= row["high"] for row in clean.rows)
    (heat,) = (panel for row in FIGURES["corruptions"][1](board) for panel in row.panels)
    assert list(dict.fromkeys(row["corruption"] for row in heat.rows)) == ["fog", "jpeg compression"]
    worst = {row["corruption"]: row["change"] for row in heat.rows if row["bits"] == "W2A2"}
    mean = np.mean([r["change"]["shift"]["jpeg_compression:3"]["top1"] for r in board.groups[0].results("W2A2")])
    assert worst["jpeg compression"] == pytest.approx(100 * mean)

    out = tmp_path / "plain"
    run(out, seeds=[0])
    bare = write_report(out).read_text(encoding="utf-8")
    assert "#shift" not in bare
    assert 'id="shift"' not in bare
    with pytest.raises(QuantlensError, match="holds no data for the figure 'shift'"):
        ql.plot(out, figure="shift")
    assert not (out / "outputs" / "robustness.json").exists()


@pytest.mark.slow
def test_marks_are_untouched_by_shift(study: Path) -> None:
    board = board_of(study)
    mark(board, study)
    assert not any(path.startswith(("shift", "full")) for *_, path in board.unsure)
