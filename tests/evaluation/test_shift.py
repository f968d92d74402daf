"""What `evaluate` says of shifted images, against plain code on the model's own logits, and its refusals."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from study_fakes import PREPROCESS, FakeModel, quantized

from quantlens.data import CORRUPTIONS, load_images
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.evaluation import outputs as kept
from quantlens.evaluation.compare import Wanted, point, replicate
from quantlens.evaluation.result import Result, numbers, title_of
from quantlens.evaluation.run import evaluate
from quantlens.evaluation.shift import corruption_of, corruptions
from quantlens.metrics.bootstrap import Resamples
from quantlens.studies.compare import compare

ID, V2, LETTERS = "embedded:digits-test[0:60]", "embedded:digits-test[60:100]", "embedded:letters[0:30]"
ASKED = {"v2": V2, "corrupt": ["fog:1,5", "gaussian_noise:3", "jpeg_compression:1"]}
CORRUPTED = ("fog:1", "fog:5", "gaussian_noise:3", "jpeg_compression:1")
OOD = {"letters": LETTERS, "near": "embedded:digits-held-out[0:20]"}


@pytest.fixture(scope="module")
def result() -> Result:
    """A quantized model beside its FP32 model, with per-image outputs."""
    return evaluate(quantized(FakeModel(), "W3A3"), ID, OOD, shift=ASKED, scores=["msp", "energy"], keep=True)


def probabilities(model: FakeModel, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Softmax [N, K] and labels [N] of a model on a source, in plain code."""
    images = load_images(source, PREPROCESS, cache_dir=False)
    logits = model.outputs(images.tensor()).logits.numpy().astype(np.float64)
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True), images.labels


