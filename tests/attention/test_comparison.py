"""`ql.attention.compare`: a result that holds what each model saw of each image, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import quantlens as ql
from quantlens.attention import pictures as drawing
from quantlens.attention.drift import measure, outlier_tokens, token_norms
from quantlens.attention.image_sets import chosen, evenly, truth_of
from quantlens.attention.picture_grids import maps_picture
from quantlens.attention.recording import Lens
from quantlens.data import load_images, open_source
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError


@pytest.fixture(scope="module")
def digits():
    model = ql.load_model("digits-vit")
    calibration = "embedded:digits-calibration?n=16&seed=0"
    quantized = {bits: ql.quantize(model, calibration, method="minmax", bits=bits) for bits in ("W8A8", "W3A3")}
    images = load_images(open_source("embedded:digits-test[0:30]"), model.preprocess, cache_dir=False)
    return model, quantized, images


@pytest.fixture(scope="module")
def found(digits):
    model, quantized, images = digits
    return ql.attention.compare(model, quantized, images, ood={"letters": "embedded:letters[0:9]"}, limit=10)


@pytest.mark.slow
def test_the_result_holds_what_the_models_saw(digits, found):
    model, quantized, images = digits
    view, positions = found.sets["ID"], evenly(30, 10)
    assert found.labels == ["FP32", "W8A8", "W3A3"]
    assert view.positions == positions
    batch = chosen(images, positions)
    for label, one in {"FP32": model, **quantized}.items():
        lens = Lens(one)
        seen = lens(batch)
        assert np.allclose(view.maps[label].reshape(10, -1), lens.rollout_of(seen).detach(), atol=2e-3)
        norms = torch.stack([token_norms(t, lens.layout.prefix) for t in seen.tokens], 1).detach()
        assert np.allclose(view.norms[label], norms, rtol=1e-3)
        assert np.array_equal(view.outliers[label], outlier_tokens(torch.from_numpy(view.norms[label])))
        assert np.array_equal(view.predicted[label], seen.logits.argmax(1))
    expected = measure(model, quantized, [batch])
    assert view.summary("W3A3") == expected["W3A3"].summary()
    assert np.array_equal(view.correlation("W3A3"), expected["W3A3"].rollout_spearman)


def test_rows_per_image_have_the_means_of_the_summary(found):
    rows = [r for r in found.per_image() if (r["set"], r["bits"]) == ("letters", "W3A3")]
    summary = found.sets["letters"].summary("W3A3")
    assert [r["image"] for r in rows] == list(range(9))
    for name in ("row_kl", "row_cosine", "rollout_spearman", "outliers_fp32", "large_tokens", "prediction_changed"):
        assert np.mean([r[name] for r in rows]) == pytest.approx(summary[name], abs=1e-6), name
    json.dumps(rows)


def test_what_is_saved_can_be_read_and_drawn_again(found, tmp_path):
    written = found.save(tmp_path / "out", show=2)
    assert [p.name for p in written] == ["maps.png", "norms.png", "maps.npz", "drift.json"]
    about = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert about["images"]["ID"].pop("shown") == [0, 3]
    assert about["images"]["letters"].pop("shown") == [0, 1]
    assert about == found.to_dict()
    assert about["drift"] == found.drift()
    with np.load(tmp_path / "out" / "maps.npz") as kept:
        for name, view in found.sets.items():
            assert kept[f"{name}/positions"].tolist() == view.positions
            for label in found.labels:
                assert np.array_equal(kept[f"{name}/{label}/maps"], view.maps[label])
                assert np.array_equal(kept[f"{name}/{label}/norms"], view.norms[label])
                assert np.array_equal(kept[f"{name}/{label}/outliers"], view.outliers[label])


def test_every_map_of_a_picture_has_one_scale(found, monkeypatch):
    """The same value has the same colour in all maps, whichever image and model they are of."""
    scales, real = [], drawing.overlay
    monkeypatch.setattr(drawing, "overlay", lambda *a: scales.append(a[-1]) or real(*a))
    maps_picture(found, {"ID": [0, 1, 2], "letters": [4]})
    assert len(scales) == 4 * 3
    assert len(set(scales)) == 1


def test_images_of_other_classes_keep_their_names(digits):
    model, quantized, images = digits
    other = dataclasses.replace(images, labels=images.labels + 400, class_names=[f"c{i}" for i in range(1000)])
    assert truth_of(other, 0, model.class_names)[1] == f"c{images.labels[0] + 400}"
    assert truth_of(dataclasses.replace(other, class_names=None), 0, model.class_names)[1] is None
    several = dataclasses.replace(images, labels=np.ones((len(images), 8), np.int64))
    assert truth_of(several, 0, model.class_names) == (None, None)
    for given in (other, several):
        result = ql.attention.compare(model, quantized["W8A8"], given, limit=2)
        assert maps_picture(result, {"ID": [0, 1]})


def test_models_may_be_given_alone_as_a_list_or_by_label(digits):
    model, quantized, images = digits
    one = ql.attention.compare(model, quantized["W3A3"], images, limit=2)
    several = ql.attention.compare(model, list(quantized.values()), images.tensor(0, 4), limit=2)
    named = ql.attention.compare(model, {"a": quantized["W3A3"]}, images, limit=2)
    assert [r.labels for r in (one, several, named)] == [["FP32", "W3A3"], ["FP32", "W8A8", "W3A3"], ["FP32", "a"]]
    assert one.sets["ID"].summary("W3A3") == named.sets["ID"].summary("a")


def test_a_module_and_tensors(small_models, pictures, tmp_path):
    network = small_models["vit"]
    model = ql.load_model(network, input_size=tuple(pictures.shape[1:]))
    quantized = ql.quantize(model, pictures, method="minmax")
    result = ql.attention.compare(network, quantized, pictures, limit=4)
    assert result.sets["ID"].maps["FP32"].shape == (4, 4, 4)
    assert len(result.save(tmp_path, show=1)) == 4


def test_windowed_models_have_gradient_maps_only(loaded, tmp_path):
    model = loaded["swin"]
    images = load_images(open_source("embedded:letters[0:6]"), model.preprocess, cache_dir=False)
    quantized = ql.quantize(model, images, method="minmax", bits="W4A4")
    with pytest.raises(UnsupportedError, match="windows"):
        ql.attention.compare(model, quantized, images)
    result = ql.attention.compare(model, quantized, images, map="grad-cam", limit=4)
    written = result.save(tmp_path, show=2, choose="most-changed")
    assert [p.name for p in written] == ["maps.png", "maps.npz", "drift.json"]
    about = json.loads((tmp_path / "drift.json").read_text())
    assert "windows" in about["unavailable"]
    assert -1 <= about["drift"]["W4A4"]["ID"]["map_spearman"] <= 1
    assert [set(row) & {"map_spearman", "row_kl"} for row in result.per_image()] == [{"map_spearman"}] * 4


def test_most_changed_are_those_of_least_correlation(found):
    expected = np.argsort(found.sets["ID"].drift["W3A3"].rollout_spearman, kind="stable")[:3]
    assert found.chosen("ID", 3, "most-changed") == expected.tolist()
    assert found.chosen("ID", 3) == [0, 1, 2]
    with pytest.raises(UnknownNameError, match="most-changed"):
        found.chosen("ID", 3, "best")


def test_a_map_that_fades_is_seen_to_fade(digits, tmp_path):
    """Gradient maps are shares of FP32's largest value of the image."""
    model, quantized, images = digits
    result = ql.attention.compare(model, quantized["W3A3"], images, map="grad-cam", target=3, limit=1)
    result.sets["ID"].maps["W3A3"] *= 0
    result.save(tmp_path, show=1)
    picture = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB")).astype(float)
    saturation = (picture.max(2) - picture.min(2))[60:180]
    assert saturation[:, -160:-10].max() < 12, "the last map is the grey photograph under the scale's black"
    assert saturation[:, -320:-180].max() > 60


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ("none", {}, "no quantized model"),
        ("FP32", {}, "another label"),
        ("text", {}, "str"),
        ("twice", {}, "same bits"),
        ("one", {"ood": {"ID": "embedded:letters"}}, "in-distribution"),
        ("one", {"limit": 0}, "at least one"),
        ("one", {"map": "cam"}, "grad-cam"),
    ],
)
def test_mistakes_are_named(digits, given, settings, message):
    model, quantized, images = digits
    one = quantized["W8A8"]
    models = {"none": {}, "FP32": {"FP32": one}, "text": {"W4A4": "text"}, "twice": [one, one], "one": one}[given]
    with pytest.raises(QuantlensError, match=message):
        ql.attention.compare(model, models, images, **settings)


def test_the_package_is_imported_without_torch():
    code = "import sys, quantlens; quantlens.attention; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
