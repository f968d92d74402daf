"""OOD scores against pytorch-ood's detectors, scipy and direct formulas, and on degenerate fit sets."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from plugin_state import forget
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.metrics import (
    FitData,
    ScoreInfo,
    Scorer,
    available_scores,
    choose_scores,
    make_scorer,
    ood_metrics,
    ood_scores as scores,
    register_score,
    score_label,
)

NAMES = [
    "msp",
    "maxlogit",
    "energy",
    "entropy",
    "gen",
    "knn",
    "vim",
    "mahalanobis",
    "rmahalanobis",
    "mahalanobis_l2",
    "rmahalanobis_l2",
    "react",
]
FITTED = NAMES[5:]
OPTIONAL = ["kl_matching", "she", "msp_temperature", "ash_p", "ash_b", "ash_s", "scale", "dice"]
OF_SIGMOIDS = ["max_confidence", "joint_energy", "sigmoid_confidence"]


class World:
    """Features of K Gaussian classes with correlated noise, their linear classifier, and OOD features."""

    def __init__(self, n: int = 400, d: int = 12, k: int = 5, seed: int = 0, step: float | None = None) -> None:
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(k, d)) * 4
        mix = rng.normal(size=(d, d)) * 0.3 + np.eye(d)

        def draw(labels: np.ndarray) -> np.ndarray:
            return centres[labels] + rng.normal(size=(len(labels), d)) @ mix + 1.0

        def rounded(x: np.ndarray) -> np.ndarray:
            return x if step is None else np.round(x / step) * step

        self.weight = centres * 0.015
        self.bias = rng.normal(size=k) * 0.05 - 0.0075 * (centres**2).sum(axis=1)
        self.labels = rng.permutation(np.arange(n) % k)
        self.features = rounded(draw(self.labels))
        self.id_features = rounded(draw(rng.integers(0, k, size=150)))
        self.ood_features = rounded(rng.normal(size=(90, d)) * 3 - 1.0)
        self.logits, self.id_logits, self.ood_logits = (
            self.classify(h) for h in (self.features, self.id_features, self.ood_features)
        )

    def classify(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weight.T + self.bias

    def fit(self, **changes: Any) -> FitData:
        given = {name: getattr(self, name) for name in ("logits", "features", "labels", "weight", "bias")}
        return FitData(**{**given, **changes})

    def both(self, name: str, fit: FitData | None = None) -> tuple[np.ndarray, np.ndarray]:
        scorer = make_scorer(name, fit or self.fit())
        return scorer(self.id_logits, self.id_features), scorer(self.ood_logits, self.ood_features)


@pytest.fixture
def double() -> Iterator[None]:
    """pytorch-ood allocates its statistics in torch's default dtype: compare in float64."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# ----------------------------------------------------------------------------------------------------
# against pytorch-ood (its scores are larger for OOD, so the sign is turned)


