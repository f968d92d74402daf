"""Scores that are measured only by name, against pytorch-ood's detectors and the papers' formulas written plainly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import entropy

from quantlens.errors import QuantlensError, QuantlensWarning, UnknownNameError, UnsupportedError
from quantlens.metrics import (
    FitData,
    available_scores,
    calibration_error,
    choose_scores,
    first_score,
    make_scorer,
    ood_metrics,
    temperature,
    temperature_metrics,
)

OF_CLASSES = ["kl_matching", "she", "msp_temperature"]
SHAPED = ["ash_p", "ash_b", "ash_s", "scale", "dice"]
PERCENTILES = {"ash_p": 60, "ash_b": 65, "ash_s": 90, "scale": 85}


class World:
    """Features of K classes (of one sign with `positive`), their classifier, noisy labels, and OOD features."""

    def __init__(self, n: int = 240, d: int = 40, k: int = 6, positive: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(k, d)) * 2

        def draw(classes: np.ndarray) -> np.ndarray:
            h = (centres[classes] + rng.normal(size=(len(classes), d))).astype(np.float32)
            return np.maximum(h, 0) if positive else h

        self.weight, self.bias = centres * 0.1, rng.normal(size=k)
        true = np.arange(n) % k
        self.features, self.id_features = draw(true), draw(rng.integers(0, k, size=70))
        self.ood_features = np.abs(rng.normal(size=(50, d))) if positive else rng.normal(size=(50, d))
        self.labels = np.where(rng.random(n) < 0.2, rng.integers(0, k, size=n), true)
        self.logits, self.id_logits, self.ood_logits = (
            h @ self.weight.T + self.bias for h in (self.features, self.id_features, self.ood_features)
        )

    def fit(self, **changes: Any) -> FitData:
        given = {name: getattr(self, name) for name in ("logits", "features", "labels", "weight", "bias")}
        return FitData(**{**given, **changes})

    def both(self, name: str, fit: FitData | None = None) -> tuple[np.ndarray, np.ndarray]:
        scorer = make_scorer(name, fit or self.fit())
        return scorer(self.id_logits, self.id_features), scorer(self.ood_logits, self.ood_features)


@pytest.mark.parametrize("name", [*OF_CLASSES, *SHAPED])
def test_agrees_with_pytorch_ood(name: str) -> None:
    """Up to the sign; its temperature is reached by 50 steps of L-BFGS only, so its own T is not compared."""
    import torch
    from pytorch_ood import detector as their

    world = World(positive=name in SHAPED)
    weight, bias = torch.tensor(world.weight), torch.tensor(world.bias)

    def head(h: torch.Tensor) -> torch.Tensor:
        return h.reshape(len(h), -1).double() @ weight.T + bias

    def expected(logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        f, h = torch.tensor(logits), torch.tensor(features)
        fit_h, y = torch.tensor(world.features), torch.tensor(world.labels)
        match name:
            case "kl_matching":
                found = their.KLMatching(None).fit_logits(torch.tensor(world.logits), y).predict_logits(f)
            case "she":
                found = their.SHE(None, head).fit_features(fit_h, y).predict_features(h)
            case "msp_temperature":
                found = their.MaxSoftmax.score(f, t=temperature(world.logits, world.labels))
            case "dice":
                found = their.DICE(None, weight, bias, p=0.9).fit_features(fit_h, y).predict_features(h)
            case "scale":
                found = their.SCALE(None, head, percentile=0.85).predict_feature_maps(h[:, :, None, None])
            case _:
                share, kind = PERCENTILES[name] / 100, name.replace("_", "-")
                found = their.ASH(None, head, variant=kind, percentile=share).predict_feature_maps(h[:, :, None, None])
        return -found.numpy()

    ids, oods = world.both(name)
    theirs = expected(world.id_logits, world.id_features), expected(world.ood_logits, world.ood_features)
    for ours, other in zip((ids, oods), theirs, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6)
    assert ood_metrics(ids, oods)["auroc"] == pytest.approx(ood_metrics(*theirs)["auroc"], abs=1e-3)
    if name in OF_CLASSES:
        assert ood_metrics(ids, oods)["auroc"] > 0.6  # larger is more in-distribution


def test_kl_matching_by_its_formula() -> None:
    world = World(n=30, k=7)  # some classes are predicted of no fit image
    world.logits[:, 3] -= 100
    p, predicted = softmax(world.logits, axis=1), world.logits.argmax(axis=1)
    templates = [p[predicted == c].mean(axis=0) for c in range(7) if (predicted == c).any()]
    assert 1 < len(templates) < 7
    expected = [-min(entropy(q, d) for d in templates) for q in softmax(world.id_logits, axis=1)]
    np.testing.assert_allclose(world.both("kl_matching")[0], expected, rtol=1e-9, atol=1e-12)
    unlabelled = world.both("kl_matching", world.fit(labels=None))[0]
    np.testing.assert_array_equal(unlabelled, world.both("kl_matching")[0])


def test_kl_matching_where_softmax_underflows_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    f = np.array([[4000.0, 0.0, 0.0], [0.0, 4000.0, 0.0], [0.0, 3998.0, 0.0]])
    scorer = make_scorer("kl_matching", FitData(f))
    assert scorer(f[:1])[0] == pytest.approx(0, abs=1e-9)
    assert scorer([[0.0, 0.0, 4000.0]])[0] == pytest.approx(np.logaddexp(-4000, -3998) - np.log(2), rel=1e-9)
    world = World()
    whole = world.both("kl_matching")
    monkeypatch.setattr("quantlens.metrics._arrays.BLOCK_ELEMENTS", 7)
    for here, there in zip(world.both("kl_matching"), whole, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-9)


def test_she_by_its_formula() -> None:
    world = World()
    world.labels[world.labels == 2] = 3  # no fit image of class 2 is right
    predicted = world.logits.argmax(axis=1)
    assert (predicted == 2).any()
    right = predicted == world.labels
    assert 0 < right.sum() < len(right)
    classes = [0, 1, 3, 4, 5]
    patterns = {c: world.features[right & (predicted == c)].mean(axis=0, dtype=np.float64) for c in classes}
    taken = [classes[int(np.argmax(f[classes]))] for f in world.id_logits]
    expected = [h @ patterns[c] for h, c in zip(world.id_features, taken, strict=True)]
    np.testing.assert_allclose(world.both("she")[0], expected, rtol=1e-6)
    wrong = (predicted + 1) % 6
    for labels in (None, wrong):  # no label, or no right image: all stand for their predicted classes
        everything = {c: world.features[predicted == c].mean(axis=0, dtype=np.float64) for c in range(6)}
        expected = [h @ everything[int(np.argmax(f))] for f, h in zip(world.id_logits, world.id_features, strict=True)]
        np.testing.assert_allclose(world.both("she", world.fit(labels=labels))[0], expected, rtol=1e-6)


@pytest.mark.parametrize("factor", [0.2, 1.0, 15.0])
def test_temperature_minimises_the_likelihood(factor: float) -> None:
    world = World()
    f = world.logits * factor

    def nll(log_t: float) -> float:
        return float(-np.take_along_axis(log_softmax(f / np.exp(log_t), axis=1), world.labels[:, None], axis=1).mean())

    t = temperature(f, world.labels)
    best = minimize_scalar(nll, bounds=(-4, 6), method="bounded", options={"xatol": 1e-9})
    assert t == pytest.approx(np.exp(best.x), rel=1e-4)
    assert t == pytest.approx(factor * temperature(world.logits, world.labels), rel=1e-6)  # of the scale of the logits
    found = temperature_metrics(f, world.labels, t, n_bins=10)
    p = softmax(f / t, axis=1)
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == world.labels
    assert found["temperature"] == t
    assert found["ece_temperature"] == pytest.approx(calibration_error(confidence, correct, n_bins=10), abs=1e-9)
    assert found["ece_temperature"] < 0.1


def test_temperatures_without_a_minimum() -> None:
    f = np.eye(4) * 5
    assert temperature(f, np.arange(4)) == 0.01  # all right
    assert temperature(f, (np.arange(4) + 1) % 4) == 100.0  # all wrong
    assert temperature(np.zeros((4, 4)), np.arange(4)) == 0.01  # all alike: any would do
    assert np.isfinite(make_scorer("msp_temperature", FitData(f, labels=np.arange(4)))(f * 1e4)).all()
    with pytest.raises(UnsupportedError, match=r"msp_temperature.*fitted on labels: give a `fit` set"):
        make_scorer("msp_temperature", FitData(f))


@pytest.mark.parametrize("name", SHAPED)
def test_shaped_by_their_formulas_with_features_of_both_signs(name: str) -> None:
    world, d = World(), 40
    expected = []
    for h in world.id_features.astype(np.float64):
        weight = world.weight
        if name == "dice":
            contribution = weight * world.features.mean(axis=0, dtype=np.float64)
            weight = np.where(contribution > np.percentile(contribution, 90), weight, 0)
        else:
            largest = np.argsort(-h)[: d - round(d * PERCENTILES[name] / 100)]
            kept = np.zeros(d)
            kept[largest] = h.sum() / len(largest) if name == "ash_b" else h[largest]
            scale = np.exp(h.sum() / h[largest].sum()) if name in ("ash_s", "scale") else 1.0
            h = (h if name == "scale" else kept) * scale
        expected.append(logsumexp(weight @ h + world.bias))
    np.testing.assert_allclose(world.both(name)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["ash_p", "ash_b", "ash_s", "scale"])
def test_shaping_needs_the_classifier_alone(name: str) -> None:
    world = World()
    alone = FitData(None, weight=world.weight, bias=world.bias)
    assert not alone.has_images
    np.testing.assert_array_equal(world.both(name, alone)[0], world.both(name)[0])
    with pytest.raises(UnsupportedError, match=f"{name}.*linear classifier"):
        make_scorer(name)
    with pytest.raises(UnsupportedError, match="fitted on ID images"):
        make_scorer("dice", alone)
    odd = np.zeros((4, 40))  # sums that are 0, negative and nearly 0
    odd[1] -= 3
    odd[2, ::2], odd[2, 1::2] = 1e-30, -1e3
    odd[3] = -np.linspace(1e-6, 1e3, 40)
    assert np.isfinite(make_scorer(name, alone)(None, odd)).all()


@pytest.mark.parametrize("name", [*OF_CLASSES, *SHAPED])
def test_needs_are_stated_truly(name: str) -> None:
    world, info = World(), available_scores()[name]
    assert info.optional
    assert all((info.title, info.paper, info.formula, info.label))
    scorer = make_scorer(name, world.fit())
    if info.needs_features:
        with pytest.raises(QuantlensError, match="features of the images, but none"):
            scorer(world.id_logits, None)
        with pytest.raises(UnsupportedError, match="penultimate features"):
            make_scorer(name, world.fit(features=None, weight=None, bias=None))
        with pytest.raises(QuantlensError, match="39 columns, but the score was fitted on 40"):
            scorer(world.id_logits, world.id_features[:, 1:])
    else:
        np.testing.assert_array_equal(scorer(world.id_logits, None), world.both(name)[0])
    bare = world.fit(weight=None, bias=None)
    if info.needs_classifier:
        with pytest.raises(UnsupportedError, match=f"{name}.*linear classifier"):
            make_scorer(name, bare)
    else:
        np.testing.assert_array_equal(world.both(name, bare)[0], world.both(name)[0])
    assert scorer(world.id_logits[:0], world.id_features[:0]).shape == (0,)
    some = scorer(world.id_logits[5:9], world.id_features[5:9])
    np.testing.assert_allclose(some, world.both(name)[0][5:9], rtol=1e-9)


def test_those_near_chance_on_transformers_warn() -> None:
    with pytest.warns(QuantlensWarning, match=r"^ash_s, dice: made for .*OpenOOD v1.5 measures .* near chance"):
        assert list(choose_scores(["ASH-S", "she", "dice"], "classify")) == ["ash_s", "she", "dice"]
    assert list(choose_scores(["KL matching", "MSP, temperature", "SHE"])) == ["kl_matching", "msp_temperature", "she"]
    with pytest.raises(UnknownNameError, match="did you mean 'ash_s'"):
        choose_scores(["ash_ss"])
    with pytest.raises(UnsupportedError, match="does not fit the task 'multilabel'"):
        choose_scores(["she"], "multilabel")


def test_no_score_with_a_warning_stands_for_all_where_there_is_another():
    assert first_score(["ash_s", "dice", "gen", "knn"]) == "gen"
    assert first_score(["ash_s", "msp"]) == "msp"
    assert first_score(["scale", "ash_s"]) == "scale"
    assert first_score(["ash_s", "somebody's"]) == "somebody's"
    assert first_score([]) == "msp"