def plain_metrics(p: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    right, confidence = p.argmax(axis=1) == labels, p.max(axis=1)
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        ece += abs(right[inside].sum() - confidence[inside].sum()) / len(p)
    of_truth = p[np.arange(len(p)), labels]
    hot = np.eye(p.shape[1])[labels]
    brier = ((p - hot) ** 2).sum(axis=1).mean()
    return {"top1": right.mean(), "nll": -np.log(of_truth).mean(), "ece": ece, "brier": brier, "n": len(p)}


def test_every_set_and_the_mean_corruption_error_are_those_of_plain_code(result: Result) -> None:
    model = quantized(FakeModel(), "W3A3")
    found = result.to_dict()
    assert list(found["shift"]) == ["v2", *CORRUPTED]
    errors: dict[str, dict[str, float]] = {"quantized": {}, "fp32": {}}
    for name in found["shift"]:
        source = V2 if name == "v2" else f"{ID}?corrupt={name}"
        for which, one in (("quantized", model), ("fp32", model.reference)):
            expected = plain_metrics(*probabilities(one, source))
            part = found if which == "quantized" else found["fp32"]
            measured = part["shift"][name]
            assert {key: measured[key] for key in expected if key in measured} == pytest.approx(
                {key: value for key, value in expected.items() if key in measured}, abs=1e-5
            )
            errors[which][name] = 1 - expected["top1"]
        assert found["shift"][name]["source"] == source
        assert found["shift"][name]["fingerprint"] == load_images(source, PREPROCESS, cache_dir=False).fingerprint
    mce = {
        which: np.mean([(of["fog:1"] + of["fog:5"]) / 2, of["gaussian_noise:3"], of["jpeg_compression:1"]])
        for which, of in errors.items()
    }
    mean = found["shift_mean"]["corruptions"]
    assert mean["mce"] == pytest.approx(mce["quantized"])
    assert mean["mce"] == pytest.approx(1 - mean["top1"])
    assert mean["relative_mce"] == pytest.approx(mce["quantized"] / mce["fp32"])
    assert mean["n_sets"] == 4
    assert found["change"]["shift_mean"]["corruptions"]["mce"] == pytest.approx(mce["quantized"] - mce["fp32"])
    lowest = errors["quantized"]
    assert found["shift_mean"]["severity_1"]["mce"] == pytest.approx(
        (lowest["fog:1"] + lowest["jpeg_compression:1"]) / 2
    )
    assert list(found["shift_mean"]) == ["corruptions", "severity_1", "severity_3", "severity_5"]


def test_the_full_spectrum_counts_shifted_images_as_in_distribution(result: Result) -> None:
    model = quantized(FakeModel(), "W3A3")
    sources = [ID, V2, *(f"{ID}?corrupt={name}" for name in CORRUPTED)]
    known = np.concatenate([probabilities(model, source)[0].max(axis=1) for source in sources])
    assert len(known) == 60 * 5 + 40
    for name, source in OOD.items():
        unknown = probabilities(model, source)[0].max(axis=1)
        inside = np.repeat([1, 0], [len(known), len(unknown)])
        scores = np.concatenate([known, unknown])
        entry = result.full_spectrum[name]["msp"]
        assert entry["auroc"] == pytest.approx(roc_auc_score(inside, scores), abs=1e-5)
        assert entry["aupr_out"] == pytest.approx(average_precision_score(1 - inside, -scores), abs=1e-4)
        assert entry["aupr_in"] == pytest.approx(average_precision_score(inside, scores), abs=1e-4)
        assert (entry["n_id"], entry["n_ood"], result.full_spectrum[name]["n"]) == (340, len(unknown), len(unknown))
        assert result.ood[name]["msp"]["n_id"] == 60, "standard OOD detection is of the ID images alone"
    for group, name in (("far", "letters"), ("near", "near")):
        assert result.full_spectrum_mean[group]["energy"]["auroc"] == result.full_spectrum[name]["energy"]["auroc"]
    assert result.fp32["full_spectrum"]["letters"]["msp"]["auroc"] > 0


def test_a_result_is_read_again_and_one_without_shift_has_no_new_keys(result: Result) -> None:
    data = json.loads(json.dumps(result.to_dict()))
    again = Result.from_dict(data)
    assert again.to_dict() == data
    paths = dict(numbers(data))
    assert paths["shift.fog:5.top1"] == result.shift["fog:5"]["top1"]
    assert "change.shift_mean.corruptions.nll" in paths
    assert "mCE" in title_of("shift_mean.corruptions.mce")
    assert title_of("full_spectrum_mean.far.msp.auroc") == "AUROC % ↑, full spectrum, mean far, msp"
    bare = evaluate(FakeModel(), ID, OOD, scores=["msp"]).to_dict()
    assert not {"shift", "shift_mean", "full_spectrum", "full_spectrum_mean"} & bare.keys()
    assert not hasattr(Result.from_dict(bare), "nonsense")
    assert Result.from_dict(bare).shift == {}


def test_outputs_are_read_again_and_older_files_stay_as_they_are(result: Result) -> None:
    outputs = result.outputs
    again = kept.read(kept.pack(outputs), logits=True)
    assert list(again.shift) == ["v2", *CORRUPTED]
    for name, vectors in outputs.shift.items():
        for key, values in vectors.items():
            assert again.shift[name][key].dtype == kept.VECTORS[key]
            np.testing.assert_array_equal(again.shift[name][key], values)
        for score in ("msp", "energy"):
            np.testing.assert_allclose(again.shift_scores[name][score], outputs.shift_scores[name][score], rtol=1e-6)
    assert again.about == outputs.about
    assert list(again.ood_scores) == ["letters", "near"]
    without = kept.pack(evaluate(FakeModel(), ID, OOD, scores=["msp"], keep=True).outputs)
    with np.load(io.BytesIO(without)) as file:
        about = json.loads(bytes(file["about"]))
    assert about["format"] == 1
    assert "shifted" not in about
    assert kept.read(without).shift == {}
    one = dict(outputs.shift)
    one["fog:1"] = {**one["fog:1"], "nll": one["fog:1"]["nll"][:-1]}
    with pytest.raises(kept.StorageError, match="damaged"):
        kept.read(kept.pack(replace(outputs, shift=one)))


def test_metrics_alone_are_kept_without_ood_sets() -> None:
    found = evaluate(FakeModel(), ID, shift={"fog:2": f"{ID}?corrupt=fog:2"}, keep="scores")
    assert found.full_spectrum == {}
    assert list(found.shift_mean) == ["corruptions", "severity_2"]
    again = kept.read(kept.pack(found.outputs))
    assert again.shift_scores == {}
    assert (
        point(again, Wanted((), (), shift=("fog:2",)))["shift_mean.corruptions.mce"]
        == found.shift_mean["corruptions"]["mce"]
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("fog:3", [("fog", 3)]),
        ("fog", [("fog", level) for level in range(1, 6)]),
        (["fog:3,1", "snow:2"], [("fog", 3), ("fog", 1), ("snow", 2)]),
        (["fog:3", "all:3"], [("fog", 3), *((name, 3) for name in CORRUPTIONS if name != "fog")]),
        ("all:1,3,5", [(name, level) for name in CORRUPTIONS for level in (1, 3, 5)]),
        ((), []),
    ],
)
def test_which_corruptions_are_asked_for(asked: Any, expected: list[tuple[str, int]]) -> None:
    assert corruptions(asked) == expected


