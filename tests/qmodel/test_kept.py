"""A checkpoint of an earlier release (../studies/kept/README.md) gives what the code gave that wrote it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import quantlens as ql
from quantlens.data import load_images, open_source

KEPT = Path(__file__).parent / "kept" / "digits-vit-w4a4-repq-vit.safetensors"


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads(KEPT.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def qmodel():
    with pytest.warns(UserWarning, match="without a digest"):
        return ql.load(KEPT)


def test_what_it_is(qmodel) -> None:
    assert (qmodel.name, qmodel.method, qmodel.bits, qmodel.seed) == ("digits-vit", "repq-vit", "W4A4", 0)


def test_its_codes_are_equal(qmodel, expected) -> None:
    codes = {
        edge.key: quantizer.encode(qmodel.graph.tensor(str(edge.value.target))).to(torch.int32).contiguous()
        for edge, quantizer in qmodel.weight_edges()
    }
    found = {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in codes.items()}
    assert found == expected["codes_sha256"]


def test_its_logits_are_the_same_but_for_the_processor(qmodel, expected) -> None:
    """Relative to an image's logits, by the median over images: the last bit of a sum, which differs from processor to
    processor, puts an activation of four bits into the next bin now and then, which is seen in that image alone."""
    images = load_images(open_source(expected["images"]), qmodel.preprocess, cache_dir=False).tensor()
    with torch.inference_mode():
        logits = qmodel(images)
    wanted = torch.tensor(expected["logits"])
    error = (logits - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert error.median() < 1e-3


def test_calls_of_one_layer_keep_quantizers_of_their_own_where_they_had_them() -> None:
    """A file in which two calls of a layer have other names than now, and weight quantizers that differ."""
    path = KEPT.with_name("shared-layer-w4a4-easyquant.safetensors")
    qmodel = ql.load(path)
    uses = qmodel.weight_uses()["fc.0.weight"]
    assert [key for key, _ in uses] == ["fc.0.call1.weight", "fc.0.call2.weight"]
    assert not torch.equal(uses[0][1].scale, uses[1][1].scale)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = torch.tensor(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["logits"])
    torch.testing.assert_close(qmodel(images), expected, rtol=1e-5, atol=1e-6)
