"""Models for other things than one label of several: what is measured of them, and what is refused by name."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy.special import softmax
from study_fakes import PREPROCESS, FakeModel, features_of, quantized

import quantlens as ql
from quantlens.data.images import ImageSet
from quantlens.errors import QuantlensError, QuantlensWarning, UnknownNameError, UnsupportedError
from quantlens.evaluation import Result, evaluate
from quantlens.evaluation.compare import ID_METRICS, OOD_METRICS
from quantlens.evaluation.outputs import pack, read
from quantlens.metrics import (
    FitData,
    cosines,
    knn_classes,
    label_metrics,
    linear_classes,
    make_scorer,
    metrics_of,
    ood_metrics,
)
from quantlens.studies.compare import compare


@dataclass
class Fake(FakeModel):
    """The fake's outputs through a matrix of its own, as a model for another task."""

    task: str = "features"
    matrix: torch.Tensor | None = None
    noise: float = 0.0

    def outputs(self, x: torch.Tensor) -> Any:
        self.batches_seen += 1
        features = features_of(x)
        steady = torch.Generator().manual_seed(len(x))
        features = features + self.noise * torch.randn(features.shape, generator=steady)
        logits = features if self.matrix is None else (features - features.mean(1, keepdim=True)) @ self.matrix
        return SimpleNamespace(logits=logits, features=None if self.task == "features" else features)


def made(task: str, outputs: int, noise: float = 0.0, **about: Any) -> Fake:
    """outputs: of the model; noise: of the features, which stands for quantization."""
    matrix = None if task == "features" else torch.randn(64, outputs, generator=torch.Generator().manual_seed(outputs))
    return Fake(task=task, matrix=matrix, num_classes=outputs, noise=noise, bits="W4A4" if noise else "FP32",
                method="minmax" if noise else "fp32", **about)  # fmt: skip