def test_a_set_that_is_called_after_a_corruption_is_one() -> None:
    assert corruption_of("fog:3") == ("fog", 3)
    assert [corruption_of(name) for name in ("fog", "fog:6", "v2", "smoke:3", "fog:x", "a:fog:3")] == [None] * 6


def test_mistakes_are_told_before_the_model_runs() -> None:
    model = FakeModel()
    pictures = torch.zeros(4, 3, 32, 32), [0, 1, 2, 3]
    wrong: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (ID, {"corrupt": "smoke:3"}, UnknownNameError, "smoke"),
        (ID, {"corrupt": "fog:6"}, QuantlensError, "severity of 'fog:6' is '6'"),
        (ID, {"corrupt": "fog:3", "fog:3": V2}, QuantlensError, "fog:3 is given and made"),
        (f"{ID}?corrupt=fog:1", {"corrupt": "fog:3"}, QuantlensError, "corrupted already"),
        (pictures, {"corrupt": "fog:3"}, QuantlensError, "tensors"),
        (ID, {"v2": LETTERS}, QuantlensError, "letters"),
        (ID, {"v2": "images:nowhere"}, QuantlensError, "nowhere"),
    ]
    for id, shift, error, words in wrong:
        with pytest.raises(error, match=words):
            evaluate(model, id, shift=shift)
    assert model.batches_seen == 0
    with pytest.raises(QuantlensError, match=r"the fit set .* share 40 images"):
        evaluate(model, ID, OOD, shift={"v2": V2}, fit="embedded:digits-test[60:200]")


@pytest.mark.parametrize(("task", "words"), [("features", "'features'"), ("detect", "detector")])
def test_other_tasks_are_refused_in_one_sentence(task: str, words: str) -> None:
    from quantlens.evaluation.shift import check_shift

    with pytest.raises(UnsupportedError, match=words):
        check_shift(ASKED, task, FakeModel())
    check_shift({}, task, FakeModel())
    with pytest.raises(UnsupportedError, match="features"):
        evaluate(FakeModel(), ID, shift=ASKED, task="features")
    with pytest.raises(UnsupportedError, match="file of logits"):
        check_shift(ASKED, "classify", SimpleNamespace(name="logits.npz", recorded=None))


def test_a_reference_of_other_shifted_images_is_refused() -> None:
    model = quantized(FakeModel(), "W4A4")
    fp32 = evaluate(model.reference, ID, shift={"v2": V2, "corrupt": "fog:1"})
    found = evaluate(model, ID, shift={"v2": V2, "corrupt": "fog:1"}, reference=fp32)
    assert found.to_dict()["change"] == evaluate(model, ID, shift={"v2": V2, "corrupt": "fog:1"}).to_dict()["change"]
    with pytest.raises(QuantlensError, match="shifted set fog:1"):
        evaluate(model, ID, shift={"fog:1": f"{ID}?corrupt=fog:2"}, reference=fp32)
    with pytest.raises(QuantlensError, match="shifted set fog:2"):
        evaluate(model, ID, shift={"corrupt": "fog:2"}, reference=fp32)


