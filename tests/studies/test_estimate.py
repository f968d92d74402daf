"""What `quantlens study --plan` says before a study runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from study_fakes import FakeBackend, FakeModel, config

import quantlens as ql
from quantlens.studies import estimate as module
from quantlens.studies.estimate import CALIBRATION_FORWARDS, INSPECTION, SIMULATION, STAGES, Estimate, estimate
from quantlens.studies.progress import duration
from quantlens.studies.runner import run_study

PAUSE = 0.02


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes only where a model takes some or somebody sleeps, and a little at every look."""
    now = [0.0]

    def look() -> float:
        now[0] += 1e-6
        return now[0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(module.time, "perf_counter", look)
    monkeypatch.setattr(module.time, "sleep", sleep)
    return now


class Slow(FakeBackend):
    """An FP32 image takes 2 ms of the clock, so that the constants are known."""

    def load_model(self, *arguments):
        model = super().load_model(*arguments)
        fast = FakeModel.outputs

        def slow(x):
            time.sleep(0.002 * len(x))
            return fast(model, x)

        model.outputs = slow
        return model


@pytest.mark.usefixtures("clock")
def test_the_first_estimate_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = estimate(config(), out, backend=Slow(tmp_path / "log"))
    stages = found.seconds["fake"]
    assert (found.cells, list(stages), found.unknown) == (9, list(STAGES), [])
    image = stages["FP32 evaluation"] / 180  # 100 ID and 2 x 40 OOD images
    assert image == pytest.approx(0.002, rel=1e-2)
    assert stages["quantized evaluation"] == pytest.approx(8 * 180 * SIMULATION * image)
    assert stages["calibration"] == pytest.approx(8 * 16 * CALIBRATION_FORWARDS["minmax"] * image)
    assert "timed now" in found.lines()[0]
    assert "inspection" not in found.lines()[0]
    assert not out.exists()


def test_inspections_are_counted_by_their_parts(digits, tmp_path: Path) -> None:
    class Digits(FakeBackend):
        def load_model(self, *arguments):
            return digits["model"]

    found = estimate(config(inspect={"images": 4}), tmp_path / "out", backend=Digits(tmp_path / "log"))
    stages = found.seconds["fake"]
    parts = ql.inspect(digits["model"], digits["calibration"][:1]).parts
    image = stages["FP32 evaluation"] / 180
    assert stages["inspection"] == pytest.approx(INSPECTION * 4 * sum(map(len, parts.values())) * image)
    assert f"inspection {duration(stages['inspection'])}" in found.lines()[0]


@pytest.mark.usefixtures("clock")
def test_a_second_estimate_learns_from_the_store(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_study(config(), out, progress=False, backend=FakeBackend(tmp_path / "log", pause=PAUSE), limit=3)
    found = estimate(config(), out, backend=Slow(tmp_path / "log"))
    stages = found.seconds["fake"]
    assert "from 3 cells of the store" in found.lines()[0]
    assert stages["calibration"] > 4 * PAUSE  # minmax as stored: 16 images in PAUSE and a little
    assert stages["FP32 evaluation"] < 0.001 * 180  # as the fast backend measured, not as timed now


def test_workers_and_what_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CALIBRATION_FORWARDS, "percentile")
    found = estimate(config(), tmp_path / "out", workers=4, backend=FakeBackend(tmp_path / "log"))
    assert found.unknown == ["percentile"]
    assert any("calibration by percentile is not counted" in line for line in found.lines())
    one = Estimate(9, 1, {"m": dict(zip(STAGES, (10, 0, 10, 0, 40, 40), strict=True))}, {"m": "timed"}, [], 0, 0)
    assert (one.total, one.wall) == (100, 100)
    one.workers = 4
    assert one.wall == 40  # loading and the only FP32 evaluation are not divided
    assert one.lines()[-2] == "in all about 40 s with 4 workers like this machine's"


def test_memory_and_disk_grow_with_the_images(tmp_path: Path) -> None:
    small = estimate(config(outputs="scores"), tmp_path / "out", backend=FakeBackend(tmp_path / "log"))
    large = estimate(config(id="embedded:digits-test"), tmp_path / "out", backend=FakeBackend(tmp_path / "log"))
    assert large.disk > small.disk
    assert small.disk > (180 + 32) * 3 * 32 * 32  # at least the decoded images
