"""`evaluate` against the metrics called directly, and its refusals."""

from __future__ import annotations

import json
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from study_fakes import PREPROCESS, FakeModel, quantized

from quantlens.calibration import Calibration
from quantlens.data import load_images, open_source
from quantlens.errors import QuantlensError, QuantlensWarning, StorageError, UnknownNameError
from quantlens.evaluation.images import groups_of
from quantlens.evaluation.result import Result
from quantlens.evaluation.run import evaluate
from quantlens.metrics import FitData, choose_scores, classification_metrics, make_scorer, ood_metrics, temperature

ID, LETTERS, NEAR, FIT = (
    "embedded:digits-test",
    "embedded:letters",
    "embedded:digits-held-out",
    "embedded:digits-fit",
)
OOD = {"letters": LETTERS, "near": NEAR}


def direct(model: FakeModel, source: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    images = load_images(open_source(source), PREPROCESS, cache_dir=False)
    out = model.outputs(images.tensor())
    return out.logits.numpy(), out.features.numpy(), images.labels


def test_figures_are_those_of_the_metrics() -> None:
    model = quantized(FakeModel(), "W4A4")
    result = evaluate(model, ID, OOD, fit=FIT, batch_size=33).to_dict()
    logits, features, labels = direct(model, ID)
    for figure, value in classification_metrics(logits, labels).items():
        if isinstance(value, float):
            assert result["id"][figure] == pytest.approx(value, abs=1e-6)
    assert result["id"]["n"] == len(labels) == 400
    assert result["id"]["num_classes"] == 8

    fit_logits, fit_features, fit_labels = direct(model, FIT)
    weight, bias = (t.numpy() for t in model.classifier())
    data = FitData(fit_logits, fit_features, fit_labels, weight, bias)
    for score in ("msp", "energy", "knn", "rmahalanobis_l2", "react"):
        scorer = make_scorer(score, data)
        for name, source in OOD.items():
            other_logits, other_features, _ = direct(model, source)
            expected = ood_metrics(scorer(logits, features), scorer(other_logits, other_features))
            for figure, value in expected.items():
                assert result["ood"][name][score][figure] == pytest.approx(value, abs=1e-5)
    assert result["ood"]["letters"]["group"] == "far"
    assert result["ood"]["near"]["group"] == "near"  # the embedded set says so itself
    assert result["scores_unavailable"] == {}
    assert result["fit"] == {"source": FIT, "n": len(fit_labels)}


def test_scores_by_name_alone_and_the_temperature() -> None:
    model, names = FakeModel(), ["she", "msp_temperature", "dice", "ash_s", "kl_matching"]
    id, fit, ood = f"{ID}[0:60]", f"{FIT}[0:80]", {"letters": f"{LETTERS}[0:40]"}
    logits, features, labels = direct(model, id)
    fit_logits, fit_features, fit_labels = direct(model, fit)
    weight, bias = (t.numpy() for t in model.classifier())
    with pytest.warns(QuantlensWarning, match="dice, ash_s: .*near chance"):
        result = evaluate(model, id, ood, fit=fit, scores=names, keep=True)
    data = FitData(fit_logits, fit_features, fit_labels, weight, bias)
    for name in names:
        np.testing.assert_allclose(result.outputs.id_scores[name], make_scorer(name, data)(logits, features), rtol=1e-5)
    t = temperature(fit_logits, fit_labels)
    assert result.id["temperature"] == pytest.approx(t, rel=1e-6)
    scaled = classification_metrics(logits / t, labels)["ece"]
    assert result.id["ece_temperature"] == pytest.approx(scaled, abs=1e-6)
    assert "ECE after temperature scaling" in str(result)

    with pytest.warns(QuantlensWarning):
        without = evaluate(model, id, ood, scores=names)
    assert without.ood["letters"]["ash_s"] == pytest.approx(result.ood["letters"]["ash_s"])  # nothing to fit
    assert without.scores_unavailable.keys() == {"she", "msp_temperature", "dice", "kl_matching"}
    assert not {"temperature", "ece_temperature"} & without.id.keys()
    images = load_images(fit, model.preprocess, cache_dir=False).tensor()
    unlabelled = evaluate(model, id, ood, fit=images, scores=["she", "msp_temperature"])
    assert list(unlabelled.scores_unavailable) == ["msp_temperature"]
    assert "fitted on labels" in unlabelled.scores_unavailable["msp_temperature"]
    low = evaluate(quantized(model, "W4A4"), id, fit=fit)
    assert low.change["id"]["temperature"] == low.id["temperature"] - low.fp32["id"]["temperature"] != 0


def test_means_and_histograms() -> None:
    result = evaluate(FakeModel(), ID, {**OOD, "patches": "embedded:photo-patches"}, scores=["msp"])
    far = [result.ood[name]["msp"]["aupr_out"] for name in ("letters", "patches")]
    assert result.ood_mean["far"]["msp"]["aupr_out"] == pytest.approx(np.mean(far))
    assert result.ood_mean["near"]["msp"]["auroc"] == pytest.approx(result.ood["near"]["msp"]["auroc"])
    assert set(result.ood_mean) == {"far", "near", "all"}
    bars = result.histograms["msp"]
    assert len(bars["edges"]) == 41
    assert sum(bars["id"]) == 400
    assert sum(bars["ood"]["letters"]) == result.ood["letters"]["n"]


def test_groups_as_openood_has_them_by_name() -> None:
    names = {"near": ("ninco", "NINCO", "SSB-hard", "ssb_hard"), "far": ("iNaturalist", "openimage-o", "dtd", "odd")}
    sets = {name: None for group in names.values() for name in group}
    assert groups_of(sets, {"ssb_hard": "far"}) == {
        name: "far" if name == "ssb_hard" else group for group, all_of in names.items() for name in all_of
    }
    tensor = load_images(f"{LETTERS}[0:20]", PREPROCESS, cache_dir=False).tensor()
    result = evaluate(FakeModel(), f"{ID}[0:40]", {"NINCO": tensor, "ssb": LETTERS, "sun": NEAR}, scores=["msp"])
    assert [part["group"] for part in result.ood.values()] == ["near", "far", "near"]  # embedded sets say it themselves


def test_groups_as_given() -> None:
    result = evaluate(FakeModel(), ID, OOD, scores=["msp"], groups={"letters": "near", "near": "far"})
    assert result.ood["letters"]["group"] == "near"
    assert result.ood["near"]["group"] == "far"
    with pytest.raises(UnknownNameError, match="leters"):
        evaluate(FakeModel(), ID, OOD, groups={"leters": "near"})
    with pytest.raises(QuantlensError, match="'far' or 'near'"):
        evaluate(FakeModel(), ID, OOD, groups={"letters": "middle"})


def test_change_from_own_reference_model_and_result_agree() -> None:
    model = FakeModel()
    fp32 = evaluate(model, ID, OOD, scores=["msp", "energy"])
    assert fp32.fp32 is None
    assert fp32.change is None
    low = quantized(model, "W2A2")
    own = evaluate(low, ID, OOD, scores=["msp", "energy"])
    given = evaluate(low, ID, OOD, scores=["msp", "energy"], reference=fp32)
    low.reference = None
    alone = evaluate(low, ID, OOD, scores=["msp", "energy"])
    assert own.change == given.change
    assert alone.change is None
    assert own.change is not None
    assert own.change["id"]["top1"] == pytest.approx(own.id["top1"] - fp32.id["top1"])
    assert own.change["id"]["top1"] != 0
    key = own.change["ood_mean"]["far"]["energy"]["aupr_out"]
    assert key == pytest.approx(own.ood_mean["far"]["energy"]["aupr_out"] - fp32.ood_mean["far"]["energy"]["aupr_out"])
    with pytest.warns(DeprecationWarning, match=r"Result\.change now, with the opposite sign"):
        assert own.delta["id"]["top1"] == pytest.approx(-own.change["id"]["top1"])
    low.reference = model
    assert evaluate(low, ID, OOD, reference=False).change is None


def test_reference_of_other_images_is_refused() -> None:
    model = FakeModel()
    fp32 = evaluate(model, f"{ID}[0:50]", {"letters": LETTERS}, scores=["msp"])
    low = quantized(model, "W4A4")
    with pytest.raises(QuantlensError, match="other ID images"):
        evaluate(low, ID, {"letters": LETTERS}, reference=fp32)
    with pytest.raises(QuantlensError, match="OOD set near"):
        evaluate(low, f"{ID}[0:50]", {"near": NEAR}, reference=fp32)
    with pytest.raises(QuantlensError, match="FP32 model"):
        evaluate(low, ID, reference=evaluate(low, ID, reference=False))


def test_batches_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are often a view of every token; 50 000 images must not keep those."""
    model, whole = FakeModel(), []
    plain = FakeModel.outputs

    def outputs(self: FakeModel, x: torch.Tensor) -> Any:
        found = plain(self, x)
        tokens = found.features[:, None].repeat(1, 50, 1)
        whole.append(weakref.ref(tokens.untyped_storage()))
        return SimpleNamespace(logits=found.logits, features=tokens[:, 0])

    monkeypatch.setattr(FakeModel, "outputs", outputs)
    alive: list[int] = []
    found = evaluate(
        model, ID, OOD, fit=FIT, scores=["knn"], progress=lambda *_: alive.append(sum(r() is not None for r in whole))
    )
    assert max(alive) <= 1
    monkeypatch.undo()
    assert found.to_dict()["ood"] == evaluate(model, ID, OOD, fit=FIT, scores=["knn"]).to_dict()["ood"]


def test_every_image_goes_through_the_model_once() -> None:
    model = FakeModel()
    evaluate(model, ID, OOD, fit=FIT, batch_size=10_000)
    assert model.batches_seen == 4


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("MSP", "msp"),
        ("relative-mahalanobis", "rmahalanobis"),
        ("Max Logit", "maxlogit"),
        ("mahalanobis-l2", "mahalanobis_l2"),
    ],
)
def test_scores_are_found_by_their_usual_spellings(asked: str, name: str) -> None:
    assert list(choose_scores([asked])) == [name]


def test_a_score_that_does_not_exist_is_told_with_those_that_look_alike() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mahalanobis'"):
        choose_scores(["mahalonobis"])


def test_scores_without_fit_are_named() -> None:
    result = evaluate(FakeModel(), ID, OOD)
    assert "give a `fit` set" in result.scores_unavailable["knn"]
    assert "knn" not in result.ood["letters"]
    assert "msp" in result.ood["letters"]


@pytest.mark.parametrize("fit", [ID, f"{ID}[0:10]", f"{ID}?n=5&seed=3"])
def test_fit_among_the_evaluated_is_refused(fit: str) -> None:
    with pytest.raises(QuantlensError, match="share"):
        evaluate(FakeModel(), ID, OOD, fit=fit)


def test_shared_images_are_counted_and_said_once() -> None:
    id, letters = (load_images(spec, PREPROCESS, cache_dir=False) for spec in (ID, LETTERS))
    mixed = torch.cat([letters.tensor(0, 20), id.tensor(0, 5)])
    model = FakeModel()
    with pytest.warns(QuantlensWarning, match=r"OOD set mixed and the ID set share 5 images \(5 of the 25"):
        evaluate(model, id, {"letters": letters, "mixed": mixed}, scores=["msp"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantlensWarning)
        evaluate(model, id, {"mixed": mixed}, scores=["msp"])
        evaluate(model, id, {"letters": letters}, scores=["msp"])
    model.calibration = Calibration.of(id.tensor(3, 13), PREPROCESS).info(content=True)
    with pytest.warns(QuantlensWarning, match="the ID set and the calibration images share 10 images"):
        result = evaluate(model, ID)
    assert result.calibration == Calibration.of(id.tensor(3, 13), PREPROCESS).info()


def test_embedded_sets_that_are_parts_of_others_overlap() -> None:
    with pytest.raises(QuantlensError, match="share"):
        evaluate(FakeModel(), "embedded:digits-train", fit="embedded:digits-calibration")


def test_tensors_and_batches() -> None:
    images = load_images(open_source(ID), PREPROCESS, cache_dir=False)
    x, y = images.tensor(), torch.tensor(images.labels)
    expected = evaluate(FakeModel(), ID).id["nll"]
    assert evaluate(FakeModel(), (x, y)).id["nll"] == pytest.approx(expected)
    batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 400, 50)]
    result = evaluate(FakeModel(), batches, {"noise": torch.randn(7, 3, 32, 32)}, scores=["msp"])
    assert result.id["nll"] == pytest.approx(expected)
    assert result.ood["noise"]["n"] == 7


def test_labels_must_be_the_models() -> None:
    with pytest.raises(QuantlensError, match="no labels"):
        evaluate(FakeModel(), LETTERS)
    with pytest.raises(QuantlensError, match="8 classes, the model 10"):
        evaluate(FakeModel(num_classes=10), ID)
    x = torch.zeros(4, 3, 32, 32)
    with pytest.raises(QuantlensError, match="label 8"):
        evaluate(FakeModel(), (x, torch.tensor([0, 1, 2, 8])))


def test_logits_that_are_not_finite_name_the_set() -> None:
    model = FakeModel(bias=torch.full((8,), float("nan")))
    with pytest.raises(QuantlensError, match=r"not finite on 400 of the 400 images of the ID set"):
        evaluate(model, ID)


def test_misuse_is_one_sentence() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'energy'"):
        evaluate(FakeModel(), ID, OOD, scores=["enrgy"])
    with pytest.raises(QuantlensError, match="load_model"):
        evaluate(torch.nn.Linear(3, 3), ID)
    with pytest.raises(QuantlensError, match="batch size"):
        evaluate(FakeModel(), ID, batch_size=0)
    with pytest.raises(QuantlensError, match="unknown device"):
        evaluate(FakeModel(), ID, device="gpu")


def test_result_round_trip(tmp_path) -> None:
    model = quantized(FakeModel(), "W3A3", 13)
    result = evaluate(model, ID, OOD, fit=FIT)
    path = tmp_path / "deep" / "result.json"
    result.save_json(path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert data == result.to_dict()
    again = Result.from_dict({**data, "later": 1})
    assert again.to_dict() == {**data, "later": 1}
    earlier = {**data, "delta": {"id": {"top1": 9.0}}, "change": {"id": {"top1": 9.0}}}
    assert Result.from_dict(earlier).to_dict() == data, "differences are computed, never read"
    assert list(tmp_path.rglob("*")) == [path.parent, path]  # no temporary file stays behind
    with pytest.raises(QuantlensError, match="lacks"):
        Result.from_dict({"model": "x"})
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*result\.json"):
        result.save_json(blocked / "result.json")


def test_result_in_words() -> None:
    text = str(evaluate(quantized(FakeModel(), "W3A3", 13), ID, OOD))
    assert text.splitlines()[0].startswith("fake minmax W3A3, seed 13, ")
    assert f"ID {ID}: 400 images" in text
    assert "top-1 % ↑: " in text
    assert "AUPR-out % ↑, letters, msp: " in text


def test_a_result_as_a_data_frame() -> None:
    pytest.importorskip("pandas")
    result = evaluate(quantized(FakeModel(), "W3A3", 13), ID, OOD, scores=["msp"])
    table = result.to_pandas()
    assert table.shape[0] == 1
    row = table.iloc[0]
    assert (row["model"], row["method"], row["bits"], row["seed"]) == ("fake", "minmax", "W3A3", 13)
    assert row["ood.letters.msp.aupr_out"] == result.ood["letters"]["msp"]["aupr_out"]
    assert row["change.id.top1"] == result.id["top1"] - result.fp32["id"]["top1"]
