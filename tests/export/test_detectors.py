"""Detectors as files: logits, boxes and scores, and how parity is told."""

from __future__ import annotations

import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import quantlens as ql
from quantlens.data import Preprocess
from quantlens.errors import BadWeightsError
from quantlens.evaluation.objects import find_objects
from quantlens.export.parity import parity
from quantlens.formats import GroupAffine
from quantlens.qmodel.in_float import in_float, said_in_float

onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")
pytest.importorskip("openvino", reason="the deploy extra is not installed")


class Detector(nn.Module):
    """Queries that attend to patches. It also returns what only training reads, by a layer of its own."""

    def __init__(self, columns):
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 16, 8, 8), nn.MultiheadAttention(16, 2, batch_first=True)
        self.queries, self.auxiliary = nn.Parameter(torch.randn(1, 6, 16)), nn.Linear(16, 700)
        self.classes, self.sides = nn.Linear(16, columns), nn.Linear(16, 20)
        self.steps = nn.Parameter(torch.linspace(0, 1, 5))

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        queries = self.queries.expand(len(images), -1, -1)
        queries = queries + self.attention(queries, tokens, tokens, need_weights=False)[0]
        sides = nn.functional.linear(
            self.sides(queries).unflatten(-1, (4, 5)).softmax(-1), self.steps
        )  # as D-FINE does
        found = {"logits": 3 * self.classes(queries), "pred_boxes": sides}
        return {"auxiliary": self.auxiliary(tokens), **found}


def detector(columns, names=None):
    torch.manual_seed(0)
    preprocess = Preprocess((3, 32, 32), resize=(32, 32), crop_pct=1.0)
    model = ql.load_model(Detector(columns).eval(), preprocess=preprocess, name="boxes", class_names=names)
    return model, torch.randn(10, 3, 32, 32)


@pytest.mark.parametrize(
    ("names", "ending"),
    [(None, "onnx"), (None, "xml"), (None, "pt2"), (["a", "b", "c"], "onnx"), (["a", "b", "c"], "xml")],
)
def test_a_file_gives_logits_boxes_and_scores(names, ending, tmp_path):
    model, images = detector(4, names)
    qmodel = ql.quantize(model, images, method="minmax", bits="W8A8", target="openvino-cpu")
    exported = ql.Artefact(ql.export(qmodel, tmp_path / f"m.{ending}"))
    expected, found = qmodel.outputs(images), exported.values(images.numpy())
    assert set(found) == {"logits", "boxes", "scores"}
    torch.testing.assert_close(torch.from_numpy(found["boxes"]), expected.boxes, atol=0.01, rtol=0)
    logits = torch.from_numpy(found["logits"])
    torch.testing.assert_close(logits, expected.logits, atol=0.1, rtol=0)
    scores = logits.softmax(-1)[..., :-1] if names else logits.sigmoid()
    torch.testing.assert_close(torch.from_numpy(found["scores"]), scores)
    assert (exported.task, exported.detection_head) == ("detect", qmodel.detection_head)
    assert exported.num_classes == scores.shape[-1]
    assert exported.outputs(images).boxes.shape == (10, 6, 4)


def test_a_file_puts_boxes_of_a_letterbox_into_the_picture(tmp_path):
    """What is found in the middle of a wide picture lies there, whatever is to its left and right."""
    model, _ = detector(4)
    model = ql.load_model(model.module, preprocess=model.preprocess, letterbox=True)
    middle = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 48, 3), dtype=np.uint8))
    exported = ql.Artefact(ql.export(model, tmp_path / "m.onnx"))
    pictures = [middle, middle.rotate(90, expand=True)]
    given = [find_objects(one, pictures, threshold=0) for one in (model, exported)]
    expected, found = ([np.array([o.box for o in objects]) for objects in one] for one in given)
    for own, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose(own, theirs, atol=1e-3)
    with torch.no_grad():
        boxes = model.module(model.preprocess(middle)[None])["pred_boxes"][0].numpy()
    x, y, width, height = boxes.T * 48  # the longer side fills the input, and 12 pixels lie above
    corners = np.stack([x - width / 2, y - height / 2 - 12, x + width / 2, y + height / 2 - 12], 1)
    apart = np.abs(found[0][:, None] - corners).max(-1)
    assert max(apart.min(0).max(), apart.min(1).max()) < 0.01


