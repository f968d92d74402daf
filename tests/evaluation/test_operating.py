"""The operating point of two models, recomputed with plain numpy from their per-image outputs."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from quantlens.evaluation import outputs as kept
from quantlens.evaluation.differences import differences_of
from quantlens.evaluation.operating import Shipped, flips_csv
from quantlens.metrics import ood_metrics, threshold_keeping
from quantlens.metrics.bootstrap import Resamples
from quantlens.metrics.operating import Promise

N, M, K = 60, 40, 5
LABELS = np.random.default_rng(5).integers(0, K, N)
NAMES = [f"folder/{i}.png" for i in range(N)]


def outputs(seed: int, noise: float) -> kept.Outputs:
    """A classifier that `noise` disturbs: logits about the labels, scores of 60 ID and two times 40 OOD images."""
    rng = np.random.default_rng(9)
    logits, shift = 2 * np.eye(K)[LABELS] + rng.normal(size=(N, K)), np.random.default_rng(seed)
    logits += noise * shift.normal(size=(N, K))
    far = rng.normal(size=(2, M, K)) + noise * shift.normal(size=(2, M, K))
    score = {"msp": lambda f: np.exp(f - np.log(np.exp(f).sum(-1, keepdims=True))).max(-1), "max": lambda f: f.max(-1)}
    about = {"model": "m", "method": "x", "bits": "W4A4", "seed": seed, "n_bins": 15, "id": {"fingerprint": "f"}}
    return kept.Outputs(
        **kept.of_images(logits, LABELS, False, [f"class {k}" for k in range(K)]),
        names=NAMES,
        id_scores={name: of(logits) for name, of in score.items()},
        ood_scores={s: {name: of(f) for name, of in score.items()} for s, f in zip("ab", far, strict=True)},
        about=about | {"ood": {s: {"group": "far", "fingerprint": s} for s in "ab"}},
    )


def shipped(*pairs, promise=None, resamples=None, base=0) -> Shipped:
    found = Shipped(promise or Promise(), ["a", "b"], ["msp", "max"], {"far": ["a", "b"]}, resamples)
    for seed, (first, second) in enumerate(pairs):
        found.add(first, second, (0, seed), base=base)
    return found


FP32, QUANTIZED = outputs(0, 0.0), outputs(1, 0.9)


@pytest.mark.parametrize("keep", [0.8, 0.95])
def test_the_operating_point_is_what_numpy_counts(keep: float) -> None:
    found = shipped((FP32, QUANTIZED), promise=Promise(coverage=0.7, keep=keep)).measured
    expected = {}
    for how, of in (("same", lambda own: own[0]), ("again", lambda own: own[1])):
        cuts = [np.sort(o.confidence)[::-1][41] for o in (FP32, QUANTIZED)]  # 42 of 60 are 70 %
        answered = [o.confidence >= cut for o, cut in zip((FP32, QUANTIZED), (cuts[0], of(cuts)), strict=True)]
        right = [o.predicted == LABELS for o in (FP32, QUANTIZED)]
        expected[f"{how}.id.coverage"] = [a.mean() for a in answered]
        expected[f"{how}.id.selective_accuracy"] = [r[a].mean() for r, a in zip(right, answered, strict=True)]
        for score in ("msp", "max"):
            own = [np.sort(o.id_scores[score])[::-1][round(N * keep) - 1] for o in (FP32, QUANTIZED)]
            used = own[0], of(own)
            sides = list(zip((FP32, QUANTIZED), used, strict=True))
            expected[f"{how}.id.{score}.false_alarms"] = [(o.id_scores[score] < t).mean() for o, t in sides]
            for name in "ab":
                misses = [(o.ood_scores[name][score] >= t).mean() for o, t in sides]
                expected[f"{how}.ood.{name}.{score}.misses"] = misses
            each = [expected[f"{how}.ood.{name}.{score}.misses"] for name in "ab"]
            expected[f"{how}.ood_mean.far.{score}.misses"] = np.mean(each, axis=0)
    assert found.keys() == {f"operating.{path}" for path in expected}
    for path, values in expected.items():
        assert found[f"operating.{path}"][0] == pytest.approx(tuple(values), abs=1e-12), path


def test_promises_are_kept_and_misses_are_fpr95() -> None:
    found = shipped((FP32, QUANTIZED))
    values = found.measured
    assert values["operating.same.id.coverage"][0][0] >= 0.9
    assert values["operating.again.id.coverage"][0][1] >= 0.9
    for score in ("msp", "max"):
        assert values[f"operating.same.id.{score}.false_alarms"][0][0] <= 0.05 + 1e-12
        for name, side, one in (("a", 0, FP32), ("b", 1, QUANTIZED)):
            fpr = ood_metrics(one.id_scores[score], one.ood_scores[name][score])["fpr95_id"]
            assert values[f"operating.again.ood.{name}.{score}.misses"][0][side] == pytest.approx(fpr)
        assert found.thresholds[0]["a"][score] == threshold_keeping(FP32.id_scores[score], 0.95)


def test_an_accuracy_is_promised_and_one_out_of_reach_answers_nothing() -> None:
    found = shipped((FP32, QUANTIZED), promise=Promise(accuracy=0.9)).measured
    assert found["operating.same.id.selective_accuracy"][0][0] >= 0.9
    wrong = kept.Outputs(**{**vars(FP32), "rank": np.ones(N, np.int32)})
    found = shipped((wrong, QUANTIZED), promise=Promise(accuracy=0.9))
    assert found.measured["operating.same.id.coverage"][0] == (0, 0)
    assert "operating.same.id.selective_accuracy" not in found.measured
    assert found.thresholds[0]["a"]["confidence"] is None


def test_a_model_against_itself_has_no_flips_and_no_deltas() -> None:
    resamples = Resamples(200)
    found = shipped((FP32, FP32), resamples=resamples)
    for one in differences_of(found.measured, found.drawn, resamples):
        assert (one.difference, one.low, one.high) == (0, 0, 0), one.path
    assert found.flips[0].images == []
    assert found.flips[0].counts == {"n": N, "right_to_wrong": 0, "wrong_to_right": 0, "wrong_to_wrong": 0}
    assert all(one.difference == 0 for one in found.classes())


def test_an_interval_is_that_of_images_drawn_one_by_one() -> None:
    """Thresholds are set on the FP32 scores of the images drawn, the same images for both models."""
    resamples = Resamples(100, seed=3)
    found = shipped((FP32, QUANTIZED), resamples=resamples)
    ((_, counts),) = resamples.chunks({"": N, "a": M, "b": M})
    for r in (0, 50, 99):
        ids, a = (np.repeat(np.arange(len(c)), c[:, r].astype(int)) for c in (counts[""], counts["a"]))
        cut = threshold_keeping(FP32.confidence[ids], 0.9)
        coverage = found.drawn["operating.same.id.coverage"][0]
        assert [side[r] for side in coverage] == [(o.confidence[ids] >= cut).mean() for o in (FP32, QUANTIZED)]
        own = [threshold_keeping(o.id_scores["max"][ids], 0.95) for o in (FP32, QUANTIZED)]
        misses = found.drawn["operating.again.ood.a.max.misses"][0]
        expected = [(o.ood_scores["a"]["max"][a] >= t).mean() for o, t in zip((FP32, QUANTIZED), own, strict=True)]
        assert [side[r] for side in misses] == pytest.approx(expected)


def test_flips_say_image_answers_confidences_and_by_how_much() -> None:
    flips = shipped((FP32, QUANTIZED)).flips[0]
    differ = np.flatnonzero(FP32.predicted != QUANTIZED.predicted)
    assert sorted(f.index for f in flips.images) == differ.tolist()
    kinds = [f.kind for f in flips.images]
    assert kinds == sorted(kinds, key=["right_to_wrong", "wrong_to_right", "wrong_to_wrong"].index)
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        kind: n for kind, n in flips.counts.items() if n and kind != "n"
    }
    for f in flips.images:
        assert f.image == NAMES[f.index]
        assert (f.label, f.label_name) == (LABELS[f.index], f"class {LABELS[f.index]}")
        assert (f.a, f.b) == (FP32.predicted[f.index], QUANTIZED.predicted[f.index])
        assert (f.a_name, f.b_name) == (f"class {f.a}", f"class {f.b}")
        assert (f.a_confidence, f.b_confidence) == (FP32.confidence[f.index], QUANTIZED.confidence[f.index])
        assert f.change == pytest.approx(np.exp(-QUANTIZED.nll[f.index]) - np.exp(-FP32.nll[f.index]))
        wrong = f.a != f.label, f.b != f.label
        assert wrong == {"right_to_wrong": (0, 1), "wrong_to_right": (1, 0), "wrong_to_wrong": (1, 1)}[f.kind]
    text = flips_csv([({"model": "m", "method": "x", "bits": "FP32 → W4A4"}, flips)])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["image"] for row in rows] == [f.image for f in flips.images]
    assert float(rows[0]["b_confidence"]) == flips.images[0].b_confidence


def test_losses_of_classes_are_means_over_seeds() -> None:
    other = outputs(2, 0.9)
    found = shipped((FP32, QUANTIZED), (FP32, other)).classes()
    assert sum(one.n for one in found) == N
    assert all(one.few == (one.n < 20) for one in found)
    assert [one.difference for one in found] == sorted(one.difference for one in found)
    for one in found:
        of = one.number == LABELS
        right = [(o.predicted == LABELS)[of].mean() for o in (FP32, QUANTIZED, other)]
        assert (one.a, one.b) == (pytest.approx(right[0]), pytest.approx((right[1] + right[2]) / 2))
        assert one.low <= one.difference <= one.high
        assert one.name == f"class {one.number}"


def test_thresholds_are_set_on_the_base_whichever_side_it_is() -> None:
    turned, straight = shipped((QUANTIZED, FP32), base=1).measured, shipped((FP32, QUANTIZED)).measured
    assert turned.keys() == straight.keys()
    assert all(turned[path][0] == values[0][::-1] for path, values in straight.items())


def test_names_of_images_and_classes_are_kept(tmp_path) -> None:
    back = kept.read(kept.pack(FP32))
    assert back.names == NAMES
    assert back.classes == {k: f"class {k}" for k in range(K)}
    bare = kept.read(kept.pack(kept.Outputs(**{**vars(FP32), "names": None, "classes": {}})))
    assert (bare.names, bare.classes) == (None, {}), "as in files of earlier releases"
    one = shipped((bare, QUANTIZED)).flips[0].images[0]
    assert one.image == NAMES[one.index]
