"""Files that are cut off, changed, exchanged, of another tool or of another version: one sentence each that says what
is wrong, whatever opens them."""

from __future__ import annotations

import json
import re
import types
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

import quantlens as ql
from quantlens.errors import BadWeightsError, QuantlensError
from quantlens.export import runtimes
from quantlens.export.digest import matches
from quantlens.export.export import export
from quantlens.export.exported import Artefact
from quantlens.qmodel import float_model

onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")


@pytest.fixture(scope="module")
def made(loaded, tmp_path_factory):
    """A float model, and its file."""
    model = float_model(loaded["vit"])
    return model, export(model, tmp_path_factory.mktemp("damaged") / "m.onnx")


def _run(path):
    """What `predict`, `evaluate` and `bench` do first."""
    artefact = Artefact(path, threads=1)
    return artefact.predict([Image.new("RGB", (9, 9))])


def _sentence(path, model, *, verified=True):
    """What is said by what runs a file and by `verify`."""
    with pytest.raises(BadWeightsError) as error:
        _run(path)
    said = str(error.value)
    if verified:
        with suppress(BadWeightsError):
            assert not ql.verify(path, model).ok
    assert path.stem in said
    assert "\n" not in said
    return said


# ---- the bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: data[:9], "cut off"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: b"", "it is empty"),
        (lambda data: bytes(100), "no ONNX file"),
        (lambda data: b"<html>", "a web page"),
        (lambda data: np.random.default_rng(0).bytes(500), "no ONNX file"),
    ],
    ids=["half", "beginning", "last byte", "empty", "zeros", "page", "random"],
)
def test_what_is_no_whole_file(made, tmp_path, change, words):
    model, path = made
    other = tmp_path / "other.onnx"
    other.write_bytes(change(path.read_bytes()))
    assert words in _sentence(other, model)


def test_no_changed_bit_goes_unnoticed(made, tmp_path):
    _, path = made
    data, generator = path.read_bytes(), np.random.default_rng(1)
    for place in generator.integers(0, len(data) - 76, 40):  # the last 76 bytes are the digest
        changed = bytearray(data)
        changed[place] ^= 1 << generator.integers(8)
        (tmp_path / "m.onnx").write_bytes(changed)
        try:
            found = matches(tmp_path / "m.onnx")
        except BadWeightsError:
            found = False
        assert found is False, place


