"""What a study keeps of attention."""

from __future__ import annotations

import numpy as np
import pytest

import quantlens as ql
from quantlens.attention import pictures
from quantlens.attention.drift import measure, token_norms
from quantlens.attention.image_sets import chosen, evenly, survey
from quantlens.attention.recording import Lens
from quantlens.data import load_images, open_source


@pytest.fixture(scope="module")
def digits():
    model = ql.load_model("digits-vit")
    id, letters = (
        load_images(open_source(s), model.preprocess, cache_dir=False)
        for s in ("embedded:digits-test[0:60]", "embedded:letters[0:12]")
    )
    return (
        model,
        ql.quantize(model, "embedded:digits-calibration?n=16&seed=0", method="repq-vit", bits="W4A4"),
        id,
        letters,
    )


def test_evenly():
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(3, 64) == [0, 1, 2]
    assert evenly(5, 0) == []


def test_survey_is_measure_and_keeps_what_was_seen(digits):
    model, quantized, id, letters = digits
    of_float, found = (survey(model, m, id, {"letters": letters}, images=20, show=3) for m in (model, quantized))
    positions = evenly(60, 20)
    expected = measure(model, {"q": quantized}, [chosen(id, positions)])["q"].summary()
    assert found["attention"]["id"] == expected
    assert found["attention"]["ood"]["letters"]["n"] == 12
    assert of_float["attention"]["id"]["row_kl"] == pytest.approx(0, abs=1e-6)
    assert of_float["attention"]["id"]["rollout_spearman"] == 1
    examples = found["attention_examples"]
    assert [(e["set"], e["ood"], e["index"]) for e in examples] == [
        *(("id", False, positions[k]) for k in evenly(20, 3)),
        *(("letters", True, k) for k in (0, 4, 8)),
    ]
    lens = Lens(quantized)
    for example, image_set in zip(examples, [id] * 3 + [letters] * 3, strict=True):
        view = lens(chosen(image_set, [example["index"]]))
        assert np.allclose(example["rollout"], lens.rollout_of(view)[0], atol=2e-3)
        assert example["probability"] == pytest.approx(float(view.logits.softmax(1).max()), abs=1e-3)
        assert example["label"] == int(view.logits.argmax())
        norms = token_norms(view.tokens[-1], lens.layout.prefix)[0]
        assert np.allclose(example["norms"][lens.blocks[-1]], norms.detach(), rtol=1e-3)
        assert "thumbnail" not in example
    assert examples[0]["class_name"] in model.class_names
    assert examples[0]["truth"] == int(id.labels[0])
    assert examples[3]["truth"] is None, "an OOD image has no label among the model's classes"
    shown = pictures.from_webp(of_float["attention_examples"][0]["thumbnail"])
    assert max(shown.size) <= 96
    assert np.abs(np.asarray(shown, float) - id.pixels[positions[0]].transpose(1, 2, 0)).mean() < 12
