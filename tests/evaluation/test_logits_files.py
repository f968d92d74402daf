"""Files of logits, computed elsewhere."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from study_fakes import PREPROCESS, FakeModel

import quantlens as ql
from quantlens.data import load_images
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, UnknownNameError
from quantlens.evaluation.run import evaluate

ID, LETTERS, FIT = "embedded:digits-test[0:60]", "embedded:letters[0:40]", "embedded:digits-fit[0:60]"


def given(source: str, prefix: str = "") -> dict[str, np.ndarray]:
    """What the fake model gives on images, as the arrays of a file."""
    images = load_images(source, PREPROCESS, cache_dir=False)
    outputs = FakeModel().outputs(images.tensor())
    arrays = {"logits": outputs.logits.numpy(), "features": outputs.features.numpy(), "ids": np.array(images.names)}
    arrays |= {} if images.labels is None else {"labels": images.labels}
    return {prefix + name: values for name, values in arrays.items()}


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "theirs.npz"
    layer = {"classifier/weight": FakeModel().weight.numpy(), "classifier/bias": FakeModel().bias.numpy()}
    np.savez(path, **given(ID), **given(LETTERS, "ood/letters/"), **given(FIT, "fit/"), **layer)
    return path


def write_csv(path, arrays):
    """One row per image, as the columns are documented."""
    logits = arrays["logits"]
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            ["path", *(["label"] if "labels" in arrays else []), *(f"logit_{k}" for k in range(logits.shape[1]))]
        )
        for i, row in enumerate(logits):
            labels = [arrays["labels"][i]] if "labels" in arrays else []
            out.writerow([arrays["ids"][i], *labels, *map(repr, map(float, row))])
    return path


def same(one, other) -> None:
    assert one["id"]["nll"] == pytest.approx(other["id"]["nll"], abs=1e-6)
    assert one["id"]["top1"] == other["id"]["top1"]
    for score, metrics in other["ood"]["letters"].items():
        if isinstance(metrics, dict):
            assert one["ood"]["letters"][score]["auroc"] == pytest.approx(metrics["auroc"], abs=1e-6), score


def test_every_metric_as_of_the_model_itself_with_and_without_images(whole) -> None:
    expected = evaluate(FakeModel(), ID, {"letters": LETTERS}, fit=FIT).to_dict()
    alone = evaluate(whole).to_dict()
    same(alone, expected)
    assert alone["scores_unavailable"] == {}
    assert (alone["method"], alone["bits"], alone["size_mb"]) == ("foreign:logits", None, None)
    beside = evaluate(whole, ID, {"letters": LETTERS}, fit=FIT, reference=FakeModel()).to_dict()
    same(beside, expected)
    assert beside["change"]["id"]["nll"] == pytest.approx(0, abs=1e-6)
    assert beside["id"]["fingerprint"] == expected["id"]["fingerprint"]


def test_rows_find_their_images_by_name(tmp_path) -> None:
    arrays = given(ID)
    order = np.random.default_rng(0).permutation(60)
    np.savez(tmp_path / "mixed.npz", **{name: values[order] for name, values in arrays.items()})
    expected = evaluate(FakeModel(), ID).to_dict()
    assert evaluate(tmp_path / "mixed.npz", ID).id["nll"] == pytest.approx(expected["id"]["nll"], abs=1e-6)
    part = evaluate(tmp_path / "mixed.npz", "embedded:digits-test[10:20]")
    assert part.id["n"] == 10
    with pytest.raises(QuantlensError, match="has no row of 40 of the 100 images"):
        evaluate(tmp_path / "mixed.npz", "embedded:digits-test[0:100]")


def test_without_names_rows_are_checked_by_number_and_label(tmp_path) -> None:
    arrays = {name: values for name, values in given(ID).items() if name != "ids"}
    np.savez(tmp_path / "m.npz", **arrays)
    assert evaluate(tmp_path / "m.npz", ID).id["n"] == 60
    with pytest.raises(QuantlensError, match=r"has 60 rows and the ID set .* 50 images"):
        evaluate(tmp_path / "m.npz", "embedded:digits-test[0:50]")
    with pytest.raises(QuantlensError, match="disagree on the labels"):
        evaluate(tmp_path / "m.npz", "embedded:digits-test[60:120]")


def test_csv_a_file_per_set(tmp_path) -> None:
    files = [write_csv(tmp_path / f"{name}.csv", given(source)) for name, source in (("id", ID), ("letters", LETTERS))]
    expected = evaluate(FakeModel(), ID, {"letters": LETTERS}, scores=["msp", "energy"]).to_dict()
    same(evaluate(files[0], ood={"letters": str(files[1])}).to_dict(), expected)
    same(evaluate(files[0], ID, {"letters": files[1]}).to_dict(), expected)


def test_two_files_are_compared_image_by_image(tmp_path, whole) -> None:
    arrays = {name: values for name, values in given(ID).items() if name != "features"}
    worse = {**arrays, "logits": arrays["logits"] * 0.5}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **worse)
    found = ql.compare(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), resamples=200)
    nll = next(one for one in found.groups[0].metrics if one.path == "id.nll")
    expected = [evaluate(tmp_path / f"{name}.npz").id["nll"] for name in "ab"]
    assert nll.difference == pytest.approx(expected[1] - expected[0])
    assert nll.low is not None
    with_model = ql.compare(FakeModel(), whole, id=ID, ood={"letters": LETTERS}, resamples=200)
    assert {one.path: one.difference for one in with_model.groups[0].metrics}["id.nll"] == pytest.approx(0, abs=1e-6)


def test_probabilities(tmp_path) -> None:
    arrays = given(ID)
    np.savez(
        tmp_path / "p.npz", logits=torch.softmax(torch.from_numpy(arrays["logits"]), 1).numpy(), labels=arrays["labels"]
    )
    with pytest.warns(QuantlensWarning, match="probabilities"):
        result = evaluate(tmp_path / "p.npz")
    assert result.id["nll"] == pytest.approx(evaluate(FakeModel(), ID).id["nll"], abs=1e-4)


Z, Y = np.zeros((4, 3), np.float32), np.arange(4) % 3


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"labels": Y}, "no logits"),
        ({"logits": Z[:, :, None], "labels": Y}, r"logits are float32 \[4, 3, 1\]"),
        ({"logits": Z[:0], "labels": Y[:0]}, r"\[0, 3\]"),
        ({"logits": Z, "labels": Y[:3]}, "labels have shape"),
        ({"logits": Z, "labels": Y + 0.5}, "number of each image's class"),
        ({"logits": Z, "labels": Y, "features": np.zeros((3, 2))}, "features have shape"),
        ({"logits": Z, "labels": Y, "ids": np.array(["a", "b", "a", "c"])}, "two rows of a"),
        ({"logits": Z, "labels": Y, "ood/x/logits": np.zeros((4, 2))}, "logits of 2 classes"),
        ({"logits": Z, "labels": Y, "scores": Y}, "an array 'scores'"),
        ({"logits": Z, "labels": Y, "classifier/weight": Z, "classifier/bias": Y}, "classifier/weight must be"),
        ({"logits": np.array([{}, {}]), "labels": Y}, "plain arrays only"),
        ({"logits": Z, "labels": Y + 3}, "has label"),
        ({"logits": Z}, "has no labels"),
        ({"logits": Z + np.nan, "labels": Y}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, arrays, sentence) -> None:
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(QuantlensError, match=sentence):
        evaluate(tmp_path / "m.npz")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no column logit_0"),
        ("path,label,logit_0,logit_2\n", "are not all there"),
        ("path,label,score\na,1,2\n", "a column 'score'"),
        ("label,logit_0,logit_1\n", "no row after its head"),
        ("label,logit_0,logit_1\n0,1,2\n1,2\n", "row 2 has 2 columns"),
        ("label,logit_0,logit_1\n0,1,x\n", "row 1: could not convert"),
    ],
)
def test_csv_files_that_do_not_fit(tmp_path, text, sentence) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(BadWeightsError, match=sentence):
        evaluate(tmp_path / "m.csv")


def test_what_a_file_lacks_is_named(tmp_path, whole) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(BadWeightsError, match="is no file of logits"):
        evaluate(tmp_path / "bad.npz")
    with pytest.raises(BadWeightsError, match="there is no file of logits"):
        evaluate(tmp_path / "absent.npz")
    with pytest.raises(UnknownNameError, match="OOD set textures"):
        evaluate(whole, ID, {"textures": LETTERS})
    with pytest.raises(QuantlensError, match="holds no images that the float model could be run on; give id"):
        evaluate(whole, reference=FakeModel())
    with pytest.raises(QuantlensError, match="give ood, the images of letters"):
        evaluate(whole, ID, reference=FakeModel())


def test_features_and_several_labels(tmp_path) -> None:
    """The task follows from what a file holds."""
    arrays = {**given(ID), **given(LETTERS, "ood/letters/"), **given(FIT, "fit/")}
    np.savez(tmp_path / "f.npz", **{name: values for name, values in arrays.items() if not name.endswith("logits")})
    result = evaluate(tmp_path / "f.npz").to_dict()
    expected = evaluate(FakeModel(), ID, {"letters": LETTERS}, fit=FIT, task="features").to_dict()
    assert result["task"] == "features"
    assert result["id"]["knn1"] == expected["id"]["knn1"]
    assert result["ood"]["letters"]["knn"]["auroc"] == pytest.approx(expected["ood"]["letters"]["knn"]["auroc"])
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "m.npz", logits=rng.normal(size=(40, 3)), labels=rng.integers(0, 2, (40, 3)))
    assert evaluate(tmp_path / "m.npz").to_dict()["task"] == "multilabel"
