"""What `quantlens study --plan` says before a study runs: a pilot of every model and method, scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_fakes import FakeBackend, Recorder, config

import quantlens as ql
from quantlens.studies.backend import Backend
from quantlens.studies.estimate import CALIBRATED, EVALUATED, Estimate, ModelCost, estimate
from quantlens.studies.progress import duration
from quantlens.studies.runner import run_study

PAUSE = 0.2
READ = 100 + 40 + 40


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


class Timed(FakeBackend):
    """Evaluations say that an FP32 image takes 2 s and a quantized one 3 s, calibrations take `pause`."""

    def evaluate(self, model, id, ood, **settings):
        result = super().evaluate(model, id, ood, **settings)
        result.seconds["evaluation"] = len(id) * (2.0 if model.method == "fp32" else 3.0)
        assert len(id) == EVALUATED
        assert not ood
        return result

    def quantize(self, model, calibration, *rest):
        assert len(calibration) == CALIBRATED
        return super().quantize(model, [*calibration.names] * 2, *rest)


def test_pilots_are_scaled_to_the_images_and_cells(tmp_path: Path, log: Path) -> None:
    shown, out = Recorder(), tmp_path / "out"
    found = estimate(config(), out, backend=Timed(log, pause=PAUSE), progress=shown)
    kinds = found.models["fake"].kinds
    assert {name: count for name, (count, _) in kinds.items()} == {"FP32": 1, "minmax": 4, "percentile": 4}
    assert kinds["FP32"][1] == pytest.approx(2.0 * READ)
    for name in ("minmax", "percentile"):
        assert kinds[name][1] >= 3.0 * READ + PAUSE * 16 / CALIBRATED  # as many images, as they are drawn
    assert shown.said[1] == "pilot: fake minmax W3A3 seed 0 on 32 images"  # the lowest precision of the method
    assert len(shown.said) == 3
    assert found.lines()[0].startswith("fake: ")
    assert f"4 × minmax {duration(4 * kinds['minmax'][1])}" in found.lines()[0]
    assert not out.exists()


def test_the_default_method_and_every_other_is_known(log: Path, tmp_path: Path) -> None:
    """Nothing is said of a method but what its pilot took: a name that is new is estimated as any other."""
    from quantlens.methods import registry

    methods = [name for name in registry.available() if name != "fp32"]

    class Named(Timed):
        method = Backend.method

    found = estimate(config(methods=methods, bits=["W4A4"], seeds=[0]), tmp_path, backend=Named(log), progress=False)
    assert set(found.models["fake"].kinds) == {"FP32", *methods}


def test_what_is_finished_is_not_counted(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"
    run_study(config(), out, progress=False, backend=FakeBackend(log), limit=3)
    found = estimate(config(), out, backend=Timed(log), progress=False)
    assert found.finished == 3
    assert {name: count for name, (count, _) in found.models["fake"].kinds.items()} == {"minmax": 2, "percentile": 4}
    assert "3 of 9 cells are finished and not counted" in found.lines()


def test_inspections_are_scaled_by_their_images(digits, tmp_path: Path, log: Path) -> None:
    class Digits(FakeBackend):
        def load_model(self, *arguments):
            return digits["model"]

        def evaluate(self, model, id, ood, **settings):
            return Backend.evaluate(self, ql.qmodel.float_model(digits["model"]), id, ood, **settings)

    study = config(inspect={"images": 24}, bits=["FP32"])
    found = estimate(study, tmp_path / "out", backend=Digits(log, pause=PAUSE), progress=False)
    count, seconds = found.models["fake"].kinds["inspection"]
    assert count == 1
    assert seconds >= PAUSE * 24 / CALIBRATED


def test_a_pilot_that_fails_says_so(tmp_path: Path, log: Path) -> None:
    broken = Timed(log, broken=("minmax W3A3 0",))
    found = estimate(config(), tmp_path / "out", backend=broken, progress=False)
    assert "fake: minmax failed in the pilot: ValueError: minmax W3A3 0 is broken" in found.lines()
    assert "minmax" not in found.models["fake"].kinds


def test_workers_share_all_but_the_loading(tmp_path: Path, log: Path) -> None:
    cost = ModelCost(20.0, 0.0, {"FP32": (1, 10.0), "minmax": (7, 10.0)})
    one = Estimate(8, 1, {"m": cost})
    assert one.wall == 100
    one.workers = 4
    assert one.wall == 40
    assert one.lines()[-2] == "in all about 40 s with 4 workers like this machine's, scaled from cells of 32 images"


def test_memory_and_disk_grow_with_the_images(tmp_path: Path, log: Path) -> None:
    def found(**changes):
        return estimate(config(cache=True, **changes), tmp_path / "out", backend=Timed(log), progress=False)

    small, large = found(outputs="scores"), found(id="embedded:digits-test")
    assert large.disk > small.disk
    assert small.disk > (READ + 32) * 3 * 32 * 32  # at least the decoded images
    assert small.memory > 0
