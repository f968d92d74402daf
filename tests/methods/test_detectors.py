"""Methods on detectors: every one, by its plan, its file and its boxes."""

from __future__ import annotations

import pytest
import torch
from hf_detectors import small
from torch import nn

import quantlens as ql
from quantlens.methods import registry
from quantlens.metrics.divergence import BOX_WEIGHT, box_error, box_shift, objects_of

SETTINGS = {"iterations": 4, "steps": 4, "views_per_image": 1}


class Boxes(nn.Module):
    """Class logits and boxes of 4 queries; no gradient of the logits comes to the layers that make the boxes."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8)
        self.classify, self.place, self.last = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, images):
        x = self.norm(self.patch(images).flatten(2).mT)
        return {"logits": self.classify(x), "pred_boxes": self.last(self.place(x).relu()).sigmoid()}


def check(module, images, method: str, bits: str, tmp_path) -> None:
    """All layers have quantizers, boxes and scores are near the float model's, and the file gives them again."""
    options = {name: SETTINGS[name] for name in SETTINGS.keys() & registry.get(method).info.options.keys()}
    qmodel = ql.quantize(module, images, method=method, bits=bits, **options)
    quantized = {key.rpartition(".")[0] for key in qmodel.plan.quantizers if key.endswith(".weight")}
    assert {site.name for site in qmodel.graph.sites.of_kind("linear", "conv")} <= quantized
    found, again = qmodel.outputs(images), ql.load(qmodel.save(tmp_path / "q.safetensors")).outputs(images)
    assert torch.equal(found.logits, again.logits)
    assert torch.equal(found.boxes, again.boxes)
    with torch.no_grad():
        expected = module(images)
    share = {"W8A8": 0.2, "W4A4": 0.8}[bits]  # some methods are trained for four steps only
    for value, wanted in ((found.logits, expected["logits"]), (found.boxes, expected["pred_boxes"])):
        assert float((value - wanted).norm()) < share * float((wanted - wanted.mean()).norm())


@pytest.mark.parametrize("method", ["ptq4vit", "minmax"])
def test_layers_that_scores_do_not_depend_on_are_quantized(method, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    check(Boxes().eval(), images, method, "W8A8", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", registry.available())
@pytest.mark.parametrize(("family", "bits"), [("yolos", "W8A8"), ("detr", "W4A4")])
def test_every_method_quantizes_a_detector(family, method, bits, tmp_path):
    pytest.importorskip("transformers")
    check(*small(family), method, bits, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "repq-vit", "quantlens-fast", "fq-ptq"])
@pytest.mark.parametrize("family", ["conditional-detr", "deformable-detr", "rt-detr-v2-discrete", "d-fine", "rf-detr"])
def test_other_families(family, method, tmp_path):
    """Their best queries are chosen anew (top-k), so that boxes change places: only the file is compared."""
    pytest.importorskip("transformers")
    module, images = small(family)
    qmodel = ql.quantize(module, images, method=method, bits="W8A8")
    found, again = qmodel.outputs(images), ql.load(qmodel.save(tmp_path / "q.safetensors")).outputs(images)
    assert torch.equal(found.logits, again.logits)
    assert torch.equal(found.boxes, again.boxes)
    assert all(torch.isfinite(value).all() for value in (found.logits, found.boxes))


def test_the_heads_of_a_detector_have_bits_of_their_own():
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    qmodel = ql.quantize(Boxes().eval(), images, method="minmax", bits="W4A4", head_bits=8)
    heads = {key: q.bits for key, q in qmodel.plan.quantizers.items() if not key.startswith("patch")}
    assert set(heads) == {f"{name}.{edge}" for name in ("classify", "place", "last") for edge in ("input", "weight")}
    assert set(heads.values()) == {8}
    assert qmodel.plan.quantizers["patch.weight"].bits == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", registry.available())
@pytest.mark.parametrize("name", ["scenes-yolos", "scenes-rtdetr"])
def test_every_method_runs_on_the_detectors_that_ship(name, method):
    options = {name: SETTINGS[name] for name in SETTINGS.keys() & registry.get(method).info.options.keys()}
    images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    qmodel = ql.quantize(ql.load_model(name), images, method=method, bits="W4A4", **options)
    found = qmodel.outputs(torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    assert all(torch.isfinite(value).all() for value in (found.logits, found.boxes))


@pytest.mark.slow
def test_narrow_activations_of_a_detector_have_ranges_by_group(tmp_path):
    """Also those of convolutions; and no rotations come before them, only means of keys, which softmax does not see."""
    pytest.importorskip("transformers")
    module, images = small("detr")
    said = {bits: ql.quantize(module, images, method="fast", bits=bits) for bits in ("W4A4", "W4A8")}
    narrow = said["W4A4"].plan.quantizers
    grouped = {key for key, quantizer in narrow.items() if quantizer.kind == "group-affine"}
    convolutions = {f"{site.name}.input" for site in said["W4A4"].graph.sites.of_kind("conv")}
    assert len(grouped & convolutions) > len(convolutions) / 2
    assert {narrow[key].axis for key in grouped} == {-1, -2, -3}
    assert said["W4A4"].plan.rewrites == ["means taken out of 3 keys"]
    assert "rotated" in said["W4A8"].plan.rewrites[0]
    assert not any(quantizer.kind == "group-affine" for quantizer in said["W4A8"].plan.quantizers.values())


def shift(module, qmodel, images) -> float:
    with torch.no_grad():
        expected, found = module(images), qmodel.outputs(images)
    return float(box_shift(found.boxes, expected["pred_boxes"], objects_of(expected["logits"], False)))


def test_training_makes_boxes_better_too():
    torch.manual_seed(0)
    module = Boxes().eval()
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {"method": "quantlens-best", "bits": "W3A4", "views_per_image": 0.0}
    start, trained = (ql.quantize(module, images, iterations=n, **options) for n in (0, 200))
    assert shift(module, trained, images) < 0.9 * shift(module, start, images)
    assert [part["unit"] for part in trained.plan.notes["reconstruction"]] == ["network"], "trained as a whole"


def test_the_error_of_boxes_counts_in_their_size_where_there_is_an_object():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.1, 0.1]]])
    objects = torch.tensor([[1.0, 0.0]])
    moved = boxes + torch.tensor([0.02, 0.0, 0.0, 0.0])
    assert float(box_error(moved, boxes, objects)) == pytest.approx(BOX_WEIGHT * 0.1**2, rel=1e-4)
    assert float(box_shift(moved, boxes, objects)) == pytest.approx(BOX_WEIGHT * 0.1, rel=0.1)
    other = boxes + torch.tensor([0.0, 0.02, 0.0, 0.0])
    assert float(box_error(other, boxes, objects)) == pytest.approx(BOX_WEIGHT * 0.05**2, rel=1e-4)
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])
    softmax, sigmoid = objects_of(logits, False), objects_of(logits, True)
    torch.testing.assert_close(softmax, 1 - logits.softmax(-1)[..., -1])
    torch.testing.assert_close(sigmoid, logits.sigmoid().amax(-1))
