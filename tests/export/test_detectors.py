"""Detectors as files: logits, boxes and scores, and how parity is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.data import Preprocess
from quantlens.export.parity import parity
from quantlens.formats import GroupAffine

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


@pytest.mark.parametrize("ending", ["onnx", "xml"])
@pytest.mark.parametrize(("columns", "names"), [(4, None), (4, ["a", "b", "c"])])
def test_a_file_gives_logits_boxes_and_scores(columns, names, ending, tmp_path):
    model, images = detector(columns, names)
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


@pytest.mark.parametrize(
    ("key", "size", "axis"), [("patches.input", 3, -3), ("attention.scores.k", 8, -2), ("sides.input", 8, -1)]
)
def test_ranges_found_at_run_time_are_simulated(key, size, axis, tmp_path):
    """Of maps, keys and tokens, one at a time: the last bit of a sum moves codes after it."""
    model, images = detector(4)
    qmodel = ql.quantize(model, images, method="quantlens-fast", bits="W8A4", group_size=8)
    assert qmodel.plan.quantizers["sides.input"].kind == "group-affine"
    qmodel.plan.quantizers.clear()
    qmodel.plan.quantizers[key] = GroupAffine(1 / 15, 4, size, axis=axis)
    found = ql.Artefact(ql.export(qmodel, tmp_path / "m.onnx", simulate=True)).values(images.numpy())
    torch.testing.assert_close(torch.from_numpy(found["boxes"]), qmodel.outputs(images).boxes, atol=1e-5, rtol=1e-4)


def test_what_only_other_outputs_need_is_not_in_the_file(tmp_path):
    model, _ = detector(4)
    file = onnx.load(ql.export(model, tmp_path / "m.onnx"))
    assert not any("auxiliary" in constant.name for constant in file.graph.initializer)


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
