"""Metrics of sigmoids against scikit-learn and torchmetrics, and under resampling against images written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn import metrics as sk

from quantlens.errors import QuantlensError
from quantlens.metrics import calibration_error, label_metrics, metrics_of
from quantlens.metrics.bootstrap import Resamples, interval
from quantlens.metrics.labels import resampled_labels


def drawn(n: int = 240, labels: int = 5, step: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many ties, and labels of which some are rare."""
    rng = np.random.default_rng(0)
    y = rng.random((n, labels)) < np.linspace(0.05, 0.6, labels)
    z = np.round((rng.normal(size=y.shape) + 1.5 * y - 0.5) / step) * step
    return z.astype(np.float32), y


def test_many_labels_are_scikit_learns() -> None:
    z, y = drawn()
    found, p = label_metrics(z, y), expit(z.astype(np.float64))
    expected = {
        "map": sk.average_precision_score(y, p),
        "auroc": sk.roc_auc_score(y, p),
        "f1": sk.f1_score(y, z > 0, average="macro"),
        "f1_micro": sk.f1_score(y, z > 0, average="micro"),
        "exact_match": sk.accuracy_score(y, z > 0),
        "accuracy": 1 - sk.hamming_loss(y, z > 0),
        "nll": sk.log_loss(y.ravel(), p.ravel()),
        "brier": np.mean([sk.brier_score_loss(y[:, k], p[:, k]) for k in range(5)]),
        "ece": calibration_error(p.ravel(), y.ravel()),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert set(metrics_of("multilabel")) <= set(found)
    for k, row in enumerate(found["per_label"]):
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(y[:, k], p[:, k]))
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(y[:, k], p[:, k]))
        assert row["brier"] == pytest.approx(sk.brier_score_loss(y[:, k], p[:, k]))
        assert row["n"] == y[:, k].sum()


def test_one_logit_is_scikit_learns() -> None:
    z, y = drawn(labels=2)
    z, y = z[:, :1], y[:, 0]
    found, p = label_metrics(z, y.astype(int)), expit(z[:, 0].astype(np.float64))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, p))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(y, p))
    assert found["f1"] == pytest.approx(sk.f1_score(y, p > 0.5))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, p > 0.5))
    assert found["positives"] == y.sum()
    assert set(metrics_of("binary")) <= set(found)


def test_torchmetrics_agrees() -> None:
    theirs = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")
    z, y = drawn(step=1e-9)
    p, t = torch.from_numpy(expit(z.astype(np.float64))), torch.from_numpy(y.astype(int))
    found = label_metrics(z, y, n_bins=10)
    assert found["map"] == pytest.approx(float(theirs.multilabel_average_precision(p, t, num_labels=5)), abs=1e-5)
    assert found["f1"] == pytest.approx(float(theirs.multilabel_f1_score(p, t, num_labels=5)), abs=1e-6)
    ece = theirs.binary_calibration_error(p[:, 3].contiguous(), t[:, 3].contiguous(), n_bins=10)
    assert label_metrics(z[:, 3:4], y[:, 3:4], n_bins=10)["ece"] == pytest.approx(float(ece), abs=1e-5)


def test_a_label_that_no_image_has_is_left_out_of_the_means() -> None:
    z, y = drawn()
    y[:, 1], y[:, 2] = False, True
    found, kept = label_metrics(z, y), [0, 3, 4]
    p = expit(z.astype(np.float64))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y[:, kept], p[:, kept]))
    assert found["map"] == pytest.approx(sk.average_precision_score(y[:, [0, 2, 3, 4]], p[:, [0, 2, 3, 4]]))
    assert [row["auroc"] is None for row in found["per_label"]] == [False, True, True, False, False]
    none = label_metrics(z, np.zeros_like(y))
    assert none["map"] is None
    assert none["auroc"] is None


@pytest.mark.parametrize("labels", [1, 4])
def test_every_resample_has_the_metrics_of_the_images_that_were_drawn(labels: int) -> None:
    z, y = drawn(90, labels)
    ((_, counts),) = Resamples(60, seed=1).chunks({"": 90})
    names = metrics_of("binary" if labels == 1 else "multilabel", resampled=True)
    found = resampled_labels(z, y, counts[""], n_bins=15, wanted=names)
    assert set(found) == set(names)
    for r in range(0, 60, 7):
        rows = np.repeat(np.arange(90), counts[""][:, r].astype(int))
        expected = label_metrics(z[rows], y[rows])
        for name in names:
            value = np.nan if expected[name] is None else expected[name]
            assert found[name][r] == pytest.approx(value, abs=2e-6, nan_ok=True), name


def test_resamples_without_a_difference_are_left_out() -> None:
    values = np.linspace(-1, 1, 500)
    assert interval(np.concatenate([values, [np.nan] * 20])) == interval(values)


def test_labels_that_do_not_fit_are_refused() -> None:
    z, y = drawn()
    with pytest.raises(QuantlensError, match=r"shape \(240, 4\).*need \(240, 5\)"):
        label_metrics(z, y[:, :4])
    with pytest.raises(QuantlensError, match="other values than 0 and 1"):
        label_metrics(z, y * 2)
    with pytest.raises(QuantlensError, match="0 rows"):
        label_metrics(z[:0], y[:0])
