"""The studies of examples/ on COCO, with small models of random weights in place of those of the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantlens.studies.cells import plan_study
from quantlens.studies.config import load_config
from quantlens.studies.estimate import estimate

ROOT = Path(__file__).parents[2]
NAMES = {"detr": "detr", "rtdetr": "rt-detr-v2", "yolos": "yolos"}


def small_coco(folder: Path) -> None:
    """Eight pictures in either split, with an object each."""
    draw = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        for k in range(8):
            Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / split / f"{k}.jpg")
        listed = {
            "images": [{"id": k, "file_name": f"{k}.jpg", "width": 60, "height": 40} for k in range(8)],
            "annotations": [{"image_id": k, "category_id": k % 4, "bbox": [5, 5, 30, 20]} for k in range(8)],
            "categories": [{"id": k, "name": f"LABEL_{k}"} for k in range(4)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(listed))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_of_coco_is_planned_with_every_method(name, tmp_path, monkeypatch) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (quantlens[hf])")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "graph"))
    from hf_detectors import small

    small(NAMES[name])[0].save_pretrained(tmp_path / "model")
    size = {"height": 64, "width": 64}
    kind = "RTDetrImageProcessor" if name == "rtdetr" else "YolosImageProcessor"
    getattr(transformers, kind)(size=size).save_pretrained(tmp_path / "model")
    small_coco(tmp_path / "coco")
    monkeypatch.setenv("COCO", str(tmp_path / "coco"))
    monkeypatch.setenv("OOD", str(tmp_path / "ood"))
    (tmp_path / "ood" / "textures").mkdir(parents=True)
    Image.new("RGB", (50, 50), (90, 60, 30)).save(tmp_path / "ood" / "textures" / "a.png")
    text = (ROOT / "examples" / f"{name}-coco.yaml").read_text(encoding="utf-8")
    text, found = re.subn(r"hf:[\w/.-]+\"", f'hf:{tmp_path / "model"}"', text)
    assert found == 1
    study = tmp_path / "study.yaml"
    study.write_text(re.sub(r"n: 100+}", "n: 4}", text), encoding="utf-8")
    config = load_config(study)
    assert len(plan_study(config)) > len(config.methods) * 3
    lines = "\n".join(estimate(config, tmp_path / "out", progress=False).lines())
    assert "failed" not in lines, lines
    assert all(method.label in lines for method in config.methods), lines
