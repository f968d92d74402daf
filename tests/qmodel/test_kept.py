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
