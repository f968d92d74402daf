"""OOD figures against scikit-learn, torchmetrics, pytorch-ood and direct counting, with heavy ties."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from quantlens import metrics
from quantlens.errors import QuantlensError
from quantlens.metrics import change, mean_over_sets, ood_metrics, score_histograms, threshold_keeping

FIGURES = ("aupr_out", "aupr_in", "auroc", "fpr95_id", "fpr95_ood")


def tied_scores(levels: int, n_id: int = 211, n_ood: int = 97) -> tuple[np.ndarray, np.ndarray]:
    """Scores in 0..1 that take at most `levels` values, ID above OOD on average."""
    rng = np.random.default_rng(levels)
    ins, outs = rng.beta(4, 2, n_id), rng.beta(2, 3, n_ood)
    return np.round(ins * (levels - 1)) / (levels - 1), np.round(outs * (levels - 1)) / (levels - 1)


def fpr_by_counting(keep: np.ndarray, other: np.ndarray) -> float:
    """Least share of `other` at or above a threshold that leaves at least 95 % of `keep` at or above it."""
    thresholds = np.concatenate([keep, other])
    enough = (keep >= thresholds[:, None]).mean(axis=1) >= 0.95 - 1e-12
    return float((other >= thresholds[enough][:, None]).mean(axis=1).min())


@pytest.mark.parametrize("levels", [2, 3, 5, 16, 10**9])
def test_agrees_with_scikit_learn_and_torchmetrics(levels: int) -> None:
    import torch
    from torchmetrics.functional.classification import binary_specificity_at_sensitivity

    ins, outs = tied_scores(levels)
    got = ood_metrics(ins, outs)
    scores, is_id = np.r_[ins, outs], np.r_[np.ones(len(ins)), np.zeros(len(outs))]
    assert got["aupr_in"] == pytest.approx(average_precision_score(is_id, scores), abs=1e-12)
    assert got["aupr_out"] == pytest.approx(average_precision_score(1 - is_id, -scores), abs=1e-12)
    assert got["auroc"] == pytest.approx(roc_auc_score(is_id, scores), abs=1e-12)

    def false_positive_rate(confidence: np.ndarray, positive: np.ndarray) -> float:
        specificity, _ = binary_specificity_at_sensitivity(
            torch.tensor(confidence), torch.tensor(positive).long(), min_sensitivity=0.95
        )
        return 1 - float(specificity)

    assert got["fpr95_id"] == pytest.approx(false_positive_rate(scores, is_id), abs=1e-6)
    assert got["fpr95_ood"] == pytest.approx(false_positive_rate(1 - scores, 1 - is_id), abs=1e-6)
    assert got["fpr95_id"] == pytest.approx(fpr_by_counting(ins, outs), abs=1e-12)
    assert got["fpr95_ood"] == pytest.approx(fpr_by_counting(-outs, -ins), abs=1e-12)
    assert (got["n_id"], got["n_ood"]) == (211, 97)


@pytest.mark.parametrize("levels", [3, 16, 10**9])
def test_agrees_with_pytorch_ood(levels: int) -> None:
    """Its FPR95TPR has OOD positive (our fpr95_ood). Its AUPR joins the points of the same
    curve by straight lines (trapezoids) and so is not compared."""
    import torch
    from pytorch_ood.metrics import OODMetrics

    ins, outs = tied_scores(levels)
    metrics = OODMetrics()
    metrics.update(torch.tensor(-np.r_[ins, outs]), torch.tensor([0] * len(ins) + [-1] * len(outs)))
    expected = metrics.compute()
    got = ood_metrics(ins, outs)
    assert got["fpr95_ood"] == pytest.approx(float(expected["FPR95TPR"]), abs=1e-6)
    assert got["auroc"] == pytest.approx(float(expected["AUROC"]), abs=1e-6)


def test_the_two_orientations_of_fpr95_differ() -> None:
    got = ood_metrics(*tied_scores(10**9))
    assert abs(got["fpr95_id"] - got["fpr95_ood"]) > 0.02
    # 10 % of ID below all OOD: to keep 95 % of ID every OOD image is accepted; catching OOD flags just those
    got = ood_metrics(np.r_[np.zeros(10), np.full(90, 2.0)], np.ones(50))
    assert (got["fpr95_id"], got["fpr95_ood"]) == (1.0, 0.1)


def test_a_constant_score_is_at_chance() -> None:
    got = ood_metrics(np.full(30, 0.5), np.full(10, 0.5))
    assert got["aupr_out"] == got["chance_aupr_out"] == 0.25
    assert got["aupr_in"] == got["chance_aupr_in"] == 0.75
    assert got["auroc"] == 0.5
    assert got["fpr95_id"] == got["fpr95_ood"] == 1.0


def test_perfect_and_inverted_scores() -> None:
    best = ood_metrics([2.0, 3.0], [0.0, 1.0, 1.0])
    assert [best[f] for f in FIGURES] == [1, 1, 1, 0, 0]
    worst = ood_metrics([0.0, 1.0], [2.0, 3.0])
    assert [worst[f] for f in FIGURES[2:]] == [0, 1, 1]
    assert worst["aupr_in"] == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_ninety_five_percent_is_reached_not_passed() -> None:
    # 19 of 20 are 95 %, so the lowest ID image may be given up; 18 of 19 are not
    assert ood_metrics(np.arange(20.0), [0.5])["fpr95_id"] == 0.0
    assert ood_metrics(np.arange(19.0), [0.5])["fpr95_id"] == 1.0
    assert ood_metrics([18.5], np.arange(20.0))["fpr95_ood"] == 0.0
    assert ood_metrics([17.5], np.arange(19.0))["fpr95_ood"] == 1.0
    # the lowest ID image shares its score with the next: giving up one would give up both
    assert ood_metrics(np.r_[1.0, np.arange(1.0, 20.0)], [1.5])["fpr95_id"] == 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_single_images_and_any_dtype(dtype: type) -> None:
    got = ood_metrics(np.array([1], dtype), np.array([0], dtype))
    assert [got[f] for f in FIGURES] == [1, 1, 1, 0, 0]
    assert json.loads(json.dumps(got)) == got


few = st.lists(st.integers(-5, 5), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(ins=few, outs=few)
def test_strictly_rising_transforms_change_nothing(ins: list[int], outs: list[int]) -> None:
    a, b = np.array(ins), np.array(outs)
    base = ood_metrics(a, b)
    for rise in (lambda x: 3.0 * x + 7, np.exp, np.arctan, lambda x: x.astype(float) ** 3):
        assert ood_metrics(rise(a), rise(b)) == base


@settings(max_examples=60, deadline=None)
@given(ins=few, outs=few)
def test_swapping_id_and_ood_mirrors_the_figures(ins: list[int], outs: list[int]) -> None:
    a, b = np.array(ins), np.array(outs)
    one, mirrored = ood_metrics(a, b), ood_metrics(-b, -a)
    for here, there in (
        ("aupr_out", "aupr_in"),
        ("fpr95_id", "fpr95_ood"),
        ("auroc", "auroc"),
        ("chance_aupr_out", "chance_aupr_in"),
        ("n_id", "n_ood"),
    ):
        assert one[here] == pytest.approx(mirrored[there], abs=1e-12)
        assert one[there] == pytest.approx(mirrored[here], abs=1e-12)
    assert one["auroc"] + ood_metrics(b, a)["auroc"] == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(ins=few, outs=few, seed=st.integers(0, 100))
def test_order_does_not_matter_and_counting_agrees(ins: list[int], outs: list[int], seed: int) -> None:
    a, b = np.array(ins, float), np.array(outs, float)
    rng = np.random.default_rng(seed)
    got = ood_metrics(a, b)
    assert ood_metrics(rng.permutation(a), rng.permutation(b)) == got
    assert ood_metrics(np.tile(a, 3), np.tile(b, 3)) == pytest.approx(
        {**got, "n_id": 3 * len(a), "n_ood": 3 * len(b)}, abs=1e-12
    )
    pairs = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
    assert got["auroc"] == pytest.approx(pairs, abs=1e-12)
    assert got["fpr95_id"] == pytest.approx(fpr_by_counting(a, b), abs=1e-12)
    assert got["fpr95_ood"] == pytest.approx(fpr_by_counting(-b, -a), abs=1e-12)
    assert all(0 <= got[f] <= 1 for f in FIGURES)


@pytest.mark.parametrize(
    ("ins", "outs", "message"),
    [
        ([], [1.0], "there are no ID scores"),
        ([1.0], [], "there are no OOD scores"),
        ([1.0, np.nan], [1.0], "ID scores of image 1 hold NaN or infinite"),
        ([1.0], [-np.inf, 0.0], "OOD scores of image 0 hold NaN or infinite"),
        ([[1.0]], [1.0], "ID scores have shape"),
        (["a"], [1.0], "must be real numbers"),
    ],
)
def test_bad_scores_are_named(ins: Any, outs: Any, message: str) -> None:
    with pytest.raises(QuantlensError, match=message):
        ood_metrics(ins, outs)


def test_change_is_quantized_less_fp32() -> None:
    fp32 = {
        "id": {"n": 10, "top1": 0.8, "nll": 1.0, "reliability": {"edges": [0, 1]}, "per_class": [{"n": 1}]},
        "ood": {"textures": {"group": "far", "msp": {"auroc": 0.9, "n_id": 10}, "vim": {"auroc": 0.7}}},
        "note": "x",
        "odd": None,
        "flag": True,
        "only_here": 1.0,
    }
    quantized = {
        "id": {"n": 10, "top1": 0.5, "nll": 2, "reliability": {"edges": [0, 1]}, "per_class": [{"n": 1}]},
        "ood": {"textures": {"group": "far", "msp": {"auroc": 0.95, "n_id": 10}}, "places": {"msp": {}}},
        "note": "y",
        "odd": 1.0,
        "flag": False,
    }
    got = change(quantized, fp32)
    assert set(got) == {"id", "ood"}
    assert got["id"] == pytest.approx({"top1": -0.3, "nll": 1.0})
    assert set(got["ood"]) == {"textures"}
    assert set(got["ood"]["textures"]) == {"msp"}
    assert got["ood"]["textures"]["msp"] == pytest.approx({"auroc": 0.05})
    assert change(fp32, fp32)["id"] == {"top1": 0.0, "nll": 0.0}
    with pytest.warns(DeprecationWarning, match="delta is quantlens.metrics.ood.opposite_change now"):
        assert metrics.delta(fp32, quantized)["id"] == pytest.approx({"top1": 0.3, "nll": -1.0})
    for name in ("ood", "classification"):
        with pytest.warns(DeprecationWarning, match=f"{name}_figures is quantlens.metrics.{name}.{name}_metrics now"):
            assert getattr(metrics, f"{name}_figures") is getattr(metrics, f"{name}_metrics")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        metrics.nothing  # noqa: B018


def test_change_of_real_metrics() -> None:
    ins, outs = tied_scores(16)
    before, after = ood_metrics(ins, outs), ood_metrics(ins - 0.2, outs)
    got = change(after, before)
    assert set(got) == {*FIGURES, "chance_aupr_out", "chance_aupr_in"}
    assert got["auroc"] == after["auroc"] - before["auroc"] < 0


def test_mean_over_sets_keeps_far_and_near_apart() -> None:
    ood = {
        "textures": {"n": 5, "source": "s", "group": "far", "msp": {"auroc": 0.9, "n_ood": 5}},
        "places": {"n": 50, "group": "far", "msp": {"auroc": 0.7, "n_ood": 50}, "vim": {"auroc": 0.6}},
        "ninco": {"n": 7, "group": "near", "msp": {"auroc": 0.2, "n_ood": 7}},
        "other": {"n": 7, "msp": {"auroc": 0.4, "n_ood": 7}},
    }
    got = mean_over_sets(ood)
    assert set(got) == {"far", "near", "all"}
    assert got["far"]["msp"] == pytest.approx({"auroc": 0.8, "n_sets": 2})  # sets weigh the same, not images
    assert got["far"]["vim"] == pytest.approx({"auroc": 0.6, "n_sets": 1})
    assert got["near"] == {"msp": pytest.approx({"auroc": 0.2, "n_sets": 1})}
    assert got["all"]["msp"] == pytest.approx({"auroc": 0.55, "n_sets": 4})
    assert mean_over_sets({}) == {}


def test_histograms_share_edges_and_count_every_image() -> None:
    ins, outs = tied_scores(10**9)
    got = score_histograms(ins, {"textures": outs, "places": outs - 3.0})
    edges = np.array(got["edges"])
    assert edges.shape == (41,)
    assert edges[0] == (outs - 3.0).min()
    assert edges[-1] == max(ins.max(), outs.max())
    assert sum(got["id"]) == len(ins)
    assert [sum(v) for v in got["ood"].values()] == [len(outs)] * 2
    middle = 27
    assert sum(got["id"][:middle]) == np.sum(ins < edges[middle])
    assert json.loads(json.dumps(got)) == got


@pytest.mark.parametrize("value", [0.0, 0.5, -3e5, 1e300, 1e-300])
def test_histogram_of_constant_scores(value: float) -> None:
    got = score_histograms(np.full(4, value), {"far": np.full(3, value)})
    assert (np.diff(got["edges"]) > 0).all()
    assert sum(got["id"]) == 4
    assert sum(got["ood"]["far"]) == 3


def test_histogram_of_nearly_constant_scores_and_bad_input() -> None:
    got = score_histograms([1.0, np.nextafter(1.0, 2.0)], {}, bins=3)
    assert (np.diff(got["edges"]) > 0).all()
    assert sum(got["id"]) == 2
    with pytest.raises(QuantlensError, match="scores of OOD set 'far' of image 0 hold NaN"):
        score_histograms([1.0], {"far": [np.nan]})


# ---- a threshold that keeps what it promises -------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 100))
def test_a_threshold_keeps_at_least_its_share_and_a_higher_one_does_not(levels: list[int], percent: int) -> None:
    scores = np.array(levels) / 7
    threshold = threshold_keeping(scores, percent / 100)
    assert threshold in scores
    assert 100 * int((scores >= threshold).sum()) >= percent * len(scores)  # in whole numbers: nothing rounds
    higher = scores[scores > threshold]
    assert higher.size == 0 or 100 * higher.size < percent * len(scores)


def test_the_threshold_of_150_images_keeps_143_and_not_142() -> None:
    scores = np.random.default_rng(0).normal(size=150)
    assert (scores >= threshold_keeping(scores, 0.95)).sum() == 143
    hundred = scores[:100]
    assert [(hundred >= threshold_keeping(hundred, k / 100)).sum() for k in range(1, 101)] == [*range(1, 101)]


def test_equal_scores_are_kept_together() -> None:
    assert threshold_keeping([0.0, 1.0, 1.0, 1.0], 0.25) == 1.0
    assert threshold_keeping([2.0, 2.0], 1.0) == 2.0
    narrow = np.array([0.1, 0.2, 0.3], np.float32)
    assert (narrow >= threshold_keeping(narrow, 1.0)).all()


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(QuantlensError, match="share to keep"):
        threshold_keeping([1.0], share)


def test_a_threshold_of_nothing_is_refused() -> None:
    with pytest.raises(QuantlensError, match="no scores"):
        threshold_keeping([], 0.95)
