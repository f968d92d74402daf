"""examples/serving: an exported file without quantlens, in Python and in C++, alone and under load."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import quantlens as ql

pytest.importorskip("onnxruntime")
SERVING = Path(__file__).resolve().parents[1] / "examples" / "serving"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    model = ql.load_model("digits-vit")
    q = ql.quantize(
        model, "embedded:digits-calibration?n=8&seed=0", method="minmax", bits="W8A8", target="onnxruntime-cpu"
    )
    path = tmp_path_factory.mktemp("served") / "digits.onnx"
    return ql.Artefact(ql.export(q, path, guard_images="embedded:digits-fit?n=32&seed=0"), threads=1)


@pytest.fixture
def example(monkeypatch):
    """A module of examples/serving, by its name."""
    monkeypatch.syspath_prepend(str(SERVING))
    return importlib.import_module


@pytest.fixture
def pictures():
    generator = np.random.default_rng(0)
    sizes = ((32, 32), (45, 33), (31, 90), (200, 121))
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def test_it_says_what_quantlens_says(artefact, example, pictures):
    classifier = example("classify").Classifier(str(artefact.path))
    images = np.stack([classifier.prepare(picture) for picture in pictures])
    expected = artefact.preprocess.normalize(np.stack([artefact.pixels(picture) for picture in pictures]))
    np.testing.assert_allclose(images, expected, atol=1e-6)
    assert classifier(images) == [(p.name, pytest.approx(p.probability), p.unknown) for p in artefact.predict(pictures)]
    assert any(unknown for *_, unknown in classifier(images))


def test_a_transform_that_it_does_not_have_is_refused(artefact, example, monkeypatch):
    module = example("classify")
    monkeypatch.setattr(module, "UNUSUAL", {"input_size"})
    with pytest.raises(SystemExit, match="does not do"):
        module.Classifier(str(artefact.path))


def test_results_under_load_are_those_alone(artefact, example):
    classifier = example("classify").Classifier(str(artefact.path))
    found = example("load").measure(classifier, clients=4, batch=4, seconds=0.5)
    assert found["equal_labels"] > 0.98  # a code at its border may be rounded the other way in a batch
    assert found["largest_difference"] < 0.1
    assert 1 <= found["mean_batch"] <= 4


def test_answers_that_are_not_its_own_are_seen(artefact, example):
    """Whoever mixes up the answers of a batch must not pass."""
    classifier = example("classify").Classifier(str(artefact.path))

    class Mixed:
        transform = classifier.transform

        def __call__(self, images):
            return [("another", 0.0, False)] * len(images) if len(images) > 1 else classifier(images)

    assert example("load").measure(Mixed(), clients=4, batch=4, seconds=0.3)["equal_labels"] < 0.9


@pytest.mark.slow
def test_in_cpp(artefact, example, pictures, tmp_path):
    """$ONNXRUNTIME_INCLUDE holds the C++ headers of ONNX Runtime, which its package for Python lacks."""
    headers, compiler = os.environ.get("ONNXRUNTIME_INCLUDE"), shutil.which("g++")
    library = next(iter((Path(sys.modules["onnxruntime"].__file__).parent / "capi").glob("libonnxruntime.so.*")), None)
    if not headers or not compiler or library is None:
        pytest.skip("needs g++, ONNX Runtime's shared library and its headers ($ONNXRUNTIME_INCLUDE)")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(library)
    command = [compiler, "-std=c++17", str(SERVING / "classify.cpp"), f"-I{headers}", f"-L{tmp_path}", "-lonnxruntime"]
    subprocess.run([*command, f"-Wl,-rpath,{tmp_path}", "-o", str(tmp_path / "classify")], check=True)
    classifier = example("classify").Classifier(str(artefact.path))
    images = np.stack([classifier.prepare(picture) for picture in pictures])
    images.tofile(tmp_path / "images.f32")
    run = [str(tmp_path / "classify"), str(artefact.path), str(tmp_path / "images.f32")]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    predictions = artefact.predict(pictures)
    assert [line.split()[0] for line in lines] == [str(p.label) for p in predictions]
    assert [line.split()[2] for line in lines] == ["unknown" if p.unknown else "known" for p in predictions]
    np.testing.assert_allclose([float(line.split()[1]) for line in lines], [p.score for p in predictions], rtol=1e-4)
