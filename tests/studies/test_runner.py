"""Running a study: nothing lost, nothing twice, whatever happens in between."""

from __future__ import annotations

import sqlite3
import warnings
from collections import Counter
from pathlib import Path

import pytest
from study_fakes import FakeBackend, Recorder, config

from quantlens.errors import QuantlensError, QuantlensWarning, StorageError, UnknownNameError
from quantlens.studies.cells import StudyImages, cell_key, plan_study
from quantlens.studies.progress import duration
from quantlens.studies.runner import StudyInterrupted, run_study
from quantlens.studies.store import Store

CELLS = 9


def run(out: Path, log: Path, study=None, backend: FakeBackend | None = None, **settings):
    backend = backend or FakeBackend(log)
    return run_study(study or config(), out, progress=False, backend=backend, **settings)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "study"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


class Warns(FakeBackend):
    def load_model(self, *arguments):
        warnings.warn("this misleads", QuantlensWarning, stacklevel=2)
        return super().load_model(*arguments)


def test_what_workers_warn_of_is_told_once(out: Path, log: Path) -> None:
    """Two models are loaded, each with the same warning."""
    study = config(models=["fake", "other"], methods=[], bits=["FP32"])
    with pytest.warns(QuantlensWarning, match="this misleads") as told:
        assert run(out, log, study, Warns(log)).ran == 2
    assert len(told) == 1


# ---- the grid and its keys -------------------------------------------------------------------------------------------


def test_the_plan(log: Path) -> None:
    cells = plan_study(config(), FakeBackend(log))
    assert len(cells) == CELLS
    assert [str(c) for c in cells[:3]] == ["fake FP32", "fake minmax W8A8 seed 0", "fake minmax W8A8 seed 13"]
    assert not log.exists()  # nothing was loaded
    assert len(plan_study(config(bits=["W4A4"], seeds=[1]), FakeBackend(log))) == 3  # FP32 is always measured
    assert len(plan_study(config(bits=["FP32"], methods=[]), FakeBackend(log))) == 1
    with pytest.raises(UnknownNameError, match="did you mean 'minmax'"):
        plan_study(config(methods=["minmx"]), FakeBackend(log))


def key(log: Path, index: int = 1, sha: str = "abc", preprocess: object = "p", **changes: object) -> str:
    backend = FakeBackend(log)
    study = config(**changes)
    cell = plan_study(study, backend)[index]
    return cell_key(cell, study, StudyImages.open(study), sha, {"p": preprocess})


def test_keys_are_stable(log: Path, tmp_path: Path) -> None:
    """Names and paths that change no figure do not change the key."""
    base = key(log)
    assert len(base) == 64
    assert key(log) == base
    assert key(log, name="another name") == base
    assert key(log, models=[{"name": "fake", "label": "F"}]) == base
    assert key(log, models=[{"name": "fake", "weights": "/elsewhere/w.safetensors"}]) == base
    assert key(log, methods=[{"name": "minmax", "label": "MM"}, "percentile"]) == base
    assert key(log, batch_size=7, device="cpu", cache=True, skip_bad=True) == base
    assert key(log, seeds=[0, 13, 37]) == base
    assert key(log, id="embedded:digits-test[:100]") == base  # the same images in other words
    # FP32 has neither seed nor calibration
    assert key(log, 0) == key(log, 0, seeds=[5], calibration={"source": "embedded:digits-calibration", "n": 32})


@pytest.mark.parametrize(
    "changes",
    [
        {"sha": "abd"},
        {"preprocess": "q"},
        {"index": 2},
        {"index": 3},
        {"index": 5},
        {"models": [{"name": "fake2"}]},
        {"models": [{"name": "fake", "options": {"num_classes": 8}}]},
        {"methods": [{"name": "minmax", "head_bits": 8}]},
        {"seeds": [1]},
        {"bits": ["W7A7"]},
        {"calibration": {"source": "embedded:digits-calibration", "n": 15}},
        {"id": "embedded:digits-test[0:99]"},
        {"ood": {"letters": "embedded:letters[0:40]"}},
        {"ood": {"letters": "embedded:letters[0:40]", "renamed": "embedded:digits-held-out[0:40]"}},
        {
            "ood": {
                "letters": {"source": "embedded:letters[0:40]", "group": "near"},
                "other": "embedded:digits-held-out[0:40]",
            }
        },
        {"fit": "embedded:digits-fit"},
        {"scores": ["msp"]},
    ],
    ids=str,
)
def test_keys_are_sensitive(log: Path, changes: dict) -> None:
    assert key(log, **changes) != key(log)


