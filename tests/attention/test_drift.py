from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy, spearmanr

import quantlens as ql
from quantlens.attention import drift
from quantlens.attention.drift import measure


def _maps(seed: int, batch: int = 3, heads: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_kl_and_entropy_are_scipys():
    a, b = _maps(0), _maps(1)
    for image in range(3):
        for head in range(2):
            p, q = a[image, head].double().numpy(), b[image, head].double().numpy()
            kl = drift.Rows(a).kl_to(drift.Rows(b))[image, head]
            assert float(kl) == pytest.approx(scipy_entropy(p, q, axis=1).mean(), rel=1e-4)
            assert float(drift.Rows(a).entropy[image, head].mean()) == pytest.approx(
                scipy_entropy(p, axis=1).mean(), rel=1e-4
            )


def test_cosine_is_torchs():
    a, b = _maps(0), _maps(1)
    expected = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean(-1)
    torch.testing.assert_close(drift.Rows(a).cosine_to(drift.Rows(b)), expected)


def test_spearman_is_scipys_with_ties():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 6, (4, 30), generator=generator).float() for _ in range(2))
    expected = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert np.allclose(drift.spearman(a, b).numpy(), expected, atol=1e-6)
    constant = torch.ones(1, 30)
    assert float(drift.spearman(constant, constant)) == 1
    assert float(drift.spearman(constant, a[:1])) == 0


def test_top_overlap_and_movement():
    first, second = torch.zeros(1, 16), torch.zeros(1, 16)
    first[0, [0, 1, 2, 3]] = torch.tensor([4.0, 3, 2, 1])
    second[0, [0, 1, 12, 13]] = torch.tensor([4.0, 3, 2, 1])
    assert float(drift.top_overlap(first, second, 0.25)) == 0.5
    corner, opposite = torch.zeros(1, 16), torch.zeros(1, 16)
    corner[0, 0] = opposite[0, 15] = 1
    assert float(drift.movement(corner, opposite, (4, 4))) == pytest.approx(0.75)
    assert drift.centre(torch.zeros(1, 16), (4, 4)).tolist() == [[0.5, 0.5]]


@pytest.fixture(scope="module")
def digits():
    from quantlens.data import load_images, open_source

    model = ql.load_model("digits-vit")
    images = load_images(open_source("embedded:digits-test?n=24&seed=0"), model.preprocess, cache_dir=False).tensor()
    calibration = "embedded:digits-calibration?n=32&seed=0"
    quantized = {f"W{b}A{b}": ql.quantize(model, calibration, method="minmax", bits=f"W{b}A{b}") for b in (8, 6, 4, 3)}
    return model, images, quantized


def test_no_drift_against_itself(digits):
    model, images, _ = digits
    found = measure(model, {"same": model}, images.split(10))["same"].summary()
    assert found["n"] == 24
    assert found["row_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["rollout_spearman"] == found["rollout_overlap"] == found["outlier_overlap"] == 1
    for name in ("row_kl", "entropy_change", "centre_movement", "prediction_changed", "confidence_change", "output_kl"):
        assert found[name] == pytest.approx(0, abs=1e-5), name


def test_fewer_bits_drift_more(digits):
    model, images, quantized = digits
    found = [d.summary() for d in measure(model, quantized, images.split(10)).values()]
    for name in ("row_cosine", "rollout_spearman", "rollout_overlap"):
        values = [f[name] for f in found]
        assert values == sorted(values, reverse=True), (name, values)
    for name in ("row_kl", "output_kl", "centre_movement"):
        values = [f[name] for f in found][: 3 if name == "centre_movement" else 4]  # at 3 bits it has nowhere to go
        assert values == sorted(values), (name, values)
    assert len(found[0]["blocks"]["row_kl"]) == len(found[0]["heads"]["row_kl"])


def test_batches_do_not_matter(digits):
    model, images, quantized = digits
    whole = measure(model, {"q": quantized["W4A4"]}, [images])["q"]
    parts = measure(model, {"q": quantized["W4A4"]}, images.split(7))["q"]
    assert np.allclose(whole.row_kl, parts.row_kl, atol=1e-4)
    assert np.array_equal(whole.prediction_changed, parts.prediction_changed)
    assert whole.row_cosine.shape == (24, len(whole.summary()["blocks"]["row_kl"]), whole.row_cosine.shape[2])
