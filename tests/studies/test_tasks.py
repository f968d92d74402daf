"""Studies of models that are no classifiers: they run, and are summed up by metrics of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study_fakes import FakeBackend, config

from quantlens.report import write_report
from quantlens.studies.compare import compare
from quantlens.studies.results import results
from quantlens.studies.runner import run_study


class OfFeatures(FakeBackend):
    """What the fake gives are features."""

    def load_model(self, *arguments: Any) -> Any:
        model = super().load_model(*arguments)
        model.task = "features"
        return model

    def quantize(self, *arguments: Any) -> Any:
        model = super().quantize(*arguments)
        model.task = "features"
        return model


def test_a_study_of_features_is_summed_up_by_its_own_metrics(tmp_path: Path) -> None:
    study = config(
        bits=["W2A2"], methods=["minmax"], fit="embedded:digits-fit", scores=["knn", "mahalanobis"], seeds=[0]
    )
    run_study(study, tmp_path, progress=False, backend=OfFeatures(tmp_path / "log"))
    found = results(tmp_path)
    assert found.shown()[:3] == ["id.knn1", "id.linear1", "ood_mean.far.knn.aupr_out"]
    by_bits = {one.bits: one.metrics for one in found.means()}
    assert by_bits["FP32"]["id.knn1"].mean > 0.9
    aupr = "ood_mean.far.knn.aupr_out"
    assert by_bits["W2A2"][aupr].mean < by_bits["FP32"][aupr].mean
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "Accuracy of k-NN and a linear probe" in page
    assert "At W2A2, the lowest precision, nothing loses k-NN top-1." in page
    assert "top-1 % ↑" in page
    (group, *_) = compare(f"{tmp_path}:bits=FP32", f"{tmp_path}:bits=W2A2", resamples=200).groups
    assert [one.path for one in group.metrics][:2] == ["id.knn1", "id.linear1"]
    assert not group.without_interval


def test_a_study_with_a_score_of_another_task_says_so(tmp_path: Path) -> None:
    study = config(bits=["W4A4"], methods=["minmax"], scores=["msp"], seeds=[0])
    summary = run_study(study, tmp_path, progress=False, backend=OfFeatures(tmp_path / "log"))
    assert {reason for _, reason in summary.failed} == {
        reason for _, reason in summary.failed if "msp does not fit the task 'features'" in reason
    }
    assert summary.failed
