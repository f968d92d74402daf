"""Classification figures against scikit-learn, torchmetrics, and cases worked by hand."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import brier_score_loss, log_loss, top_k_accuracy_score

from quantlens.errors import QuantlensError
from quantlens.metrics import calibration_error, classification_metrics, reliability
from quantlens.metrics.classification import equal_mass_bins, equal_width_bins


def sample(n: int, k: int, seed: int = 0, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, k] that favour the label, and labels in which every class occurs."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += 1.0
    return logits * scale, labels


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k", [2, 3, 6, 10])
def test_agrees_with_scikit_learn(k: int) -> None:
    logits, labels = sample(400, k, seed=k)
    p, classes = softmax(logits), np.arange(k)
    got = classification_metrics(logits, labels)
    assert got["n"] == 400
    assert got["top1"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels), abs=1e-15)
    assert got["nll"] == pytest.approx(log_loss(labels, p, labels=classes), rel=1e-12)
    one_hot_error = sum(brier_score_loss(labels == c, p[:, c]) for c in classes)  # older ones know two classes only
    assert got["brier"] == pytest.approx(one_hot_error, rel=1e-12)
    if k > 5:
        top5 = top_k_accuracy_score(labels, logits, k=5, labels=classes)
        assert got["top5"] == pytest.approx(top5, abs=1e-15)
        assert got["top1"] < got["top5"] < 1
    else:
        assert got["top5"] == 1.0


@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("k", [3, 10])
def test_calibration_error_agrees_with_torchmetrics(k: int, n_bins: int) -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = sample(500, k, seed=3)
    expected = multiclass_calibration_error(
        torch.tensor(softmax(logits)), torch.tensor(labels), num_classes=k, n_bins=n_bins, norm="l1"
    )
    got = classification_metrics(logits, labels, n_bins=n_bins)
    assert got["ece"] == pytest.approx(float(expected), abs=2e-6)  # torchmetrics works in float32
    assert got["ece"] > 0.01  # an implementation that returns 0 does not pass


def test_confidence_on_an_edge_belongs_to_the_lower_bin() -> None:
    confidence = np.array([0.2, 0.2000001, 0.4, 1.0])
    assert equal_width_bins(confidence, 5).tolist() == [0, 1, 1, 4]
    got = calibration_error(confidence, [1, 1, 0, 1], n_bins=5)
    # bin 0: |1 - 0.2|; bin 1, both images: |1 + 0 - 0.6000001|; bin 4: 0
    assert got == pytest.approx((0.8 + 0.3999999) / 4)


def test_adaptive_bins_hold_equally_many_images() -> None:
    logits, labels = sample(450, 8, seed=5)
    confidence = softmax(logits).max(axis=1)
    correct = logits.argmax(axis=1) == labels
    order = np.argsort(confidence)
    pieces = np.split(order, 15)  # 30 images each
    expected = sum(abs(correct[i].mean() - confidence[i].mean()) for i in pieces) / 15
    got = classification_metrics(logits, labels)
    assert got["ece_adaptive"] == pytest.approx(expected, abs=1e-12)
    assert got["ece_adaptive"] != pytest.approx(got["ece"], abs=1e-6)
    assert np.ptp(np.bincount(equal_mass_bins(confidence[:443], 15), minlength=15)) <= 1


def test_tied_confidences_go_where_their_middle_belongs() -> None:
    assert equal_mass_bins(np.array([0.5, 0.5, 0.5, 0.9]), 2).tolist() == [0, 0, 0, 1]
    assert equal_mass_bins(np.array([0.5, 0.9, 0.9, 0.9]), 2).tolist() == [0, 1, 1, 1]


def test_adaptive_bins_with_fewer_images_than_bins() -> None:
    assert calibration_error([0.3, 0.9], [0, 1], adaptive=True) == pytest.approx((0.3 + 0.1) / 2)


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_confidence_for_all_images_is_one_bin(adaptive: bool) -> None:
    correct = np.arange(40) < 10
    got = calibration_error(np.full(40, 0.7), correct, adaptive=adaptive)
    assert got == pytest.approx(0.7 - 0.25)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=60),
    n_bins=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_order_of_tied_confidences_does_not_matter(rows: list[tuple[int, bool]], n_bins: int, seed: int) -> None:
    confidence = np.array([c / 8 for c, _ in rows])
    correct = np.array([hit for _, hit in rows])
    order = np.random.default_rng(seed).permutation(len(rows))
    for adaptive in (False, True):
        one = calibration_error(confidence, correct, n_bins=n_bins, adaptive=adaptive)
        other = calibration_error(confidence[order], correct[order], n_bins=n_bins, adaptive=adaptive)
        assert one == pytest.approx(other, abs=1e-12)
        assert abs(correct.mean() - confidence.mean()) - 1e-12 <= one <= 1
    bins = equal_mass_bins(confidence, n_bins)
    assert bins.min() >= 0
    assert bins.max() < n_bins
    # equal confidences share a bin, and a larger confidence is never in a lower bin
    assert all(np.ptp(bins[confidence == c]) == 0 for c in np.unique(confidence))
    assert (np.diff(bins[np.argsort(confidence)]) >= 0).all()


def test_tied_logits_go_to_the_lower_class() -> None:
    got = classification_metrics(np.zeros((10, 10)), np.arange(10))
    assert got["top1"] == 0.1  # a model that says nothing is right once in ten, not always
    assert got["top5"] == 0.5
    rng = np.random.default_rng(2)
    logits, labels = rng.integers(0, 3, size=(300, 9)).astype(np.float32), rng.integers(0, 9, size=300)
    ranking = np.argsort(-logits, axis=1, kind="stable")
    got = classification_metrics(logits, labels)
    assert got["top1"] == np.mean(ranking[:, 0] == labels)
    assert got["top5"] == np.mean((ranking[:, :5] == labels[:, None]).any(axis=1))


def test_extreme_logits_stay_exact() -> None:
    far = classification_metrics(np.array([[0.0, 10_000.0]]), [0])
    assert far["nll"] == 10_000.0
    assert far["brier"] == 2.0
    sure = classification_metrics(np.array([[40.0, 0.0]]), [0])
    assert sure["nll"] == pytest.approx(np.exp(-40.0), rel=1e-9, abs=0)
    assert sure["brier"] == pytest.approx(2 * np.exp(-80.0), rel=1e-9, abs=0)
    shifted = classification_metrics(np.array([[1e8, 1e8 - 1.0]]), [1])
    assert shifted["nll"] == pytest.approx(np.log1p(np.exp(1.0)))


def test_per_class_table_lists_the_classes_that_occur() -> None:
    logits, labels = sample(90, 6, seed=8)
    keep = labels != 4
    logits, labels = logits[keep], labels[keep]
    names = [f"name {c}" for c in range(6)]
    rows = classification_metrics(logits, labels, class_names=names)["per_class"]
    assert [row["class"] for row in rows] == [0, 1, 2, 3, 5]
    for row in rows:
        mine = labels == row["class"]
        assert row["name"] == names[row["class"]]
        assert row["n"] == mine.sum()
        assert row["top1"] == pytest.approx((logits[mine].argmax(axis=1) == row["class"]).mean())
    assert {row["name"] for row in classification_metrics(logits, labels)["per_class"]} == {None}


def test_reliability_data_add_up_to_the_calibration_error() -> None:
    logits, labels = sample(200, 4, seed=9)
    got = classification_metrics(logits, labels)
    table = got["reliability"]
    assert len(table["edges"]) == 16
    assert sum(table["count"]) == 200
    filled = [i for i, n in enumerate(table["count"]) if n]
    assert len(filled) < 15  # confidences below 1/4 cannot occur
    assert all(table["confidence"][i] is None and table["accuracy"][i] is None for i in range(3))
    for i in filled:
        assert table["edges"][i] <= table["confidence"][i] <= table["edges"][i + 1]
    gap = sum(table["count"][i] * abs(table["accuracy"][i] - table["confidence"][i]) for i in filled)
    assert gap / 200 == pytest.approx(got["ece"], abs=1e-12)


def test_figures_are_plain_json() -> None:
    logits, labels = sample(50, 4)
    text = json.dumps(classification_metrics(logits.astype(np.float32), labels), allow_nan=False)
    assert json.loads(text)["n"] == 50


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), k=st.integers(1, 8))
def test_order_of_images_and_shift_of_logits_do_not_matter(seed: int, shift: float, k: int) -> None:
    logits, labels = sample(40, k, seed=seed)
    order = np.random.default_rng(seed).permutation(40)
    one = classification_metrics(logits, labels)
    other = classification_metrics(logits[order] + shift, labels[order])
    for name in ("top1", "top5", "nll", "brier"):
        assert one[name] == pytest.approx(other[name], abs=1e-10)
    assert one["per_class"] == other["per_class"]


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = sample(101, 7, seed=11)
    whole = classification_metrics(logits, labels)
    monkeypatch.setattr("quantlens.metrics._arrays.BLOCK_ELEMENTS", 7 * 4)
    assert classification_metrics(logits, labels) == whole


def test_memory_stays_bounded() -> None:
    logits = np.random.default_rng(0).standard_normal((12_000, 1000), dtype=np.float32)
    labels = np.arange(12_000) % 1000
    tracemalloc.start()
    try:
        classification_metrics(logits, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 130e6  # one float64 copy would be 96 MB, and the softmax needs several


LOGITS = np.zeros((3, 4))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (LOGITS, [0, 1, 4], r"label 4 of image 2 is outside 0\.\.3"),
        (LOGITS, [0, -1, 2], r"label -1 of image 1 is outside 0\.\.3"),
        (LOGITS, [0, 1], "the labels have shape .2,., but the logits are of 3 images"),
        (LOGITS, [[0], [1], [2]], "the labels have shape"),
        (LOGITS, [0.5, 1, 2], "whole class numbers"),
        (LOGITS, ["a", "b", "c"], "whole class numbers"),
        (np.array([[0, 1], [np.nan, 0]]), [0, 1], "logits of image 1 hold NaN"),
        (np.array([[0, np.inf], [0, 0]]), [0, 1], "logits of image 0 hold NaN or infinite"),
        (np.zeros((0, 4)), [], "there are no images"),
        (np.zeros(4), [0, 0, 0, 0], "must be a matrix"),
        (np.zeros((4, 0)), [0, 0, 0, 0], "must be a matrix"),
        (np.zeros((2, 2), dtype=complex), [0, 0], "must be real numbers"),
    ],
)
def test_bad_input_is_named(logits: np.ndarray, labels: list, message: str) -> None:
    with pytest.raises(QuantlensError, match=message):
        classification_metrics(logits, labels)


def test_bad_options_are_named() -> None:
    with pytest.raises(QuantlensError, match="3 class names for 4 classes"):
        classification_metrics(LOGITS, [0, 1, 2], class_names=["a", "b", "c"])
    with pytest.raises(QuantlensError, match="n_bins is 0"):
        classification_metrics(LOGITS, [0, 1, 2], n_bins=0)
    with pytest.raises(QuantlensError, match=r"reach from 0\.5 to 1\.5"):
        calibration_error([0.5, 1.5], [1, 0])
    with pytest.raises(QuantlensError, match="1 correctness flags for 2 confidences"):
        reliability([0.5, 0.5], [1])


def test_whole_numbers_in_float_labels_are_accepted() -> None:
    assert classification_metrics(LOGITS, np.array([0.0, 0.0, 1.0]))["top1"] == pytest.approx(2 / 3)
