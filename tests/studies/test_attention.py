"""Attention in studies: kept only when asked for, with keys that old stores share, and refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_fakes import FakeBackend

from quantlens.attention import image_sets
from quantlens.data import open_source
from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.studies.backend import Backend
from quantlens.studies.cells import StudyImages, cell_key, plan_study
from quantlens.studies.config import parse_config
from quantlens.studies.runner import run_study
from quantlens.studies.store import Store

STUDY = {
    "models": ["digits-vit"],
    "methods": ["minmax"],
    "bits": ["FP32", "W4A4"],
    "calibration": {"source": "embedded:digits-calibration", "n": 8},
    "id": "embedded:digits-test[0:24]",
    "ood": {"letters": "embedded:letters[0:10]"},
    "scores": ["msp"],
    "device": "cpu",
    "cache": False,
}


def _keys(**changes) -> list[str]:
    study = parse_config({**STUDY, **changes})
    images = StudyImages.open(study)
    return [cell_key(cell, study, images, "sha", {}) for cell in plan_study(study)]


def test_keys_change_only_with_attention():
    plain = _keys()
    assert _keys(attention=False) == plain
    asked = _keys(attention=True)
    assert not set(asked) & set(plain)
    assert _keys(attention={"images": 64, "show": 4}) == asked
    assert not set(_keys(attention={"images": 32})) & {*asked, *plain}


def test_the_key_of_a_study_without_attention_is_what_it_was():
    """What determines a cell in stores written before there was a lens."""
    from quantlens.studies.cells import _determinants

    study = parse_config({**STUDY, "ood": {}})
    images = StudyImages.open(study)
    assert set(_determinants(plan_study(study)[0], study, images)) == {
        "method", "bits", "seed", "calibration", "id", "ood", "fit", "scores",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "message"), [({"imges": 3}, "images"), ({"images": 0}, "attention.images"), ("yes", "attention")]
)
def test_mistakes_are_named(value, message):
    with pytest.raises(QuantlensError, match=message):
        parse_config({**STUDY, "attention": value})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    summary = run_study(parse_config({**STUDY, "attention": {"images": 9, "show": 2}}), out, progress=False)
    assert not summary.failed, summary.failed
    return [cell.result for cell in Store(out).cells()]


def test_cells_keep_drift_and_examples(results):
    fp32, quantized = results
    for result in results:
        assert result["attention"]["id"]["n"] == 9
        assert result["attention"]["ood"]["letters"]["n"] == 9
        assert [(e["set"], e["index"]) for e in result["attention_examples"]] == [
            ("id", 0), ("id", 10), ("letters", 0), ("letters", 4),
        ]  # fmt: skip
        assert result["seconds"]["attention"] > 0
        for example in result["attention_examples"]:
            rows, columns = example["grid"]
            assert len(example["rollout"]) == rows * columns
            assert max(example["rollout"]) == 1
            assert all(len(norms) == rows * columns for norms in example["norms"].values())
    assert fp32["attention"]["id"]["row_kl"] == pytest.approx(0, abs=1e-6)
    assert fp32["attention"]["id"]["rollout_spearman"] == 1
    assert quantized["attention"]["id"]["row_kl"] > 1e-4
    assert quantized["attention"]["id"]["rollout_spearman"] < 1
    assert all("thumbnail" in e for e in fp32["attention_examples"])
    assert not any("thumbnail" in e for e in quantized["attention_examples"])
    assert [e["rollout"] for e in fp32["attention_examples"]] != [e["rollout"] for e in quantized["attention_examples"]]


def test_a_model_without_global_attention_goes_on(tmp_path, monkeypatch):
    def refuse(*args, **settings):
        raise UnsupportedError("attention is computed in windows")

    monkeypatch.setattr(image_sets, "survey", refuse)
    study = parse_config(
        {**STUDY, "models": ["fake"], "calibration": {**STUDY["calibration"], "n": 16}, "attention": True}
    )
    summary = run_study(study, tmp_path, progress=False, backend=FakeBackend(Path(tmp_path / "log")))
    assert (summary.done, summary.failed) == (2, [])
    for cell in Store(tmp_path).cells():
        assert "windows" in cell.result["attention"]["unavailable"]
        assert 0 < cell.result["id"]["top1"] <= 1


def test_swin_is_refused_in_words(loaded):
    from quantlens.data import load_images

    model = loaded["swin"]
    images = load_images(open_source("embedded:letters[0:2]"), model.preprocess, cache_dir=False)
    spec = parse_config({**STUDY, "attention": True}).attention
    found = Backend().attention(model, model, images, {}, spec, None)
    assert "Swin" in found["attention"]["unavailable"]