def images(n: int = 60, seed: int = 0, labels: Any = None, name: str = "ID") -> ImageSet:
    """Pictures of five classes of brightness patterns."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 5, n)
    patterns = np.random.default_rng(9).normal(size=(5, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    values = torch.from_numpy((patterns[classes] + 0.5 * rng.normal(size=(n, 3, 32, 32))).astype(np.float32))
    return ImageSet([f"{name}/{i}" for i in range(n)], classes if labels is None else labels(values), name,
                    f"{name}{seed}", PREPROCESS, values=values)  # fmt: skip


def strange(n: int = 40) -> ImageSet:
    values = torch.from_numpy(np.random.default_rng(5).normal(1, 1, (n, 3, 32, 32)).astype(np.float32))
    return ImageSet([f"odd/{i}" for i in range(n)], None, "odd", "odd", PREPROCESS, values=values)


def multi_hot(count: int) -> Any:
    """Labels [N, count] that go along with the pictures."""
    matrix = torch.randn(64, count, generator=torch.Generator().manual_seed(77))
    return lambda values: (features_of(values) @ matrix > 0.3).numpy()


def arrays(model: Fake, of: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    found = model.outputs(of.tensor())
    return found.logits.numpy(), (found.logits if found.features is None else found.features).numpy()


# ---- features --------------------------------------------------------------------------------------------------------


def test_features_are_measured_by_their_neighbours_a_probe_and_what_they_were() -> None:
    id, fit, odd = images(80), images(120, 1, name="fit"), strange()
    fp32 = made("features", 64)
    model = made("features", 64, noise=0.2, reference=fp32)
    found = evaluate(model, id, {"odd": odd}, fit=fit, keep=True, batch_size=500)
    result = found.to_dict()
    (_, h), (_, bank), (_, other) = (arrays(model, of) for of in (id, fit, odd))
    _, before = arrays(fp32, id)
    assert result["task"] == "features"
    assert result["id"]["n"] == 80
    assert result["id"]["knn1"] == np.mean(knn_classes(h, bank, fit.labels) == id.labels)
    assert result["id"]["linear1"] == np.mean(linear_classes(h, bank, fit.labels) == id.labels)
    assert result["id"]["cosine"] == pytest.approx(cosines(h, before).mean(), abs=1e-6)
    assert 0 < result["id"]["cosine_p5"] < result["id"]["cosine"] < 1
    assert 0.1 < result["id"]["cka"] < 1
    assert result["change"]["id"] == pytest.approx(
        {name: result["id"][name] - result["fp32"]["id"][name] for name in ("knn1", "linear1")}
    )
    assert list(result["ood"]["odd"])[-5:] == [
        "knn",
        "mahalanobis",
        "rmahalanobis",
        "mahalanobis_l2",
        "rmahalanobis_l2",
    ]
    for score in ("knn", "mahalanobis", "rmahalanobis"):
        scorer = make_scorer(score, FitData(None, bank, fit.labels))
        expected = ood_metrics(scorer(None, h), scorer(None, other))
        assert result["ood"]["odd"][score]["auroc"] == pytest.approx(expected["auroc"], abs=1e-6)
    assert "k-NN top-1 % ↑: " in str(found)
    assert "measured as features" in str(found)
    assert Result.from_dict(result).to_dict() == result


def test_features_without_fit_images_or_labels_say_what_is_missing() -> None:
    id, model = images(), made("features", 64)
    alone = evaluate(model, id, {"odd": strange()})
    assert "give a `fit` set" in alone.metrics_unavailable["knn1"]
    assert "knn1" not in alone.id
    assert alone.ood["odd"].keys() == {"source", "fingerprint", "n", "skipped", "group"}
    bare = ImageSet(id.names, None, "ID", "ID0", PREPROCESS, values=id.values)
    fit = ImageSet([f"f/{i}" for i in range(60)], None, "fit", "fit", PREPROCESS, values=images(60, 3).values)
    found = evaluate(model, bare, {"odd": strange()}, fit=fit)
    assert found.metrics_unavailable == dict.fromkeys(("knn1", "linear1"), "needs labels of the ID images")
    assert "needs classes" in found.scores_unavailable["rmahalanobis"]
    assert found.ood["odd"]["mahalanobis"]["auroc"] > 0.5
    low = made("features", 64, noise=0.2, reference=model)
    late = evaluate(
        low, id, fit=images(90, 1, name="fit"), reference=evaluate(model, id, fit=images(90, 1, name="fit"))
    )
    assert "not its Result" in late.metrics_unavailable["cosine"]
    assert late.change is not None
    assert "knn1" in late.change["id"]


def test_fit_images_of_other_classes_are_refused() -> None:
    id, fit = images(), images(60, 1, name="fit")
    id.class_names, fit.class_names = list("abcde"), list("abcdf")
    with pytest.raises(QuantlensError, match="other classes"):
        evaluate(made("features", 64), id, fit=fit)


def test_the_features_of_a_classifier_are_what_its_last_layer_reads() -> None:
    id, fit = images(), images(90, 1, name="fit")
    found = evaluate(made("classify", 5), id, fit=fit, task="features")
    same = evaluate(made("features", 64), id, fit=fit)
    assert found.id == same.id
    assert found.id["num_features"] == 64


def test_features_of_a_classifier_keep_their_axes() -> None:
    """Folding the last LayerNorm and rotating its output change no logit and every value that the classifier reads. A
    checkpoint that does not say how to undo it, as older ones, has no cosine, and a warning."""
    vision_transformer = pytest.importorskip("timm").models.vision_transformer
    torch.manual_seed(0)
    net = vision_transformer.VisionTransformer(32, 16, embed_dim=32, depth=1, num_heads=2, num_classes=5).eval()
    torch.nn.init.uniform_(net.norm.weight, 0.2, 2)
    whole = ql.load_model(net, preprocess=PREPROCESS)
    net.reset_classifier(0)
    body = ql.load_model(net, preprocess=PREPROCESS)
    pixels = torch.randn(24, 3, 32, 32)

    def measured(model: Any, method: str, *, older: bool = False) -> Result:
        qmodel = ql.quantize(model, pixels[:8], method=method, bits="W8A8")
        if older:
            qmodel.graph.axes.clear()
        return evaluate(qmodel, (pixels[8:], torch.arange(16) % 5), reference=model, task="features", keep=True)

    for model, method in ((whole, "minmax"), (whole, "quantlens-fast"), (body, "quantlens-fast")):
        found = measured(model, method)
        assert found.id["cosine"] > 0.999
        assert found.id["num_features"] == 32
        assert "cosine" not in found.metrics_unavailable
    rotated = measured(whole, "quantlens-fast", older=True)
    assert "cosine" not in rotated.id
    assert rotated.id["cka"] > 0.9
    assert "quantize the model again" in rotated.metrics_unavailable["cosine_p5"]
    assert rotated.outputs is not None
    assert "cosine" not in rotated.outputs.hits
    qmodel = ql.quantize(whole, pixels[:8], bits="W8A8")
    sets = {"id": (pixels[8:], torch.arange(16) % 5), "fit": (pixels[:8], torch.arange(8) % 5)}

    def odd() -> Result:
        return evaluate(qmodel, ood={"odd": pixels[8:] + 3}, scores=["knn", "mahalanobis"], reference=whole, **sets)

    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantlensWarning)
        odd()
    qmodel.graph.axes.clear()
    with pytest.warns(QuantlensWarning, match="knn, mahalanobis see features on other axes"):
        odd()


# ---- binary, multi-label ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 6])
def test_sigmoids(outputs: int) -> None:
    task = "binary" if outputs == 1 else "multilabel"
    id = images(labels=multi_hot(outputs))
    fp32 = made(task, outputs)
    model = made(task, outputs, noise=0.3, reference=fp32)
    result = evaluate(
        model, id, {"odd": strange()}, fit=images(90, 1, multi_hot(outputs), "fit"), batch_size=500
    ).to_dict()
    logits, h = arrays(model, id)
    other, _ = arrays(model, strange())
    expected = label_metrics(logits, id.labels)
    assert result["task"] == task
    for name in metrics_of(task):
        assert result["id"][name] == pytest.approx(expected[name], abs=1e-6), name
        assert result["change"]["id"][name] == pytest.approx(result["id"][name] - result["fp32"]["id"][name])
    for score in ("joint_energy", "sigmoid_confidence"):
        scorer = make_scorer(score)
        auroc = ood_metrics(scorer(logits), scorer(other))["auroc"]
        assert result["ood"]["odd"][score]["auroc"] == pytest.approx(auroc, abs=1e-6)
    scores = {name for name, entry in result["ood"]["odd"].items() if isinstance(entry, dict)}
    assert scores.isdisjoint({"msp", "energy", "entropy", "gen", "vim", "react"})
    assert ("maxlogit" in scores, "rmahalanobis" in scores) == (outputs > 1, outputs == 1)
    assert h.shape == (60, 64)


def test_one_logit_is_binary_whatever_the_model_says() -> None:
    id = images(labels=lambda values: multi_hot(1)(values)[:, 0].astype(np.int64))
    assert evaluate(made("classify", 1), id).task == "binary"
    two = ImageSet(id.names, id.labels, "ID", "ID0", PREPROCESS, values=id.values, class_names=["no", "yes"])
    assert evaluate(made("classify", 1), two).id["positives"] == id.labels.sum()
    with pytest.raises(UnsupportedError, match="one logit"):
        evaluate(made("binary", 1), id, task="classify")


def test_confidence_of_one_label_is_the_softmax_of_two() -> None:
    z = np.linspace(-4, 4, 9)[:, None]
    two = softmax(np.concatenate([np.zeros_like(z), z], axis=1), axis=1).max(axis=1)
    assert make_scorer("sigmoid_confidence")(z) == pytest.approx(two)
    many = np.random.default_rng(0).normal(size=(5, 7))
    assert make_scorer("joint_energy")(many) == pytest.approx(np.log1p(np.exp(many)).sum(axis=1))


# ---- zero-shot -------------------------------------------------------------------------------------------------------


def texts(width: int = 64) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(5, width)).astype(np.float32)


def test_an_image_tower_is_a_classifier_of_texts(tmp_path: Any) -> None:
    id, model = images(), made("features", 64)
    given = {"embeddings": 7 * texts(), "logit_scale": np.float32(30), "logit_bias": -4.0, "class_names": list("abcde")}
    result = evaluate(model, id, {"odd": strange()}, fit=images(90, 1, name="fit"), text_embeddings=given)
    h = arrays(model, id)[0].astype(np.float64)
    unit, t = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (h, texts().astype(np.float64)))
    logits = 30 * unit @ t.T - 4
    assert result.task == "zero-shot"
    assert result.id["top1"] == pytest.approx(np.mean(logits.argmax(1) == id.labels))
    p = softmax(logits, axis=1)[np.arange(60), id.labels]
    assert result.id["nll"] == pytest.approx(-np.log(p).mean(), abs=1e-4)
    assert result.id["per_class"][0]["name"] == "a"
    assert result.text_embeddings is not None
    assert result.text_embeddings["logit_scale"] == 30
    assert {"msp", "energy", "knn", "vim", "react"} <= set(result.histograms)
    assert result.scores_unavailable == {}
    np.save(tmp_path / "t.npy", texts())
    np.savez(tmp_path / "t.npz", **given)
    save_file(
        {"embeddings": texts(), "logit_scale": np.array(30.0), "logit_bias": np.array(-4.0)}, tmp_path / "t.safetensors"
    )
    for name in ("t.npz", "t.safetensors"):
        found = evaluate(model, id, text_embeddings=tmp_path / name)
        assert found.id["nll"] == pytest.approx(result.id["nll"]), name
    plain = evaluate(model, id, text_embeddings=str(tmp_path / "t.npy"))
    assert plain.id["top1"] == result.id["top1"]
    assert plain.id["nll"] != pytest.approx(result.id["nll"])


def test_the_fp32_tower_is_measured_against_the_same_texts() -> None:
    fp32 = made("features", 64)
    result = evaluate(made("features", 64, noise=0.3, reference=fp32), images(), text_embeddings=texts())
    assert result.fp32 is not None
    assert result.fp32["id"]["top1"] == evaluate(fp32, images(), text_embeddings=texts()).id["top1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (texts(63), "63 columns"),
        (texts()[0], "shape"),
        (np.zeros((5, 64)), "none all 0"),
        ({"text": texts(), "scale": 3}, "must hold 'embeddings'"),
        ({"embeddings": texts(), "logit_scale": -1}, "scale is above 0"),
        ({"embeddings": texts(), "class_names": ["a"]}, "1 class names"),
        ("nowhere.npz", "do not exist"),
        ("texts.csv", "give one of .npy"),
    ],
)
def test_text_embeddings_that_do_not_fit_are_refused(given: Any, said: str) -> None:
    with pytest.raises(QuantlensError, match=said):
        evaluate(made("features", 64), images(), text_embeddings=given)


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "outputs", "settings", "said"),
    [
        ("features", 64, {"scores": ["msp"]}, "msp does not fit the task 'features'"),
        ("multilabel", 6, {"scores": ["knn", "Energy"]}, "energy does not fit the task 'multilabel'.*joint_energy"),
        ("classify", 5, {"scores": ["joint_energy"]}, "for binary, multilabel"),
        ("classify", 5, {"task": "binary"}, "5 logits and a binary model one"),
        ("zero-shot", 64, {}, "text_embeddings"),
        ("classify", 5, {"task": "binary", "text_embeddings": texts()}, "not 'binary'"),
        ("segment", 5, {}, "does not measure"),
        ("detect", 5, {}, "has no boxes"),
        ("multilabel", 6, {}, r"shape \(60,\).*need \(60, 6\)"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(task: str, outputs: int, settings: Any, said: str) -> None:
    with pytest.raises(QuantlensError, match=said):
        evaluate(made(task, outputs), images(), {"odd": strange()}, **settings)


def test_labels_of_another_task_are_refused() -> None:
    many = images(labels=multi_hot(5))
    with pytest.raises(QuantlensError, match="task='multilabel'"):
        evaluate(made("classify", 5), many)
    with pytest.raises(UnknownNameError, match="did you mean 'multilabel'"):
        evaluate(made("classify", 5), many, task="multi-label")
    fp32 = evaluate(made("classify", 5), images())
    low = made("multilabel", 5, noise=0.1)
    with pytest.raises(QuantlensError, match="measured as 'classify'"):
        evaluate(low, images(labels=multi_hot(5)), reference=fp32)


def test_a_classifier_is_measured_as_ever() -> None:
    model = FakeModel()
    found = evaluate(quantized(model, "W4A4"), "embedded:digits-test[0:40]", scores=["msp"])
    assert found.task == "classify"
    assert "measured as" not in str(found)
    assert set(metrics_of("classify")) <= set(found.id)


# ---- compared --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "outputs"), [("features", 64), ("binary", 1), ("multilabel", 6)])
def test_two_results_of_a_task_are_compared_with_intervals(task: str, outputs: int, tmp_path: Any) -> None:
    labels = None if task == "features" else multi_hot(outputs)
    id, fit = images(labels=labels), images(90, 1, labels, "fit")
    results = [evaluate(made(task, outputs, noise), id, {"odd": strange()}, fit=fit, keep=True) for noise in (0, 1.0)]
    (group,) = compare(*results, resamples=200).groups
    found = {one.path: one for one in group.metrics}
    assert not group.without_interval
    ids = [f"id.{name}" for name in metrics_of(task, resampled=True) if name != "cosine"]
    assert [path for path in found if path.startswith("id.")] == ids
    assert len(found) == len(ids) + len(OOD_METRICS)
    for path in ids:
        one, name = found[path], path.removeprefix("id.")
        assert one.difference == pytest.approx(results[1].id[name] - results[0].id[name])
        assert one.low <= one.difference + 0.05
        assert one.high >= one.difference - 0.05
    files = []
    for result in results:
        files.append(tmp_path / f"{result.bits}.npz")
        files[-1].write_bytes(pack(result.outputs))
        assert read(files[-1]).task == task
    (again,) = compare(*map(str, files), resamples=200).groups
    for one in again.metrics:
        assert one.b == pytest.approx(found[one.path].b, abs=1e-6), one.path
        assert (one.low, one.high) == pytest.approx((found[one.path].low, found[one.path].high), abs=1e-6)


def test_results_of_different_tasks_are_not_compared() -> None:
    id = images()
    first = evaluate(made("features", 64), id, fit=images(90, 1, name="fit"), keep=True)
    second = evaluate(made("classify", 5), id, keep=True)
    with pytest.raises(QuantlensError, match="different tasks"):
        compare(first, second)
    assert metrics_of("classify", resampled=True) == ID_METRICS


@pytest.mark.slow  # captures a model
def test_recommend_says_what_it_is_for() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1))

    model = ql.load_model(Net(), preprocess=PREPROCESS)
    pixels = torch.randn(120, 3, 32, 32)
    with pytest.raises(UnsupportedError, match=r"recommend chooses by top-1.*'binary'"):
        ql.recommend(model, id=(pixels, torch.arange(120) % 2), calibration=torch.randn(8, 3, 32, 32))


@pytest.mark.real
@pytest.mark.slow
def test_real_features_stay_what_they_were(shared_data: Any) -> None:
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    whole = ql.load_model(name, shared_data / "weights" / f"{name}.augreg_in21k_ft_in1k.safetensors")
    module = timm.create_model(name, num_classes=0)
    module.load_state_dict({k: v for k, v in whole.module.state_dict().items() if not k.startswith("head.")})
    model = ql.load_model(module.eval(), preprocess=whole.preprocess)
    assert model.task == "features"
    id, fit = (f"imagenet:{shared_data / folder}" for folder in ("imagenet_val[0:16]", "imagenet[0:16]"))
    qmodel = ql.quantize(model, f"imagenet:{shared_data / 'imagenet'}[500:504]", method="minmax", bits="W8A8")
    result = evaluate(qmodel, id, fit=fit, cache_dir=False)
    assert result.task == "features"
    assert result.id["num_features"] == 192
    assert 0.9 < result.id["cosine"] < 0.9999
    assert result.fp32 is not None
    assert result.fp32["id"]["knn1"] > 3 / 16
