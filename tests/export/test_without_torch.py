"""A machine that has a runtime, and no torch: predictions, the OOD flag and timings, the same as elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import quantlens as ql
from quantlens.export.export import export

pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")

ABSENT = ("torch", "torchvision", "timm", "scipy", "sklearn", "safetensors", "altair", "jinja2", "yaml", "onnx")
RUN = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from quantlens.cli import main
for arguments in json.loads(sys.argv[1]):
    print("exit", main.run(arguments))
"""


def _run(*commands):
    """(exit codes, stdout, stderr) of commands, in one process without the packages."""
    source = str(Path(ql.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(absent=ABSENT), json.dumps([list(map(str, one)) for one in commands])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source, "COLUMNS": "200"},
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    codes = [int(line.removeprefix("exit ")) for line in lines if line.startswith("exit ")]
    return codes, "\n".join(line for line in lines if not line.startswith("exit ")), done.stderr


@pytest.fixture(scope="module")
def made(loaded, tmp_path_factory):
    """A file with a threshold, and a picture."""
    folder = tmp_path_factory.mktemp("small")
    images = torch.linspace(-1, 1, 20 * 3 * 32 * 32).sin().reshape(20, 3, 32, 32)
    path = export(loaded["vit"], folder / "m.onnx", guard="energy", guard_images=images)
    Image.linear_gradient("L").convert("RGB").save(folder / "a.png")
    return path, folder / "a.png"


def test_predictions_and_timings(made):
    path, picture = made
    artefact = ql.Artefact(path)
    expected = artefact.predict([picture])[0]
    logits = artefact(artefact.preprocess.normalize(artefact.pixels(picture)[None]))
    assert expected.probability == pytest.approx(float(logits.softmax(1).max()), rel=1e-5)
    codes, out, err = _run(("predict", path, picture, "--json"), ("bench", path, "--rounds", "3", "--json", "-", "-q"))
    assert codes == [0, 0], err
    decoder = json.JSONDecoder()
    (found,), end = decoder.raw_decode(out)
    (timing,) = decoder.raw_decode(out[end:].lstrip())[0]
    assert found["label"] == expected.label
    assert found["probability"] == pytest.approx(expected.probability, rel=1e-5)
    assert found["score"] == pytest.approx(expected.score, rel=1e-5)
    assert found["unknown"] is expected.unknown
    assert timing["median_ms"] > 0
    assert timing["memory_mb"] is not None, "measured in a process of its own"


def test_what_needs_more_says_so(made, tmp_path):
    path, picture = made
    codes, _, err = _run(
        ("predict", tmp_path / "absent.onnx", picture),
        ("predict", "scenes-detr", picture),
        ("evaluate", path, "--id", "embedded:digits-test"),
        ("bench", path, "--fp32", "digits-vit"),
    )
    assert codes == [2] * 4
    first, *others = err.strip().splitlines()
    assert "no exported model" in first
    assert len(others) == 3
    assert all("is not installed, and without it only classifiers" in one for one in others)