def test_a_file_written_again_is_the_same(made, tmp_path):
    """By a tool that changes nothing, in the order of its own."""
    _, path = made
    proto = onnx.load(path)
    onnx.save(proto, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() != path.read_bytes()
    assert matches(tmp_path / "again.onnx") is True
    proto.graph.initializer[0].name += "x"
    onnx.save(proto, tmp_path / "again.onnx")
    assert matches(tmp_path / "again.onnx") is False
    proto.producer_name = "another tool"
    onnx.save(proto, tmp_path / "again.onnx")
    assert matches(tmp_path / "again.onnx") is None, "which may keep the metadata of what it reads"


# ---- the record ------------------------------------------------------------------------------------------------------


def _with_record(path, out, **changes):
    """The file as an earlier release wrote it, without a digest, with changes of its record (None: left out)."""
    proto = onnx.load(path)
    record = {entry.key: entry.value for entry in proto.metadata_props if "sha256" not in entry.key} | changes
    onnx.helper.set_model_props(proto, {key: value for key, value in record.items() if value is not None})
    onnx.save(proto, out)
    return out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": None}, "not written by `quantlens export`"),
        ({"plan": "{"}, "plan is no JSON"),
        ({"plan": "[]"}, "plan is"),
        ({"plan": '{"calibration": "x"}'}, "calibration is"),
        ({"plan": '{"class_names": ["a"]}'}, "names 1 classes and gives 10"),
        ({"plan": '{"detection_head": {"a": 1}}'}, "its boxes"),
        ({"preprocess": None}, "no preprocess"),
        ({"preprocess": '{"mean": [1]}'}, "mean"),
        ({"preprocess": "{}"}, "cannot be run on images"),
        ({"guard": None}, "no guard"),
        ({"guard": "null"}, "guard is"),
        ({"guard": "{}"}, "no score"),
        ({"guard": '{"score": "energy", "threshold": 3}'}, "threshold is 3"),
        ({"guard": '{"score": "energy", "threshold": {"value": "x"}}'}, "threshold is"),
        ({"num_parameters": "many"}, "many"),
        ({"num_parameters": "-3"}, "-3"),
        ({"task": "guess"}, "guess"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_record_that_is_missing_or_damaged(made, tmp_path, changes, words):
    other = _with_record(made[1], tmp_path / "other.onnx", **changes)
    assert words in _sentence(other, made[0], verified=False)


def test_what_may_be_missing(made, tmp_path):
    """In files of earlier releases, and of models without parameters."""
    other = _with_record(made[1], tmp_path / "other.onnx", task=None, outputs=None, saturating=None, num_parameters="0")
    assert len(_run(other)) == 1
    assert Artefact(other).size_ratio is None


def test_outputs_of_another_graph(made, tmp_path):
    proto = onnx.load(made[1])
    proto.metadata_props.remove(next(entry for entry in proto.metadata_props if entry.key == "sha256"))
    proto.graph.node.append(onnx.helper.make_node("Identity", ["logits"], ["other"]))
    proto.graph.output[0].name = "other"
    onnx.save(proto, tmp_path / "other.onnx")
    assert "it gives other, score" in _sentence(tmp_path / "other.onnx", made[0], verified=False)


# ---- OpenVINO, PyTorch -----------------------------------------------------------------------------------------------


def test_an_xml_and_its_bin(made, loaded, tmp_path):
    pytest.importorskip("openvino", reason="the deploy extra is not installed")
    path, other = export(made[0], tmp_path / "m.xml"), export(loaded["deit3"], tmp_path / "o.xml")
    text, weights = path.read_text(), path.with_suffix(".bin").read_bytes()
    bare = re.sub(r'<sha256 value="\w+" />', "", text)
    flipped = bytes([weights[0] ^ 1]) + weights[1:]
    for xml, content, words in (
        (text, other.with_suffix(".bin").read_bytes(), "no pair"),
        (text, weights[:100], "no pair"),
        (text, flipped, "no pair"),
        (text.replace('offset="0"', 'offset="4"'), weights, "no pair"),
        (text, b"", "empty"),
        (text, None, "m.bin"),
        (bare, weights[:100], "OpenVINO"),
        (text[: len(text) // 2], weights, "OpenVINO"),
        ("<?xml version='1.0'?><svg/>", weights, "no model of OpenVINO"),
    ):
        path.write_text(xml)
        path.with_suffix(".bin").unlink(missing_ok=True)
        if content is not None:
            path.with_suffix(".bin").write_bytes(content)
        assert words in _sentence(path, made[0]), words
    path.write_text(bare.replace('<outputs value="[', '<outputs value="'))
    path.with_suffix(".bin").write_bytes(weights)
    assert len(_run(path)) == 1, "the names of the outputs are in the graph, too"


@pytest.mark.slow
def test_a_program_of_torch(made, tmp_path):
    path = export(made[0], tmp_path / "m.pt2")
    with zipfile.ZipFile(path) as parts:
        entries = [(entry.filename, parts.read(entry)) for entry in parts.infolist()]
        largest = max(parts.infolist(), key=lambda entry: entry.file_size)
    data = path.read_bytes()
    place = largest.header_offset + len(largest.filename) + 200
    (tmp_path / "flipped.pt2").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    (tmp_path / "cut.pt2").write_bytes(data[: len(data) // 2])
    assert "a checksum in it does not match" in _sentence(tmp_path / "flipped.pt2", made[0])
    assert "not a zip file" in _sentence(tmp_path / "cut.pt2", made[0])
    for part, content, words in (
        ("quantlens.json", None, "not written by"),
        ("quantlens.json", b"[]", "damaged"),
        ("quantlens.json", b"{}", "damaged"),
        ("models/model.json", None, "damaged"),
        ("weight_0", None, "damaged"),
    ):
        with zipfile.ZipFile(tmp_path / "changed.pt2", "w") as new:
            for name, held in entries:
                held = content if name.endswith(part) else held
                if held is not None:
                    new.writestr(name, held)
        assert words in _sentence(tmp_path / "changed.pt2", made[0]), (part, content)


# ---- the runtimes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), "is not installed: pip install"),
        (ImportError("libonnx.so: cannot open shared object file"), "cannot be imported (libonnx.so"),
        (types.SimpleNamespace(__version__="1.14.1"), "1.14.1 is too old, files need 1.20 or later"),
    ],
    ids=["missing", "broken", "old"],
)
def test_a_runtime_that_is_not_there(made, monkeypatch, found, words):
    def load(name):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(runtimes, "import_module", load)
    with pytest.raises(QuantlensError) as error:
        Artefact(made[1])
    assert words in str(error.value)
    assert "quantlens[deploy]" in str(error.value)


@pytest.mark.parametrize("change", ["opset", "ir"])
def test_a_file_of_a_later_version(made, tmp_path, change):
    proto = onnx.load(made[1])
    proto.metadata_props.remove(next(entry for entry in proto.metadata_props if entry.key == "sha256"))
    if change == "opset":
        proto.opset_import[0].version = 99
    else:
        proto.ir_version = 99
    onnx.save(proto, tmp_path / "later.onnx")
    said = _sentence(tmp_path / "later.onnx", made[0], verified=False)
    assert "it needs a later version" in said
    assert "99" in said
    assert "onnxruntime_src" not in said


def test_the_versions_that_are_needed_are_those_of_the_extra():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extra = dict(one.split(">=") for one in project["project"]["optional-dependencies"]["deploy"])
    assert extra == runtimes.OLDEST
