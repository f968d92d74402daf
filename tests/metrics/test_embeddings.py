"""k-NN and linear-probe accuracy, cosine and CKA of features, each against another implementation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from quantlens.errors import QuantlensError
from quantlens.metrics import cosines, knn_classes, linear_cka, linear_classes, similarity


def world(n: int, seed: int, d: int = 12, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, d] of four classes numbered 2, 5, 6 and 11."""
    means = np.random.default_rng(0).normal(size=(4, d))
    rng = np.random.default_rng(seed)
    row = rng.integers(0, 4, n)
    return (means[row] + spread * rng.normal(size=(n, d))).astype(np.float32), np.array([2, 5, 6, 11])[row]


@pytest.mark.parametrize("k", [1, 20, 500])
def test_votes_of_neighbours_are_scikit_learns(k: int) -> None:
    bank, labels = world(150, 1)
    features, _ = world(200, 2)
    theirs = KNeighborsClassifier(
        min(k, 150), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.astype(np.float64), labels)
    assert knn_classes(features, bank, labels, k).tolist() == theirs.predict(features.astype(np.float64)).tolist()


def test_near_neighbours_weigh_more_than_many() -> None:
    """One at cosine 1 against two of another class at cosine 0.9: exp(0.1 / 0.07) is above 2."""
    away = [0.9, np.sqrt(1 - 0.9**2)]
    bank = np.array([[1.0, 0.0], away, away])
    assert knn_classes(np.array([[3.0, 0.0]]), bank, [1, 0, 0]).tolist() == [1]
    assert knn_classes(np.array([[3.0, 0.0]]), bank, [1, 0, 0], temperature=1.0).tolist() == [0]


def test_the_probe_is_logistic_regression_on_standardised_features() -> None:
    bank, labels = world(150, 1)
    bank[:, 3] = 0.7  # does not vary
    features, true = world(200, 2)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000)).fit(
        np.delete(bank, 3, 1), labels
    )
    found = linear_classes(features, bank, labels)
    assert (found == theirs.predict(np.delete(features, 3, 1))).mean() > 0.99
    assert (found == true).mean() > 0.6
    with pytest.raises(QuantlensError, match="two classes"):
        linear_classes(features, bank, np.zeros(150, int))


def test_likeness() -> None:
    x, _ = world(80, 3)
    y = x + 0.3 * np.random.default_rng(1).normal(size=x.shape)
    expected = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(x, y, strict=True)]
    assert cosines(x, y) == pytest.approx(expected)
    found = similarity(x, y)
    assert found["cosine_p5"] == pytest.approx(np.percentile(expected, 5))
    gram = [f @ f.T for f in (x - x.mean(0), y - y.mean(0))]
    centre = np.eye(80) - 1 / 80
    k, m = (centre @ g @ centre for g in gram)
    assert found["cka"] == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()), rel=1e-5)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, np.ones((80, 2))) is None
    with pytest.raises(QuantlensError, match="no cosine"):
        cosines(x, x[:, :5])