def test_pytorch_alone_opens_a_detector(tmp_path):
    """The batch is free, the simulation's values are given, and nothing is kept that only other outputs need."""
    model, images = detector(4, ["a", "b", "c"])
    qmodel = ql.quantize(model, images, method="minmax", bits="W4A4")
    path = ql.export(qmodel, tmp_path / "m.pt2", simulate=True)
    program = torch.export.load(path)
    assert not any(700 in value.shape for value in program.state_dict.values())
    for n in (1, 3):
        found, expected = program.module()(images[:n]), qmodel.outputs(images[:n])
        assert list(found) == ["logits", "boxes", "scores"]
        assert torch.equal(found["logits"], expected.logits)
        assert torch.equal(found["boxes"], expected.boxes)
        torch.testing.assert_close(found["scores"], expected.logits.softmax(-1)[..., :-1])
    same = parity(qmodel, ql.Artefact(path), images)
    assert (same.agreement, same.matched_iou, same.worst) == (1, pytest.approx(1), 0)


@pytest.mark.parametrize("part", ["inputs", "weights"])
def test_a_program_with_other_objects_than_tensors_is_not_opened(part, tmp_path):
    """One that says it is ours, with a pickle in the place of example inputs, or weights said to be pickled."""
    model, images = detector(4)
    path = ql.export(ql.quantize(model, images, method="minmax", bits="W8A8"), tmp_path / "m.pt2", simulate=True)
    ran = tmp_path / "ran"

    class Wrong:
        def __reduce__(self):
            return pathlib.Path.touch, (ran,)

    evil = pickle.dumps(Wrong())
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(tmp_path / "n.pt2", "w") as made:
        for name in given.namelist():
            data = given.read(name)
            if part == "inputs" and name.endswith(".pt"):
                data = evil
            if part == "weights":
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true') if b"config" in data else data
                data = evil if name.endswith("/weight_0") else data
            made.writestr(name, data)
    with pytest.raises(BadWeightsError, match="cannot be run by PyTorch"):
        ql.Artefact(tmp_path / "n.pt2")
    assert not ran.exists()


def test_a_program_of_another_tool_is_not_opened(tmp_path):
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)
    with pytest.raises(BadWeightsError, match=r"not written by `quantlens export`.*torch.export.load"):
        ql.Artefact(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadWeightsError, match="cannot be run by PyTorch"):
        ql.Artefact(path)


@pytest.mark.parametrize(
    ("key", "size", "axis", "tries"),
    [("patches.input", 3, -3, 3), ("attention.scores.k", 8, -2, 3), ("sides.input", 8, -1, 1)],
)
def test_ranges_found_at_run_time_are_simulated(key, size, axis, tries, tmp_path):
    """Of maps, keys and tokens, one at a time: the last bit of a sum moves codes after it."""
    model, images = detector(4)
    qmodel = ql.quantize(model, images, method="quantlens-fast", bits="W8A4", group_size=8)
    assert qmodel.plan.quantizers["sides.input"].kind == "group-affine"
    qmodel.plan.quantizers.clear()
    qmodel.plan.quantizers[key] = GroupAffine(1 / 15, 4, size, axis=axis, tries=tries)
    found = ql.Artefact(ql.export(qmodel, tmp_path / "m.onnx", simulate=True)).values(images.numpy())
    torch.testing.assert_close(torch.from_numpy(found["boxes"]), qmodel.outputs(images).boxes, atol=1e-5, rtol=1e-4)


def test_what_only_other_outputs_need_is_not_in_the_file(tmp_path):
    model, _ = detector(4)
    file = onnx.load(ql.export(model, tmp_path / "m.onnx"))
    assert not any("auxiliary" in constant.name for constant in file.graph.initializer)


def test_what_stays_in_float_is_told():
    model, images = detector(4)
    bits = {"default": "W8A8", "sides": "FP32"}
    qmodel = ql.quantize(model, images, method="minmax", bits=bits, target="openvino-cpu")
    assert in_float(qmodel) == {
        "softmax": 2,  # of attention, and of the distribution of a side
        "products of attention": 2,
        "sums and products by element": 3,
        "linear layers (sides)": 1,
        "linear layers": 1,  # the mean of that distribution, whose weight is a vector
    }
    assert said_in_float(qmodel).endswith("1 layers (sides)")
    assert "products of attention" not in in_float(ql.quantize(model, images, method="minmax"))


def test_parity_is_told_in_boxes(tmp_path):
    model, images = detector(4)
    exported = ql.Artefact(ql.export(model, tmp_path / "m.onnx"))
    found = parity(model, exported, images)
    assert (found.agreement, found.n) == (1, 10)
    assert found.matched_iou > 0.999
    assert found.map > 0.99
    assert "100.0 % of the boxes matched (mean IoU 1.0000, mAP" in found.sentence("runtime")
    with torch.no_grad():
        model.module.sides.bias[4] += 5  # other boxes than those of the file
    moved = parity(ql.load_model(model.module, preprocess=model.preprocess), exported, images)
    assert moved.agreement < 0.5
    assert moved.map < found.map
