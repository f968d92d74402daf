"""Files of other tools and of logits as cells of a study."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from study_fakes import PREPROCESS, FakeBackend, FakeModel, config

import quantlens as ql
from foreign_files import write
from quantlens.data import load_images
from quantlens.errors import BadWeightsError, QuantlensError
from quantlens.report.build import write_report
from quantlens.studies.compare import open_side
from quantlens.studies.config import parse_config
from quantlens.studies.estimate import estimate
from quantlens.studies.reproduce import _part
from quantlens.studies.results import results
from quantlens.studies.runner import run_study

pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")


def study(foreign, **changes):
    models = [{"name": "fake", "foreign": foreign}]
    return config(models=models, methods=["minmax"], bits=["FP32", "W8A8"], seeds=[0], **changes)


@pytest.fixture
def files(tmp_path):
    """An ONNX file that is coarser than the model, and the model's own logits on the images of the study."""
    coarse = FakeModel(weight=torch.round(FakeModel().weight * 3) / 3)
    arrays = {}
    sources = {"": "digits-test[0:100]", "ood/letters/": "letters[0:40]", "ood/other/": "digits-held-out[0:40]"}
    for prefix, source in sources.items():
        images = load_images(f"embedded:{source}", PREPROCESS, cache_dir=False)
        arrays[f"{prefix}logits"] = FakeModel().outputs(images.tensor()).logits.numpy()
        arrays[f"{prefix}ids"] = np.array(images.names)
    np.savez(tmp_path / "logits.npz", **arrays)
    return [{"file": str(write(tmp_path / "their.onnx", model=coarse)), "bits": "W8A8"}, str(tmp_path / "logits.npz")]


def test_a_file_is_one_more_cell_compared_with_the_float_model(files, tmp_path) -> None:
    backend, out = FakeBackend(tmp_path / "log"), tmp_path / "out"
    summary = run_study(study(files), out, progress=False, backend=backend)
    assert (summary.done, summary.failed) == (4, [])
    cells = {cell.spec["method"]: cell for cell in results(out).cells}
    assert list(cells) == ["fp32", "their", "logits", "minmax"]
    their = cells["their"]
    assert (their.spec["bits"], their.spec["method_name"], their.spec["calibration"]) == ("W8A8", "foreign:onnx", None)
    assert their.result["change"]["id"]["nll"] != 0
    assert their.result["foreign"]["sha256"] == their.spec["options"]["sha256"]
    assert cells["logits"].spec["bits"] == "unknown"
    assert cells["logits"].result["bits"] is None
    assert cells["logits"].result["change"]["id"]["nll"] == pytest.approx(0, abs=1e-6)

    found = ql.compare(f"{out}:bits=FP32", f"{out}:method=their", resamples=200)
    assert {one.path: one for one in found.groups[0].metrics}["id.nll"].low is not None
    rows = list(csv.DictReader(io.StringIO(results(out).to_csv())))
    assert {row["method"] for row in rows} == set(cells)
    assert "their" in write_report(out, tmp_path / "report.html").read_text()

    before = backend.ended()
    write(tmp_path / "their.onnx")  # another file under the same name: its cell alone runs again
    run_study(study(files), out, progress=False, backend=backend)
    assert len(backend.ended()) == len(before) + 1
    assert backend.ended()[-1].startswith("fake foreign:onnx")


def test_the_estimate_and_the_cell_alone(files, tmp_path) -> None:
    backend = FakeBackend(tmp_path / "log")
    found = estimate(study(files), tmp_path / "out", backend=backend, progress=False)
    assert set(found.models["fake"].kinds) == {"FP32", "their", "logits"}  # the pilot of minmax wants 16 images
    run_study(study(files), tmp_path / "out", progress=False, backend=backend)
    entry = next(e for e in open_side(tmp_path / "out").entries if e.method == "their")
    part = _part(study(files), entry)
    assert [one.title for one in part.models[0].foreign] == ["their"]
    assert run_study(part, tmp_path / "alone", progress=False, backend=backend).done == 2


def test_mistakes(files, tmp_path) -> None:
    with pytest.raises(BadWeightsError, match=r"absent\.onnx does not exist"):
        run_study(study(["absent.onnx"]), tmp_path / "o", progress=False, backend=FakeBackend(tmp_path / "log"))
    with pytest.raises(QuantlensError, match="is none of"):
        parse_config({**study(files).to_dict(), "models": [{"name": "f", "foreign": ["a.txt"]}]})
    with pytest.raises(QuantlensError, match="two methods or files are called 'minmax'"):
        study([{"file": files[1], "label": "minmax"}])