def test_keys_hold_the_methods_version(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    base = key(log)
    old = FakeBackend.method
    monkeypatch.setattr(FakeBackend, "method", lambda self, *a: replace(old(self, *a), version=2))
    assert key(log) != base


def test_an_option_written_out_is_the_default(log: Path) -> None:
    spelt = [{"name": "minmax"}, {"name": "percentile", "options": {"percentile": 99.9}}]
    assert key(log, 5, methods=spelt) == key(log, 5)


# ---- running ---------------------------------------------------------------------------------------------------------


def test_a_whole_study(out: Path, log: Path) -> None:
    summary = run(out, log)
    assert (summary.planned, summary.done, summary.ran, summary.failed) == (CELLS, CELLS, CELLS, [])
    with Store(out) as store:
        cells = store.cells()
        study = store.study()
    assert (study["name"], study["planned"]) == ("test", CELLS)
    assert study["environment"]["torch"]
    quantized = [*["W8A8"] * 2, *["W3A3"] * 2]
    assert [c.spec["bits"] for c in cells] == ["FP32", *quantized, *quantized]
    fp32, low = cells[0].result, cells[3].result
    assert fp32["change"] is None
    assert low["change"]["id"]["top1"] == pytest.approx(low["id"]["top1"] - fp32["id"]["top1"])
    assert low["calibration"]["source"] == "embedded:digits-calibration?n=16&seed=0"
    assert low["calibration"]["n"] == 16
    drawn = {c.spec["calibration"]["fingerprint"] for c in cells[1:]}
    assert len(drawn) == 2  # each seed draws its own images
    assert set(low["ood"]["letters"]) >= {"source", "fingerprint", "n", "skipped", "group", "msp", "energy"}
    assert low["ood"]["other"]["group"] == "near"
    assert low["seconds"]["calibration"] >= 0
    assert Counter(FakeBackend(log).ended()).most_common(1)[0][1] == 1
    assert log.read_text().count("load") == 1  # the model is loaded once


def test_scores_do_not_depend_on_the_threads_of_numpy(out: Path, log: Path) -> None:
    from threadpoolctl import threadpool_info

    threads: set[int] = set()

    class Watched(FakeBackend):
        def evaluate(self, *arguments, **settings):
            threads.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
            return super().evaluate(*arguments, **settings)

    run(out, log, backend=Watched(log), limit=1)
    assert threads == {1}


def test_run_again_runs_nothing(out: Path, log: Path) -> None:
    run(out, log)
    before = log.read_text().count("\n")
    summary = run(out, log)
    assert (summary.done, summary.ran) == (CELLS, 0)
    assert log.read_text().count("\n") == before + 1  # the checkpoint is hashed again, nothing else


def test_more_of_the_study_runs_only_what_is_new(out: Path, log: Path) -> None:
    run(out, log)
    summary = run(out, log, config(seeds=[0, 13, 37]))
    assert (summary.planned, summary.done, summary.ran) == (13, 13, 4)
    summary = run(out, log, config(seeds=[0]))
    assert (summary.planned, summary.done, summary.ran) == (5, 5, 0)
    with Store(out) as store:
        assert len(store.cells()) == 5  # the report shows the study as it is now
        assert len(store.cells(everything=True)) == 13


def test_new_labels_and_paths_are_read_beside_old_cells(out: Path, log: Path) -> None:
    run(out, log)
    named = [{"name": "minmax", "label": "MinMax"}, "percentile"]
    renamed = config(models=[{"name": "fake", "label": "The fake"}], methods=named, id="embedded:digits-test[:100]")
    assert run(out, log, renamed).ran == 0
    with Store(out) as store:
        cells = store.cells()
    assert cells[1].spec["model"] == cells[1].result["model"] == "The fake"
    assert cells[1].spec["method"] == cells[1].result["method"] == "MinMax"
    assert cells[1].result["id"]["source"] == "embedded:digits-test[:100]"
    assert cells[1].result["method_name"] == "minmax"
    assert cells[1].spec["checkpoint_sha256"]
    with Store(out) as store:  # as it was measured: no stored cell is written again
        assert store.cell(cells[1].key).spec["model"] == store.cell(cells[1].key).result["model"] == "fake"
    assert run(out, log, config(seeds=[0, 13, 37])).ran == 4  # FP32 of the store serves as reference


def test_limit(out: Path, log: Path) -> None:
    summary = run(out, log, limit=4)
    assert (summary.ran, summary.done, summary.remaining) == (4, 4, CELLS - 4)
    summary = run(out, log)
    assert (summary.ran, summary.done, summary.remaining) == (5, CELLS, 0)


def test_two_models(out: Path, log: Path) -> None:
    summary = run(out, log, config(models=["fake", {"name": "fake2", "label": "second"}]))
    assert (summary.planned, summary.done) == (18, 18)


def test_a_cell_that_raises_is_recorded_and_the_rest_goes_on(out: Path, log: Path) -> None:
    backend = FakeBackend(log, broken=("minmax W3A3 13",))
    summary = run(out, log, backend=backend)
    assert (summary.done, summary.ran) == (CELLS - 1, CELLS)
    assert summary.failed == [("fake minmax W3A3 seed 13", "ValueError: minmax W3A3 13 is broken")]
    with Store(out) as store:
        (failed,) = [c for c in store.cells() if c.status == "failed"]
    assert "Traceback" in failed.error
    assert "is broken" in failed.error
    assert failed.result is None

    assert run(out, log).ran == 0  # failed cells are not tried again by themselves
    summary = run(out, log, retry_failed=True)
    assert (summary.ran, summary.done, summary.failed) == (1, CELLS, [])


def test_a_model_that_cannot_be_loaded(out: Path, log: Path) -> None:
    summary = run(out, log, config(models=["unloadable", "fake"]))
    assert (summary.done, len(summary.failed)) == (CELLS, CELLS)
    assert summary.failed[0] == ("unloadable FP32", "RuntimeError: no such weights")
    with pytest.raises(UnknownNameError, match="unknown model"):
        run(out, log, config(models=["unknown-model"]))


def test_fp32_that_fails_fails_its_cells(out: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(log)
    old = backend.load_model

    def nine(*arguments):
        model = old(*arguments)
        model.num_classes = 9
        return model

    monkeypatch.setattr(backend, "load_model", nine)
    summary = run(out, log, backend=backend)
    assert len(summary.failed) == CELLS
    assert "do not match the classes" in summary.failed[0][1]
    assert "could not be measured at FP32" in summary.failed[1][1]


def test_a_full_disk_stops_the_study(out: Path, log: Path) -> None:
    backend = FakeBackend(log, broken=("minmax W3A3 0",), error="full")
    with pytest.raises(QuantlensError, match=r"the disk is full .*No space left"):
        run(out, log, backend=backend)
    summary = run(out, log)
    assert (summary.done, summary.ran, summary.failed) == (CELLS, CELLS - 3, [])


def test_a_store_that_breaks_stops_the_study(out: Path, log: Path) -> None:
    out.mkdir()
    (out / "store.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(StorageError, match="damaged"):
        run(out, log)


def test_ctrl_c_leaves_the_store_whole(out: Path, log: Path) -> None:
    backend = FakeBackend(log, broken=("percentile W8A8 0",), error="interrupt")
    with pytest.raises(StudyInterrupted, match=r"stopped; 5 of 9 cells are finished .* again to carry on"):
        run(out, log, backend=backend)
    connection = sqlite3.connect(out / "store.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    assert run(out, log).ran == CELLS - 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration": {"source": "embedded:digits-test", "n": 16}}, "the calibration images .* share 100 images"),
        ({"calibration": {"source": "embedded:digits-calibration", "n": 999}}, "asks for 999 images"),
        ({"fit": "embedded:digits-test[50:60]"}, "the fit set .* share 10 images"),
        ({"id": "embedded:digits-tset"}, "did you mean 'digits-test'"),
        ({"id": "nothing"}, "has no kind"),
        ({"scores": ["mps"]}, "did you mean 'msp'"),
    ],
    ids=str,
)
def test_refusals_come_before_any_work(out: Path, log: Path, changes: dict, said: str) -> None:
    with pytest.raises(QuantlensError, match=said):
        run(out, log, config(**changes))
    assert not out.exists()
    assert not log.exists()


# ---- figures and display ---------------------------------------------------------------------------------------------


def test_progress(out: Path, log: Path) -> None:
    shown = Recorder()
    run_study(config(), out, progress=shown, backend=FakeBackend(log))
    assert len(shown.seen) == CELLS
    assert shown.ended == shown.total == CELLS
    assert shown.lefts[-1] == 0
    assert all(left is not None and left >= 0 for left in shown.lefts)
    again = Recorder()
    run_study(config(), out, progress=again, backend=FakeBackend(log))
    assert (again.seen, again.ended) == ([], CELLS)
    assert [duration(s) for s in (7.6, 185, 8040)] == ["7.6 s", "3 min 05 s", "2 h 14 min"]
