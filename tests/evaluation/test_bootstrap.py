"""Resampled figures against independent implementations: scikit-learn with sample weights, loops, scipy's bootstrap."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from quantlens.evaluation.compare import ID_METRICS, OOD_METRICS, Wanted, point, replicate
from quantlens.evaluation.outputs import Outputs, of_images
from quantlens.metrics import classification_metrics, mean_over_sets, ood_metrics
from quantlens.metrics.bootstrap import Resamples, differences, interval

SETS = ("far-away", "near by")
# scipy before 1.15 has another word for it
GENERATOR = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"


def outputs(rng: np.random.Generator, *, n=70, m=(40, 33), k=6, steps: float | None = None, shift=1.0) -> Outputs:
    """Random outputs; `steps` rounds the scores, so that many are equal."""
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) + 1.5 * np.eye(k)[labels]

    def scores(size: int, mean: float) -> dict[str, np.ndarray]:
        drawn = {"msp": rng.normal(mean, 1, size), "energy": rng.normal(mean, 3, size)}
        return drawn if steps is None else {name: np.round(v / steps) * steps for name, v in drawn.items()}

    about = {
        "model": "m", "method": "minmax", "bits": "W4A4", "seed": 0, "n_bins": 15, "id": {},
        "ood": {name: {"group": group} for name, group in zip(SETS, ("far", "near"), strict=True)},
    }  # fmt: skip
    ood = {name: scores(size, 0.0) for name, size in zip(SETS, m, strict=True)}
    return Outputs(**of_images(logits, labels, True), id_scores=scores(n, shift), ood_scores=ood, about=about)


WANTED = Wanted(SETS, ("msp", "energy"))


def repeated(one: Outputs, counts: dict[str, np.ndarray]) -> Outputs:
    """The resample written out: every image as often as it was drawn."""
    ids = np.repeat(np.arange(one.labels.size), counts[""].astype(int))
    vectors = {name: getattr(one, name)[ids] for name in ("labels", "predicted", "rank", "confidence", "nll", "brier")}
    return Outputs(
        **vectors,
        id_scores={name: v[ids] for name, v in one.id_scores.items()},
        ood_scores={
            s: {name: np.repeat(v, counts[s].astype(int)) for name, v in entry.items()}
            for s, entry in one.ood_scores.items()
        },
        about=one.about,
        logits=None if one.logits is None else one.logits[ids],
    )


@pytest.mark.parametrize("steps", [None, 0.5, 100.0])
def test_every_resample_has_the_figures_of_the_images_that_were_drawn(steps):
    """Each column of counts, written out as images and measured by the ordinary metrics."""
    one = outputs(np.random.default_rng(1), steps=steps)
    resamples = Resamples(130, seed=3)
    found = replicate(one, WANTED, resamples)
    columns = [counts for _, counts in resamples.chunks({"": 70, SETS[0]: 40, SETS[1]: 33})]
    counts = {name: np.concatenate([c[name] for c in columns], axis=1) for name in columns[0]}
    assert all((c.sum(axis=0) == len(c)).all() and c.shape[1] == 130 for c in counts.values())
    for r in range(0, 130, 9):
        drawn = repeated(one, {name: c[:, r] for name, c in counts.items()})
        ood = {s: {k: ood_metrics(drawn.id_scores[k], v) for k, v in drawn.ood_scores[s].items()} for s in SETS}
        means = mean_over_sets({s: {**e, "group": one.groups[s]} for s, e in ood.items()})
        for s in SETS:
            for score in WANTED.scores:
                for figure in OOD_METRICS:
                    path = f"{s}.{score}.{figure}"
                    assert found[f"ood.{path}"][r] == pytest.approx(ood[s][score][figure], abs=2e-6), path
                    group = one.groups[s]
                    mean = means[group][score][figure]
                    assert found[f"ood_mean.{group}.{score}.{figure}"][r] == pytest.approx(mean, abs=2e-6)
        assert found["id.top1"][r] == pytest.approx((drawn.rank == 0).mean(), abs=1e-6)
        assert found["id.nll"][r] == pytest.approx(drawn.nll.mean(), abs=1e-5)


def test_against_sample_weights_of_scikit_learn():
    one = outputs(np.random.default_rng(4), steps=0.25)
    resamples = Resamples(40)
    found = replicate(one, WANTED, resamples)
    _, counts = next(resamples.chunks({"": 70, SETS[0]: 40, SETS[1]: 33}))
    truth = np.r_[np.zeros(70), np.ones(40)]
    score = -np.r_[one.id_scores["msp"], one.ood_scores[SETS[0]]["msp"]]
    for r in range(40):
        weight = np.r_[counts[""][:, r], counts[SETS[0]][:, r]]
        assert found[f"ood.{SETS[0]}.msp.auroc"][r] == pytest.approx(
            roc_auc_score(truth, score, sample_weight=weight), abs=2e-6
        )
        assert found[f"ood.{SETS[0]}.msp.aupr_out"][r] == pytest.approx(
            average_precision_score(truth, score, sample_weight=weight), abs=2e-6
        )


def test_the_point_figures_are_those_of_a_result():
    rng = np.random.default_rng(5)
    one = outputs(rng, steps=0.5)
    found = point(one, WANTED)
    for s in SETS:
        for score in WANTED.scores:
            for figure in OOD_METRICS:
                expected = ood_metrics(one.id_scores[score], one.ood_scores[s][score])[figure]
                assert found[f"ood.{s}.{score}.{figure}"] == pytest.approx(expected, abs=1e-12)
    labels = rng.integers(0, 6, 50)
    logits = rng.normal(size=(50, 6))
    one = Outputs(**of_images(logits, labels, "scores"), id_scores={}, ood_scores={}, about={"n_bins": 15, "ood": {}})
    found = point(one, Wanted((), ()))
    for figure in ID_METRICS:
        assert found[f"id.{figure}"] == pytest.approx(classification_metrics(logits, labels)[figure], abs=1e-12)


def test_intervals_are_those_of_scipys_paired_bootstrap():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 6, 400)
    logits = rng.normal(size=(400, 6)) + 1.2 * np.eye(6)[labels]
    about = {"n_bins": 15, "ood": {}}
    a, b = (
        Outputs(**of_images(values, labels, True), id_scores={}, ood_scores={}, about=about)
        for values in (logits, logits + rng.normal(0, 0.7, logits.shape))
    )
    resamples = Resamples(6000)
    wanted = Wanted((), (), ("nll", "top1"))
    ra, rb = replicate(a, wanted, resamples), replicate(b, wanted, resamples)
    for path, first, second in (("id.nll", a.nll, b.nll), ("id.top1", a.rank == 0, b.rank == 0)):
        ours = interval(differences([(ra[path], rb[path])], resamples))
        theirs = stats.bootstrap(
            (second.astype(float) - first,), np.mean, n_resamples=6000, method="percentile", **{GENERATOR: rng}
        ).confidence_interval
        width = theirs.high - theirs.low
        assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
        assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_the_same_images_for_both_and_the_same_counts_for_the_same_seed():
    one = outputs(np.random.default_rng(7))
    found = [replicate(one, WANTED, Resamples(200, seed)) for seed in (0, 0, 1)]
    path = "ood.far-away.msp.aupr_out"
    assert np.array_equal(found[0][path], found[1][path])
    assert not np.array_equal(found[0][path], found[2][path])
    only_far = replicate(one, Wanted(SETS[:1], ("msp",)), Resamples(200))
    assert np.array_equal(found[0][path], only_far[path]), "other sets and scores change nothing"
    same = interval(differences([(found[0][path], found[1][path])], Resamples(200)))
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)


@pytest.mark.slow
def test_under_no_difference_about_five_percent_stand():
    """Two models whose images are exchangeable: the share of intervals that exclude 0."""
    rng = np.random.default_rng(8)
    stood = {"id.nll": 0, "ood.far-away.msp.auroc": 0}
    trials = 250
    wanted = Wanted(SETS[:1], ("msp",), ("nll", "auroc"))
    for trial in range(trials):
        a, b = (outputs(rng, n=60, m=(60, 1)) for _ in range(2))
        resamples = Resamples(300, trial)
        ra, rb = replicate(a, wanted, resamples), replicate(b, wanted, resamples)
        for path in stood:
            stood[path] += interval(differences([(ra[path], rb[path])], resamples)).excludes_zero
    for path, count in stood.items():
        # 12.5 expected, standard deviation 3.4; percentile intervals are a little narrow at n = 60.
        assert 3 <= count <= 27, (path, count)