@pytest.mark.parametrize("step", [None, 0.5, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_pytorch_ood(name: str, step: float | None, double: None) -> None:
    """Equal up to the sign and the constant factors named below; quantized features give heavy ties.

    - GEN: theirs is the mean over the M probabilities, ours the paper's sum. It clamps p to 1e-7..1 - 1e-7.
    - Mahalanobis: theirs has the sum of squares in place of the covariance (a factor N), halves the distance,
      and adds a ridge of 1e-6. RMD: the factor N alone.
    - ViM: theirs takes d from the caller; its weights are cast to float32.
    - ReAct: theirs clips feature maps of any shape, here [N, D].
    """
    import torch
    from pytorch_ood import detector as their

    world = World(step=step)
    if step is not None:
        assert len(np.unique(world.features)) < 100
    n, d = world.features.shape
    h, y = torch.tensor(world.features), torch.tensor(world.labels)
    unit = torch.tensor(world.features / np.linalg.norm(world.features, axis=1, keepdims=True))
    weight, bias = torch.tensor(world.weight), torch.tensor(world.bias)

    def expected(logits: np.ndarray, features: np.ndarray) -> torch.Tensor:
        f, x = torch.tensor(logits), torch.tensor(features)
        x_unit = x / x.norm(dim=1, keepdim=True)
        match name:
            case "msp":
                return -their.MaxSoftmax.score(f)
            case "maxlogit":
                return -their.MaxLogit.score(f)
            case "energy":
                return -their.EnergyBased.score(f)
            case "entropy":
                return -their.Entropy.score(f)
            case "gen":
                return -their.GEN.score(f, gamma=0.1, M=100) * min(100, f.shape[1])
            case "knn":
                return -their.KNN(None, k=50).fit_features(h, y).predict_features(x)
            case "vim":
                detector = their.ViM(None, d=scores.vim_dimension(d, n), w=weight, b=bias)
                return -detector.fit_features(h.float(), y).predict_features(x.float())
            case "mahalanobis":
                return -2 * n * their.Mahalanobis(None).fit_features(h, y).predict_features(x)
            case "rmahalanobis":
                return -n * their.RMD(None).fit_features(h, y).predict_features(x)
            case "mahalanobis_l2":
                return -2 * n * their.Mahalanobis(None).fit_features(unit, y).predict_features(x_unit)
            case "rmahalanobis_l2":
                return -n * their.RMD(None).fit_features(unit, y).predict_features(x_unit)
            case _:
                detector = their.ReAct(None, lambda z: z @ weight.T + bias, percentile=0.9)
                return -detector.fit_feature_maps(h, y).predict_feature_maps(x)

    tolerance = 2e-5 if name == "vim" or "mahalanobis" in name else 1e-9  # float32; their ridge
    ids, oods = world.both(name)
    theirs = (
        expected(world.id_logits, world.id_features).numpy(),
        expected(world.ood_logits, world.ood_features).numpy(),
    )
    np.testing.assert_allclose(ids, theirs[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(oods, theirs[1], rtol=tolerance, atol=tolerance)
    assert np.std(ids) > 1e-3
    ours_figures, their_figures = ood_metrics(ids, oods), ood_metrics(*theirs)
    for figure, value in ours_figures.items():
        assert value == pytest.approx(their_figures[figure], abs=2e-3), figure
    assert ours_figures["auroc"] > 0.6  # larger is more in-distribution


# ----------------------------------------------------------------------------------------------------
# logits alone


@pytest.mark.parametrize("k", [1, 2, 7, 150])
def test_logit_scores_by_their_formulas(k: int) -> None:
    rng = np.random.default_rng(k)
    f = (rng.normal(size=(40, k)) * 3).astype(np.float32)
    p = softmax(f.astype(np.float64), axis=1)
    largest = -np.sort(-p, axis=1)[:, :100]
    expected = {
        "msp": p.max(axis=1),
        "maxlogit": f.max(axis=1),
        "energy": logsumexp(f.astype(np.float64), axis=1),
        "entropy": (p * np.log(p)).sum(axis=1),
        "gen": -(largest**0.1 * (1 - largest) ** 0.1).sum(axis=1),
    }
    for name, value in expected.items():
        got = make_scorer(name)(f)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_logit_scores_of_extreme_logits() -> None:
    f = np.array([[5000.0, 0.0, -5000.0], [60.0, 0.0, 0.0], [30.0, 0.0, 0.0], [7.0, 7.0, 7.0]])
    for name in NAMES[:5]:
        assert np.isfinite(make_scorer(name)(f)).all(), name
    assert scores.energy(f).tolist()[0] == 5000.0
    assert scores.msp(f)[3] == pytest.approx(1 / 3)
    assert scores.entropy(f)[3] == pytest.approx(-np.log(3))
    assert scores.entropy(f)[1] < 0
    # p rounds to 1 in both rows, 1 - p is 2 e^-60 and 2 e^-30; (1 - p)^0.1 keeps them apart
    tail = np.array([np.exp(-60.0), np.exp(-30.0) / (1 + 2 * np.exp(-30.0))])
    np.testing.assert_allclose(scores.gen(f)[1:3], -((2 * tail) ** 0.1) - 2 * tail**0.1, rtol=1e-9)
    assert scores.gen(f, top=1)[3] == pytest.approx(-((2 / 9) ** 0.1))


def test_ties_of_quantized_logits_survive() -> None:
    f = np.random.default_rng(0).integers(0, 3, size=(500, 3)).astype(np.float32)
    distinct = len(np.unique(f, axis=0))
    for name in NAMES[:5]:
        assert len(np.unique(make_scorer(name)(f))) <= distinct == 27, name


# ----------------------------------------------------------------------------------------------------
# what every score has in common


@pytest.mark.parametrize("name", NAMES)
def test_tells_ood_from_id_and_depends_on_each_image_alone(name: str) -> None:
    world = World(n=300, d=10, k=4, seed=3)
    ids, oods = world.both(name)
    assert ids.shape == (150,)
    assert ids.dtype == np.float64
    assert ood_metrics(ids, oods)["auroc"] > 0.6
    scorer = make_scorer(name, world.fit())
    order = np.random.default_rng(0).permutation(150)[:33]
    np.testing.assert_allclose(
        scorer(world.id_logits[order], world.id_features[order]), ids[order], rtol=1e-9, atol=1e-12
    )
    assert scorer(world.id_logits[:0], world.id_features[:0]).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(n=130)
    whole = world.both(name)
    monkeypatch.setattr("quantlens.metrics._arrays.BLOCK_ELEMENTS", 12 * 7)
    for here, there in zip(world.both(name), whole, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FITTED)
def test_order_of_fit_images_does_not_matter(name: str) -> None:
    world = World(n=60, seed=4)
    order = np.random.default_rng(1).permutation(60)
    shuffled = world.fit(logits=world.logits[order], features=world.features[order], labels=world.labels[order])
    for here, there in zip(world.both(name), world.both(name, shuffled), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_stated_truly(name: str) -> None:
    world, info = World(n=80), available_scores()[name]
    assert info.name == name
    assert all((info.title, info.paper, info.formula))
    assert info.needs_fit == (name in FITTED)
    if not info.needs_fit:
        assert not info.needs_features
        make_scorer(name, None)(world.id_logits, None)
        return
    with pytest.raises(QuantlensError, match=f"{name}.*fitted on ID images"):
        make_scorer(name, None)
    bare = world.fit(weight=None, bias=None)
    if info.needs_classifier:
        with pytest.raises(UnsupportedError, match=f"{name}.*linear classifier"):
            make_scorer(name, bare)
    else:
        np.testing.assert_array_equal(world.both(name, bare)[0], world.both(name)[0])
    with pytest.raises(UnsupportedError, match=f"{name}.*penultimate features"):
        make_scorer(name, world.fit(features=None, weight=None))
    scorer = make_scorer(name, world.fit())
    with pytest.raises(QuantlensError, match="features of the images, but none"):
        scorer(world.id_logits, None)
    with pytest.raises(QuantlensError, match="11 columns, but the score was fitted on 12"):
        scorer(world.id_logits, world.id_features[:, 1:])
    broken = world.id_features.copy()
    broken[3, 2] = np.nan
    with pytest.raises(QuantlensError, match="features of image 3 hold NaN"):
        scorer(world.id_logits, broken)


def test_names() -> None:
    assert list(available_scores()) == [*NAMES, *OPTIONAL, *OF_SIGMOIDS]
    assert list(choose_scores(None, "classify")) == NAMES
    with pytest.raises(UnknownNameError, match=r"unknown OOD score 'mahalanobi'; did you mean 'mahalanobis'"):
        make_scorer("mahalanobi")


def test_memory_of_nearest_neighbours_stays_bounded() -> None:
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((3000, 8), dtype=np.float32)
    scorer = make_scorer("knn", FitData(np.zeros((3000, 2)), bank))
    tracemalloc.start()
    try:
        scorer(None, rng.standard_normal((6000, 8), dtype=np.float32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80e6  # all distances at once would be 144 MB, and their order as much again


# ----------------------------------------------------------------------------------------------------
# nearest neighbours


def test_knn_by_direct_distances_and_few_fit_images() -> None:
    world = World(n=70)
    unit = scores.l2_normalise(world.features)
    away = np.sort(np.linalg.norm(scores.l2_normalise(world.id_features)[:, None] - unit, axis=2), axis=1)
    np.testing.assert_allclose(world.both("knn")[0], -away[:, 49], rtol=1e-12)
    np.testing.assert_allclose(scores.knn(world.id_features, unit), -away[:, 49], rtol=1e-12)
    few = world.fit(logits=world.logits[:20], features=world.features[:20], labels=None)
    away = np.linalg.norm(scores.l2_normalise(world.id_features)[:, None] - unit[:20], axis=2)
    np.testing.assert_allclose(world.both("knn", few)[0], -away.max(axis=1), rtol=1e-12)
    np.testing.assert_allclose(scores.knn(unit[:5], unit, k=1), 0, atol=1e-15)  # themselves


def test_knn_with_features_of_zero() -> None:
    got = scores.knn(np.array([[0.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0]]), k=2)
    np.testing.assert_allclose(got, [-1.0, -1.0])


# ----------------------------------------------------------------------------------------------------
# ViM


@pytest.mark.parametrize(
    ("d", "n", "expected"),
    [
        (2048, 5000, 1000),
        (1024, 5000, 512),
        (768, 5000, 512),
        (384, 5000, 192),
        (192, 100, 50),
        (3, 50, 1),
        (1, 50, 0),
        (768, 1, 0),
    ],
)
def test_vim_dimension(d: int, n: int, expected: int) -> None:
    assert scores.vim_dimension(d, n) == expected


def test_vim_residual_is_what_the_principal_space_misses() -> None:
    world = World(n=300, d=8, k=3)
    fitted, _, found = scores.vim_parameters(world.fit())
    origin = -np.linalg.pinv(world.weight) @ world.bias
    np.testing.assert_allclose(fitted, origin)
    centred = world.features - origin
    principal = np.linalg.svd(centred, full_matrices=False)[2][:4].T  # right singular vectors, largest first
    residual = np.linalg.norm(centred - centred @ principal @ principal.T, axis=1)
    alpha = abs(world.logits.max(axis=1).mean()) / residual.mean()
    assert found == pytest.approx(alpha)
    expected = logsumexp(world.logits, axis=1) - alpha * residual
    np.testing.assert_allclose(make_scorer("vim", world.fit())(world.logits, world.features), expected, rtol=1e-9)


def test_vim_never_rewards_a_residual() -> None:
    world = World(n=200)
    low = world.fit(logits=world.logits - world.logits.max() - 5, bias=None)
    origin, basis, alpha = scores.vim_parameters(low)
    assert alpha > 0
    np.testing.assert_array_equal(origin, 0)  # a classifier without bias
    scorer, outward = make_scorer("vim", low), basis[:, 0]
    near, far = (scorer(np.zeros((1, 5)), (outward * size)[None]) for size in (1.0, 9.0))
    assert far < near


def test_vim_with_fewer_images_than_features() -> None:
    """The residual of the fit images must not vanish, else alpha and every score are without meaning."""
    world = World(n=400, d=40, k=6, seed=2)
    few = world.fit(logits=world.logits[:16], features=world.features[:16], labels=None)
    _, basis, alpha = scores.vim_parameters(few)
    assert basis.shape == (40, 32)
    assert 0 < alpha < 100
    assert ood_metrics(*world.both("vim", few))["auroc"] > 0.6


@pytest.mark.parametrize(("directions", "kept"), [(10, 5), (20, 10), (30, 20)])
def test_vim_with_features_of_few_directions(directions: int, kept: int) -> None:
    """d = 20 of 40 would leave no residual where the features span 20 directions or fewer."""
    world = World(n=400, d=40, k=6, seed=2)
    flat = world.features @ np.diag(np.arange(40) < directions)
    _, basis, alpha = scores.vim_parameters(world.fit(features=flat, bias=None))
    assert basis.shape == (40, 40 - kept)
    assert 0 < alpha < 100


# ----------------------------------------------------------------------------------------------------
# Mahalanobis


def test_class_means() -> None:
    world = World(n=50, k=7)
    labels = np.where(world.labels == 3, 6, world.labels)
    means, row = scores.class_means(world.features, labels)
    present = [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(means, [world.features[labels == c].mean(axis=0) for c in present])
    np.testing.assert_array_equal(np.array(present)[row], labels)


@pytest.mark.parametrize(("n", "d"), [(5, 20), (40, 20), (500, 4)])
def test_ledoit_wolf_agrees_with_scikit_learn(n: int, d: int) -> None:
    from sklearn.covariance import ledoit_wolf

    x = np.random.default_rng(n).normal(size=(n, d)) * np.linspace(0.1, 3, d)
    x -= x.mean(axis=0)
    expected, shrinkage = ledoit_wolf(x, assume_centered=True)
    assert 0 < shrinkage < 1
    np.testing.assert_allclose(scores.ledoit_wolf(x), expected, rtol=1e-10, atol=1e-12)


def test_covariances_pass_from_published_to_shrunk() -> None:
    world = World(n=600, d=10, k=5)
    means, row = scores.class_means(world.features, world.labels)
    inner = world.features - means[row]
    within, total = scores.tied_covariances(world.features, means, row)  # 595 >= 5 * 10 degrees of freedom
    np.testing.assert_allclose(within, inner.T @ inner / 600)
    np.testing.assert_allclose(total, np.cov(world.features.T, bias=True))

    h, y = world.features[:12], world.labels[:12]  # 12 - 5 = 7 degrees of freedom for 10 features: singular
    means, row = scores.class_means(h, y)
    assert len(means) == 5
    inner, outer = scores.ledoit_wolf(h - means[row]), scores.ledoit_wolf(h - h.mean(axis=0))
    within, total = scores.tied_covariances(h, means, row)
    np.testing.assert_allclose(total, outer)
    np.testing.assert_allclose(within, 0.7 * inner * 12 / 7 + 0.3 * outer)

    means, row = scores.class_means(h, np.arange(12))  # one image per class
    within, total = scores.tied_covariances(h, means, row)
    np.testing.assert_allclose(within, outer)


def test_directions_of_rounding_noise_do_not_count() -> None:
    """Two channels that differ by noise alone are one channel, not a constraint that images violate."""
    world = World(n=400, d=6, k=4)
    scorer = make_scorer("mahalanobis", world.fit(weight=None))
    noise = np.random.default_rng(0).normal(size=(550, 1)) * 1e-5
    twice = np.c_[world.features, world.features[:, :1] + noise[:400]]
    doubled = make_scorer("mahalanobis", FitData(world.logits, twice, world.labels))
    seen = np.c_[world.id_features, world.id_features[:, :1] + noise[400:]]
    np.testing.assert_allclose(doubled(None, seen), scorer(None, world.id_features), rtol=1e-3)


@pytest.mark.parametrize("name", ["mahalanobis", "rmahalanobis"])
def test_mahalanobis_ignores_linear_maps_of_the_features(name: str) -> None:
    world = World(n=400, d=6, k=4)
    plain = world.both(name)
    turn = np.random.default_rng(5).normal(size=(6, 6)) + 2 * np.eye(6)
    scorer = make_scorer(name, world.fit(features=world.features @ turn + 3, weight=None))
    np.testing.assert_allclose(scorer(None, world.id_features @ turn + 3), plain[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["mahalanobis", "rmahalanobis", "mahalanobis_l2", "rmahalanobis_l2"])
def test_classes_come_from_labels_or_else_from_predictions(name: str) -> None:
    world = World(n=120)
    world.logits = world.logits + np.random.default_rng(0).normal(size=world.logits.shape)
    predicted = world.logits.argmax(axis=1)
    assert 0.1 < np.mean(predicted == world.labels) < 0.95
    unlabelled = world.both(name, world.fit(labels=None))[0]
    np.testing.assert_array_equal(unlabelled, world.both(name, world.fit(labels=predicted))[0])
    assert not np.allclose(unlabelled, world.both(name)[0])


@pytest.mark.parametrize("name", ["mahalanobis", "rmahalanobis_l2"])
def test_classes_without_fit_images_are_left_out(name: str) -> None:
    world = World(n=100)
    wide = np.concatenate([world.logits, np.full((100, 3), -50.0)], axis=1)
    scorer = make_scorer(name, FitData(wide, world.features, world.labels))
    np.testing.assert_array_equal(scorer(None, world.id_features), world.both(name)[0])


# ----------------------------------------------------------------------------------------------------
# ReAct


def test_react_clips_and_recomputes() -> None:
    world = World(n=200)
    threshold = np.sort(world.features, axis=None)[[2159, 2160]] @ [0.9, 0.1]  # 90 % of the way through 2400 values
    clipped = np.where(world.id_features > threshold, threshold, world.id_features)
    expected = logsumexp(world.classify(clipped), axis=1)
    np.testing.assert_allclose(world.both("react")[0], expected)
    assert not np.allclose(expected, scores.energy(world.id_logits))


# ----------------------------------------------------------------------------------------------------
# degenerate fit sets


def degenerate(kind: str) -> tuple[World, FitData]:
    world = World(n=300, d=12, k=5, seed=7)
    h, y = world.features.copy(), world.labels
    match kind:
        case "one image":
            return world, world.fit(logits=world.logits[:1], features=h[:1], labels=y[:1])
        case "two images":
            return world, world.fit(logits=world.logits[:2], features=h[:2], labels=None)
        case "fewer images than features":
            return world, world.fit(logits=world.logits[:8], features=h[:8], labels=y[:8])
        case "one class":
            return world, world.fit(labels=np.zeros_like(y))
        case "constant features":
            return world, world.fit(features=np.full_like(h, 0.1234567))
        case "zero features":
            return world, world.fit(features=np.zeros_like(h))
        case "dead channels":
            h[:, :3] = [0.0, 0.1, -7.0]
            return world, world.fit(features=h)
        case "repeated channels":
            h[:, 6:] = h[:, :6]
            return world, world.fit(features=h)
        case "collapsed classes":
            return world, world.fit(features=scores.class_means(h, y)[0][y])
        case "huge features":
            return world, world.fit(features=h * 1e15)
        case _:
            return world, world.fit(features=h * 1e-15)


@pytest.mark.parametrize(
    "kind",
    [
        "one image",
        "two images",
        "fewer images than features",
        "one class",
        "constant features",
        "zero features",
        "dead channels",
        "repeated channels",
        "collapsed classes",
        "huge features",
        "tiny features",
    ],
)
@pytest.mark.parametrize("name", FITTED)
def test_degenerate_fit_sets_give_finite_scores(name: str, kind: str) -> None:
    world, fit = degenerate(kind)
    ids, oods = world.both(name, fit)
    assert np.isfinite(ids).all()
    assert np.isfinite(oods).all()
    if kind in ("constant features", "zero features") and "mahalanobis" in name:
        assert not ids.any()
        assert not oods.any()


@pytest.mark.parametrize("kind", ["fewer images than features", "dead channels", "repeated channels"])
@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis_l2", "vim"])
def test_scores_still_detect_on_degenerate_fit_sets(name: str, kind: str) -> None:
    world, fit = degenerate(kind)
    if kind == "dead channels":
        world.id_features[:, :3] = world.ood_features[:, :3] = [0.0, 0.1, -7.0]
    if kind == "repeated channels":
        world.id_features[:, 6:] = world.id_features[:, :6]
        world.ood_features[:, 6:] = world.ood_features[:, :6]
    assert ood_metrics(*world.both(name, fit))["auroc"] > 0.6


@pytest.mark.parametrize("n", [10, 40])
def test_one_image_per_class_still_detects(n: int) -> None:
    """As in a fit set with one image of each ImageNet class: there is no scatter within classes."""
    rng = np.random.default_rng(n)
    spread = np.diag(np.linspace(5, 0.2, 20))
    h, ids = rng.normal(size=(n, 20)) @ spread, rng.normal(size=(200, 20)) @ spread
    oods = rng.normal(size=(200, 20)) @ spread[::-1, ::-1]  # large where ID features hardly vary
    scorer = make_scorer("mahalanobis", FitData(np.zeros((n, n)), h, np.arange(n)))
    assert ood_metrics(scorer(None, ids), scorer(None, oods))["auroc"] > 0.7


# ----------------------------------------------------------------------------------------------------
# bad fit data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((0, 5)), "features": None, "labels": None}, "there are no fit images"),
        ({"features": np.zeros((3, 12))}, "fit features are of 3 images, the fit logits of 80"),
        ({"labels": np.full(80, 5)}, r"label 5 of image 0 is outside 0\.\.4"),
        ({"labels": np.zeros(3)}, "labels have shape"),
        ({"weight": np.zeros((5, 11))}, r"weight has shape \(5, 11\), but \(5, 12\) is expected"),
        ({"bias": np.zeros(4)}, "bias must be 5 finite numbers"),
        ({"bias": np.full(5, np.nan)}, "bias must be 5 finite numbers"),
        ({"logits": np.full((80, 5), np.nan)}, "fit logits of image 0 hold NaN"),
        ({"features": np.full((80, 12), np.inf)}, "fit features of image 0 hold NaN or infinite"),
    ],
)
def test_bad_fit_data_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantlensError, match=message):
        World(n=80).fit(**changes)


def test_bad_images_are_named() -> None:
    world = World(n=80)
    with pytest.raises(QuantlensError, match="logits are of 90 images and the features of 150"):
        make_scorer("vim", world.fit())(world.ood_logits, world.id_features)
    with pytest.raises(QuantlensError, match="logits of the images, but none were given"):
        make_scorer("msp")(None, world.id_features)
    with pytest.raises(QuantlensError, match="logits of image 0 hold NaN"):
        make_scorer("energy")(np.full((2, 2), np.nan))


# ----------------------------------------------------------------------------------------------------
# scores of other people


@pytest.fixture
def own_scores() -> Iterator[None]:
    """What the test registers is forgotten after it."""
    yield
    forget()


def test_a_score_of_someone_else_is_measured_like_ours(own_scores: None) -> None:
    @register_score(ScoreInfo("margin", "Margin", "a test", label="margin f"))
    def margin(logits: np.ndarray) -> np.ndarray:
        top = np.sort(logits, axis=1)
        return top[:, -1] - top[:, -2]

    @register_score(ScoreInfo("norm", "Norm", "a test", needs_fit=True, needs_features=True))
    class Norm:
        @classmethod
        def fit(cls, data: FitData) -> Scorer:
            mean = np.linalg.norm(data.features64(), axis=1).mean()
            return lambda logits, features=None: np.linalg.norm(features, axis=1) / mean

    assert list(available_scores())[-2:] == ["margin", "norm"]
    assert score_label("margin") == "margin f"
    assert (score_label("norm"), score_label("of another program")) == ("norm", "of another program")
    world = World(n=40)
    assert make_scorer("margin")(world.id_logits).tolist() == margin(world.id_logits).tolist()
    found = make_scorer("norm", world.fit())(world.id_logits, world.features)
    assert found.mean() == pytest.approx(1)
    with pytest.raises(QuantlensError, match="'norm' is fitted on ID images"):
        make_scorer("norm")


def test_a_name_is_taken_once(own_scores: None) -> None:
    def other(logits: np.ndarray) -> np.ndarray:
        return logits[:, 0]

    with pytest.raises(QuantlensError, match=r"name 'msp' is taken by msp \(quantlens"):
        register_score(ScoreInfo("msp", "Mine", "a test"))(other)
    register_score(ScoreInfo("other", "Mine", "a test"))(other)
    register_score(ScoreInfo("other", "Mine, again", "a test"))(other)
    assert available_scores()["other"].title == "Mine, again"
