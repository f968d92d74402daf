"""What the README shows must run."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import quantlens as ql

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_in_the_readme_runs(tmp_path, pictures):
    """The calls of the README's Python block, on the shipped model."""
    entry_images, letters = "embedded:digits-test[0:100]", "embedded:letters[0:60]"
    model = ql.load_model("digits-vit")
    qmodel = ql.quantize(model, "embedded:digits-calibration?n=32&seed=0", method="repq-vit", bits="W4A4", seed=0)
    path = qmodel.save(tmp_path / "digits-w4a4.safetensors")
    again = ql.load(path)
    assert torch.equal(again(pictures), qmodel(pictures))
    result = ql.evaluate(again, id=entry_images, ood={"letters": letters}, cache_dir=False).to_dict()
    assert 0 < result["id"]["top1"] <= 1
    assert 0 < result["ood"]["letters"]["msp"]["aupr_out"] <= 1
    assert result["fp32"] is None
    assert "knn" in result["scores_unavailable"]
    known = ql.evaluate(qmodel, id=entry_images, ood={"letters": letters}, cache_dir=False).to_dict()
    assert known["id"] == result["id"], "a reloaded model measures the same"
    assert known["change"]["id"]["top1"] == known["id"]["top1"] - known["fp32"]["id"]["top1"]


def test_evaluate_takes_tensors_and_batches(pictures):
    model = ql.load_model("digits-vit")
    labels = torch.arange(8)
    whole = ql.evaluate(model, id=(pictures, labels), ood={"noise": torch.randn(6, 3, 32, 32)}).to_dict()
    loader = [(pictures[:5], labels[:5]), (pictures[5:], labels[5:])]
    parts = ql.evaluate(model, id=loader, ood={"noise": [torch.randn(6, 3, 32, 32)]}).to_dict()
    assert whole["id"]["nll"] == parts["id"]["nll"]
    assert whole["ood"]["noise"]["n"] == parts["ood"]["noise"]["n"] == 6
    assert (whole["method"], whole["bits"]) == ("fp32", "FP32")


def test_the_tests_that_the_page_on_quality_names_exist():
    page = README.parent / "benchmarks" / "quality" / "README.md"
    tests = {p: p.read_text(encoding="utf-8") for p in Path(__file__).parent.rglob("test_*.py")}
    named = re.findall(r"`([^`]*test_[^`]*)`", page.read_text(encoding="utf-8"))
    assert len(named) > 40
    for place, _, name in (one.partition("::") for one in named):
        if place.endswith(".py"):
            assert Path(__file__).parent / place in tests, place
        name = name or (place if not place.endswith(".py") else "")
        assert not name or any(f"def {name}(" in text for text in tests.values()), name