def test_pictures_are_made_when_they_are_used_and_not_kept() -> None:
    """Of many corrupted sets one is in memory at a time; a study gives what makes them."""
    alive: list[str] = []

    def make(name: str) -> Any:
        alive.append(name)
        return load_images(f"{ID}?corrupt={name}", PREPROCESS, cache_dir=False)

    seen: list[tuple[str, int]] = []
    shift = {name: partial(make, name) for name in CORRUPTED}
    evaluate(FakeModel(), ID, shift=shift, progress=lambda what, done, total: seen.append((what, len(alive))))
    assert [count for what, count in seen if what == "evaluating the ID set"] == [0]
    assert [count for what, count in seen if what.startswith("evaluating shifted set")] == [1, 2, 3, 4]


# ---- resamples -------------------------------------------------------------------------------------------------------


def test_a_corrupted_image_is_drawn_together_with_the_image_it_was_made_of(result: Result) -> None:
    """Every resample against the metrics of the images that were drawn, written out."""
    outputs, resamples = result.outputs, Resamples(30, seed=3)
    wanted = Wanted(("letters",), ("msp",), shift=tuple(outputs.shift))
    found = replicate(outputs, wanted, resamples)
    (_, counts), *_ = resamples.chunks({"": 60, "shift.v2": 40, "letters": 30})
    for k in (0, 7, 29):
        ids, v2, letters = (np.repeat(np.arange(len(c)), c[:, k].astype(int)) for c in counts.values())
        chosen = {name: ids if name != "v2" else v2 for name in outputs.shift}
        top1 = {name: float((outputs.shift[name]["rank"][rows] == 0).mean()) for name, rows in chosen.items()}
        mean = np.mean([(top1["fog:1"] + top1["fog:5"]) / 2, top1["gaussian_noise:3"], top1["jpeg_compression:1"]])
        assert found["shift_mean.corruptions.mce"][k] == pytest.approx(1 - mean)
        assert found["shift_mean.severity_1.mce"][k] == pytest.approx(
            1 - (top1["fog:1"] + top1["jpeg_compression:1"]) / 2
        )
        assert found["shift.v2.top1"][k] == pytest.approx(top1["v2"])
        assert found["id.top1"][k] == pytest.approx((outputs.rank[ids] == 0).mean())
        nll = [outputs.shift[name]["nll"][ids].mean() for name in CORRUPTED]
        assert found["shift_mean.corruptions.nll"][k] == pytest.approx(np.mean([np.mean(nll[:2]), *nll[2:]]))
        parts = [outputs.shift_scores[name]["msp"][rows] for name, rows in chosen.items()]
        known = np.concatenate([outputs.id_scores["msp"][ids], *parts])
        unknown = outputs.ood_scores["letters"]["msp"][letters]
        inside = np.repeat([1, 0], [len(known), len(unknown)])
        auroc = roc_auc_score(inside, np.concatenate([known, unknown]))
        assert found["full_spectrum_mean.far.msp.auroc"][k] == pytest.approx(auroc, abs=1e-5)
    assert "shift_mean.corruptions.mce" not in replicate(outputs, Wanted((), ()), resamples)


def test_compare_has_shift_where_both_saw_the_same_images(result: Result) -> None:
    fp32 = evaluate(FakeModel(), ID, OOD, shift=ASKED, scores=["msp", "energy"], keep="scores")
    (group,) = compare(fp32, result, resamples=200).groups
    found = {one.path: one for one in group.metrics}
    one = found["shift_mean.corruptions.mce"]
    assert one.difference == pytest.approx(result.change["shift_mean"]["corruptions"]["mce"])
    assert one.low <= one.difference <= one.high
    shared = {path for path in found if path.startswith(("shift", "full"))}
    assert shared == {
        *(f"shift.v2.{name}" for name in ("top1", "nll", "ece")),
        *(f"shift_mean.corruptions.{name}" for name in ("mce", "nll", "ece")),
        *(f"full_spectrum_mean.{group}.msp.{name}" for group in ("far", "near") for name in ("aupr_out", "auroc")),
    }
    for path in shared:
        *parts, name = path.split(".")
        value: Any = result.to_dict()
        for part in parts:
            value = value[part]
        assert found[path].b == pytest.approx(value[name]), path
    other = evaluate(FakeModel(), ID, OOD, shift={"v2": V2}, scores=["msp", "energy"], keep="scores")
    compared = compare(other, result, resamples=200)
    assert not any(one.path.startswith(("shift", "full")) for one in compared.groups[0].metrics)
    assert any("under shift" in note for note in compared.notes)
