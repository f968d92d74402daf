"""Surveys of whole sets, maps of any kind, and the association of two figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

import quantlens as ql
from quantlens.attention import lookup, pictures
from quantlens.attention.association import associate
from quantlens.attention.lens import Lens
from quantlens.attention.measure import measure
from quantlens.attention.rollout import discard_smallest, fuse_heads, rollout
from quantlens.attention.tokens import outliers, token_norms
from quantlens.data import load_images, open_source
from quantlens.errors import UnknownNameError


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
    assert lookup.evenly(10, 4) == [0, 2, 5, 7]
    assert lookup.evenly(3, 64) == [0, 1, 2]
    assert lookup.evenly(5, 0) == []


def test_survey_is_measure_and_keeps_what_was_seen(digits):
    model, quantized, id, letters = digits
    found = lookup.survey(model, {"q": quantized, "f": model}, id, {"letters": letters}, images=20, show=3)
    positions = lookup.evenly(60, 20)
    expected = measure(model, {"q": quantized}, [lookup.chosen(id, positions)])["q"].summary()
    assert found["q"]["attention"]["id"] == expected
    assert found["q"]["attention"]["ood"]["letters"]["n"] == 12
    assert found["f"]["attention"]["id"]["row_kl"] == pytest.approx(0, abs=1e-6)
    examples = found["q"]["attention_examples"]
    assert [(e["set"], e["ood"], e["index"]) for e in examples] == [
        *(("id", False, positions[k]) for k in lookup.evenly(20, 3)),
        *(("letters", True, k) for k in (0, 4, 8)),
    ]
    lens = Lens(quantized)
    for example, image_set in zip(examples, [id] * 3 + [letters] * 3, strict=True):
        view = lens(lookup.chosen(image_set, [example["index"]]))
        assert np.allclose(example["rollout"], lens.rollout_of(view)[0], atol=2e-3)
        assert example["probability"] == pytest.approx(float(view.logits.softmax(1).max()), abs=1e-3)
        assert example["label"] == int(view.logits.argmax())
        norms = token_norms(view.tokens[-1], lens.layout.prefix)[0]
        assert np.allclose(example["norms"][lens.blocks[-1]], norms.detach(), rtol=1e-3)
        assert "thumbnail" not in example
    assert examples[0]["class_name"] in model.class_names
    assert examples[0]["truth"] == int(id.labels[0])
    assert examples[3]["truth"] is None, "an OOD image has no label among the model's classes"
    shown = pictures.from_webp(found["f"]["attention_examples"][0]["thumbnail"])
    assert max(shown.size) <= 96
    assert np.abs(np.asarray(shown, float) - id.pixels[positions[0]].transpose(1, 2, 0)).mean() < 12


@pytest.mark.parametrize("kind", lookup.MAPS)
def test_maps_of_any_kind(kind, loaded, pictures):
    model = loaded["vit"]
    maps, probabilities = lookup.maps_of(model, pictures, kind, target=None if kind == "rollout" else 2)
    assert maps.shape == (8, 4, 4)
    assert np.isfinite(maps).all()
    assert (maps >= 0).all()
    torch.testing.assert_close(probabilities, model(pictures).softmax(1), rtol=1e-3, atol=1e-5)
    same = lookup.map_drift(maps, maps)
    assert (same["spearman"] == 1).all()
    assert (same["overlap"] == 1).all()
    assert (same["movement"] == 0).all()


def test_unknown_maps_are_named(small_models, pictures):
    with pytest.raises(UnknownNameError, match="grad-cam"):
        lookup.maps_of(small_models["vit"], pictures, "gradcam2")


# -- rollout: the row alone, and equal entries ------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_row_is_that_of_the_whole_product(prefix):
    generator = torch.Generator().manual_seed(3)
    blocks = list((2 * torch.randn(4, 2, 3, 9, 9, generator=generator)).softmax(-1))
    product = torch.eye(9).expand(2, 9, 9)
    for probs in blocks:
        mixed = discard_smallest(fuse_heads(probs), 0.6, max(prefix, 1)) + torch.eye(9)
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    row = (product[:, 0] if prefix else product.mean(1))[:, prefix:]
    expected = row / row.amax(1, keepdim=True)
    torch.testing.assert_close(rollout(blocks, discard=0.6, prefix=prefix), expected)


def test_equal_entries_share_their_fate():
    """A quantized map holds few values; which of equal ones go must not depend on where they stand."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randint(0, 4, (3, 12, 12), generator=generator).float()
    kept = discard_smallest(fused, 0.9)
    inner = (slice(None), slice(1, None), slice(1, None))
    for image in range(3):
        for value in range(1, 4):
            assert len((kept[inner][image][fused[inner][image] == value] == 0).unique()) <= 1
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(11, generator=generator)])
    moved = discard_smallest(fused[:, order][:, :, order], 0.9)
    assert torch.equal(moved, kept[:, order][:, :, order])
    distinct = torch.rand(2, 12, 12, generator=generator)
    gone = distinct != discard_smallest(distinct, 0.5, 0, compat=None)
    assert gone.flatten(1).sum(1).tolist() == [72, 72], "without equal entries exactly the share goes"


def test_outliers_of_many_blocks_at_once():
    norms = 10 + torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    norms[1, 2, 7] = 99
    assert torch.equal(outliers(norms)[1], outliers(norms[1]))
    assert outliers(norms).nonzero().tolist() == [[1, 2, 7]]


# -- association ------------------------------------------------------------------------------------------------------
def test_association_is_scipys():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    found = associate(x, y, list(range(40)), ["a"] * 40)
    assert found.pearson == pytest.approx(pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(spearmanr(x, y).statistic)
    assert found.within == pytest.approx(found.spearman)
    assert found.low < found.spearman < found.high
    assert (found.n, found.conditions) == (40, 40)


def test_copies_of_a_condition_are_no_new_evidence():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 12))
    alone = associate(x, y, list(range(12)), ["a"] * 12)
    copied = associate(np.repeat(x, 5), np.repeat(y, 5), [i // 5 for i in range(60)], ["a"] * 60)
    width = alone.high - alone.low
    assert copied.high - copied.low == pytest.approx(width, rel=0.15)
    naive = associate(np.repeat(x, 5), np.repeat(y, 5), list(range(60)), ["a"] * 60)
    assert naive.high - naive.low < 0.6 * width


def test_within_precisions_takes_the_bits_out():
    """Drift and loss that share nothing but the bits correlate, yet not within a precision."""
    rng = np.random.default_rng(2)
    bits = np.repeat(np.arange(6), 20)
    x, y = bits + 0.3 * rng.normal(size=(2, 120))
    found = associate(x, y, list(range(120)), bits.tolist())
    assert found.spearman > 0.9
    assert abs(found.within) < 0.3


def test_association_of_little_is_none():
    assert associate([1, 2, 3], [1, 2, 3], [1, 2, 3], "aaa").spearman is None
    constant = associate([1.0] * 6, range(6), range(6), "aaabbb")
    assert constant.spearman is constant.pearson is constant.low is constant.within is None
