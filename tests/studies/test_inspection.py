"""Inspections in studies: found once per model, kept in the store, apart from the cells that hold figures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from study_fakes import FakeBackend, config

import quantlens as ql
from quantlens.data import load_images, open_source
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.evaluation.result import numbers
from quantlens.report import write_report
from quantlens.sensitivity import Inspection
from quantlens.studies.backend import Backend
from quantlens.studies.cells import StudyImages, cell_key, plan_study
from quantlens.studies.config import load_config, parse_config
from quantlens.studies.runner import run_study
from quantlens.studies.store import INSPECTION, Store

ASKED = {"images": 4, "bits": "W4A4"}
REAL = {
    "models": [{"name": "digits-vit", "label": "Digits"}],
    "methods": ["minmax"],
    "bits": ["FP32", "W4A4"],
    "calibration": {"source": "embedded:digits-calibration", "n": 8},
    "id": "embedded:digits-test[0:24]",
    "scores": ["msp"],
    "device": "cpu",
    "cache": False,
    "outputs": False,
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def keys(log: Path, **changes) -> list[str]:
    backend, study = FakeBackend(log), config(**changes)
    images = StudyImages.open(study)
    return [cell_key(cell, study, images, "sha", {}) for cell in plan_study(study, backend)]


def inspected(log: Path, **changes) -> str:
    return keys(log, **{"inspect": ASKED, **changes})[1]


def test_the_plan_has_one_for_each_model(log: Path) -> None:
    cells = plan_study(config(models=["fake", "fake2"], inspect=True), FakeBackend(log))
    assert [str(c) for c in cells if c.inspects] == ["fake inspection W8A8", "fake2 inspection W8A8"]
    assert [str(c) for c in cells[:3]] == ["fake FP32", "fake inspection W8A8", "fake minmax W8A8 seed 0"]
    assert len({str(c) for c in cells}) == len(cells)
    assert not any(c.inspects for c in plan_study(config(inspect=False), FakeBackend(log)))


def test_keys(log: Path) -> None:
    """It changes no other key; and its own hangs on the model, its images and its quantizers alone."""
    plain, asked = keys(log), keys(log, inspect=ASKED)
    assert [asked[0], *asked[2:]] == plain
    assert asked[1].startswith(INSPECTION)
    others = {"ood": {}, "scores": ["msp"], "seeds": [5], "methods": ["percentile"], "bits": ["FP32"], "name": "x"}
    for name, value in others.items():
        assert inspected(log, **{name: value}) == asked[1], name
    changes = ({"images": 7}, {"bits": "W8A8"}, {"seed": 1}, {"method": "percentile"})
    sources = ({"source": "embedded:digits-fit"},)
    assert len({asked[1], *(inspected(log, inspect={**ASKED, **change}) for change in (*changes, *sources))}) == 6


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"imges": 3}, "did you mean 'images'"),
        ({"bits": "FP32"}, "no pair of widths"),
        ({"bits": "MP6"}, "no pair of widths"),
        ({"images": 0}, r"inspect\.images"),
        ({"source": "embedded:digits-fit?n=3"}, "number of images as `images`"),
        ("yes", "inspect"),
    ],
    ids=str,
)
def test_mistakes_are_named(value, message) -> None:
    with pytest.raises(QuantlensError, match=message):
        config(inspect=value)


def test_mistakes_that_need_a_look(log: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantlensError, match="`inspect` has no images"):
        config(inspect=True, bits=["FP32"], calibration=None)
    with pytest.raises(QuantlensError, match="inspect asks for 999 images"):
        run_study(config(inspect={"images": 999}), tmp_path / "out", progress=False, backend=FakeBackend(log))
    with pytest.raises(UnknownNameError, match="did you mean 'minmax'"):
        plan_study(config(inspect={"method": "minmx"}), FakeBackend(log))
    path = tmp_path / "study.yaml"
    path.write_text("{models: [a], bits: [FP32], id: 'images:i', inspect: {source: 'images:there'}}")
    assert load_config(path).inspect.source == f"images:{tmp_path}/there"


def test_found_once_and_apart_from_the_cells(log: Path, tmp_path: Path) -> None:
    out, study = tmp_path / "out", config(models=["fake", "fake2"], inspect=ASKED)
    summary = run_study(study, out, progress=False, backend=FakeBackend(log))
    assert (summary.planned, summary.done, summary.failed) == (20, 20, [])
    counts = Counter(FakeBackend(log).ended())
    assert set(counts.values()) == {1}
    assert counts["fake inspection W4A4 0"] == counts["fake2 inspection W4A4 0"] == 1
    assert run_study(study, out, progress=False, backend=FakeBackend(log)).ran == 0
    with Store(out) as store:
        cells, found = store.cells(), store.inspections()
        assert store.counts() == {"done": 20, "failed": 0}
        assert len(store.inspections(everything=True)) == 2
    assert [c.result["model"] for c in cells] == ["fake"] * 9 + ["fake2"] * 9  # what compares and tabulates sees these
    assert all(list(numbers(c.result)) for c in cells)
    assert [Inspection.from_dict(c.result["inspection"]).ranked()[0].name for c in found] == ["blocks.0.b"] * 2

    changed = config(models=[{"name": "fake", "label": "The fake"}], inspect=ASKED, ood={}, scores=["msp"])
    again = run_study(changed, out, progress=False, backend=FakeBackend(log))
    assert (again.planned, again.ran) == (10, 9)  # other figures are asked for; the layers are those of before
    with Store(out) as store:
        (one,) = store.inspections()
    assert one.spec["model"] == one.result["inspection"]["model"] == "The fake"


def test_one_that_raises_is_recorded_and_the_rest_goes_on(log: Path, tmp_path: Path) -> None:
    out, study = tmp_path / "out", config(inspect=ASKED)
    summary = run_study(study, out, progress=False, backend=FakeBackend(log, broken=("inspection W4A4 0",)))
    assert (summary.done, summary.ran) == (9, 10)
    assert summary.failed == [("fake inspection W4A4", "ValueError: inspection W4A4 0 is broken")]
    page = write_report(out).read_text()
    assert "1 of 10 cells failed" in page
    assert "fake · minmax · W4A4 · inspection" in page
    assert 'id="layers"' not in page
    summary = run_study(study, out, progress=False, backend=FakeBackend(log), retry_failed=True)
    assert (summary.ran, summary.done, summary.failed) == (1, 10, [])


def test_it_goes_without_fp32(log: Path, tmp_path: Path) -> None:
    """A model whose FP32 cell fails is inspected all the same; cells that are compared with FP32 are not measured."""
    summary = run_study(
        config(inspect=ASKED), tmp_path / "out", progress=False, backend=FakeBackend(log, broken=("fp32",))
    )
    assert (summary.done, len(summary.failed)) == (1, 9)
    assert FakeBackend(log).ended() == ["fake inspection W4A4 0"]


@pytest.mark.slow
def test_real_figures_and_the_report(digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `ql.inspect` on the same images; the report reads them, and inspects nothing."""
    study = parse_config({**REAL, "inspect": ASKED})
    summary = run_study(study, tmp_path, progress=False)
    assert not summary.failed
    with Store(tmp_path) as store:
        (cell,) = store.inspections()
    stored = Inspection.from_dict(cell.result["inspection"])
    assert cell.spec["images"]["source"] == stored.images["source"] == "embedded:digits-calibration?n=4&seed=0"

    model = digits["model"]
    images = load_images(open_source(stored.images["source"]), model.preprocess, cache_dir=False)
    found = ql.inspect(model, images, "W4A4")
    assert [p.name for p in stored.ranked()] == [p.name for p in found.ranked()]
    for here, there in zip(stored.sites, found.sites, strict=True):
        assert here.effect.sqnr_db == pytest.approx(there.effect.sqnr_db, rel=1e-5)
        assert here.remark() == there.remark()
        assert [e.kurtosis for e in here.edges] == pytest.approx([e.kurtosis for e in there.edges], rel=1e-5)

    def refuse(*args, **kwargs):
        raise AssertionError("the report inspects")

    monkeypatch.setattr(Backend, "inspect", refuse)
    monkeypatch.setattr("quantlens.sensitivity.inspection.inspect", refuse)
    page = write_report(tmp_path).read_text()
    section = page[page.index('<section id="layers">') :].partition("</section>")[0]
    worst = stored.ranked()[0]
    assert "<h3>Digits</h3>" in section
    assert f"At W4A4 {worst.name} alone hurts most: {worst.effect.sqnr_db:.1f} dB" in section
    positions = [section.index(f'<td class="text">{part.name}</td>') for part in stored.ranked()]
    assert positions == sorted(positions)
    for title in ("ratio A", "kurtosis W", "token norm", "Stands out", "Blocks, ranked"):
        assert title in section
    assert "3 done, 0 failed" in page
