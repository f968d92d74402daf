"""Detectors as models: found by what they give, their pictures and boxes as Hugging Face's processors have them."""

from __future__ import annotations

import json
import warnings
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import quantlens as ql
from quantlens.data import Preprocess
from quantlens.errors import QuantlensError, QuantlensWarning, UnsupportedError
from quantlens.models.detection import DetectionHead, letterbox, postprocess, square
from quantlens.models.huggingface import default_preprocess

SIZES = [(30, 50), (64, 40), (100, 7)]
GENERATOR = torch.Generator().manual_seed(3)
LOGITS = 2 * torch.randn(3, 6, 4, generator=GENERATOR)
BOXES = torch.rand(3, 6, 4, generator=GENERATOR)
PLAIN = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


class Boxer(nn.Module):
    """A detector of 5 queries and ``columns`` logits, that answers as a tuple, a dictionary or a named tuple.
    form: of its boxes."""

    def __init__(self, columns: int = 4, answer: str = "dict", form=None):
        super().__init__()
        self.form = form
        self.patch, self.columns, self.answer = nn.Conv2d(3, 5, 16, 16), columns, answer
        self.classify, self.locate = nn.Linear(4, columns), nn.Linear(4, 4)

    def forward(self, images):
        tokens = self.patch(images).flatten(2)
        logits, boxes = self.classify(tokens), self.locate(tokens).sigmoid()
        boxes = self.form(boxes) if self.form else boxes
        named = {"logits": logits, "pred_boxes": boxes}
        return {
            "dict": named,
            "tuple": (logits, boxes),
            "named": namedtuple("Found", named)(**named),
            "original": {"pred_boxes": boxes, "pred_logits": logits, "aux_outputs": [{"pred_boxes": boxes}]},
            "boxes only": {"logits": logits.mean(1), "pred_boxes": boxes},
        }[self.answer]


def boxer(**settings) -> Boxer:
    torch.manual_seed(0)
    return Boxer(**settings)


@pytest.mark.parametrize(
    ("processor", "scoring", "top"),
    [
        ("YolosImageProcessor", "softmax", 100),
        ("DetrImageProcessor", "softmax", 100),
        ("ConditionalDetrImageProcessor", "sigmoid", 100),
        ("DeformableDetrImageProcessor", "sigmoid", 100),
        ("RTDetrImageProcessor", "sigmoid", 6),
        ("RfDetrImageProcessor", "sigmoid", 6),
    ],
)
def test_boxes_are_those_of_the_processor(processor, scoring, top):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (quantlens[hf])")
    if not hasattr(transformers, processor):
        pytest.skip(f"this transformers has no {processor}")
    given = SimpleNamespace(logits=LOGITS, pred_boxes=BOXES)
    theirs = getattr(transformers, processor)().post_process_object_detection(given, 0.0, target_sizes=SIZES)
    labels = tuple("abcd"[: 4 - (scoring == "softmax")])
    found = postprocess(LOGITS, BOXES, SIZES, DetectionHead(scoring, labels), top=top, first=7)
    for i, expected in enumerate(theirs):
        own = found.image == i + 7
        order = np.argsort(-expected["scores"].numpy(), kind="stable")
        np.testing.assert_allclose(found.scores[own], expected["scores"].numpy()[order], rtol=1e-5)
        np.testing.assert_array_equal(found.labels[own], expected["labels"].numpy()[order])
        np.testing.assert_allclose(found.boxes[own], expected["boxes"].numpy()[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_best_come_first_and_no_more_than_asked_for(scoring):
    head = DetectionHead(scoring, ("a", "b", "c"))
    two, every = (postprocess(LOGITS, BOXES, SIZES, head, top=top) for top in (2, 1000))
    assert np.bincount(two.image).tolist() == [2, 2, 2]
    for i in range(3):
        assert (np.diff(every.scores[every.image == i]) <= 0).all()
        np.testing.assert_array_equal(two.boxes[two.image == i], every.boxes[every.image == i][:2])


@pytest.mark.parametrize("size", [(60, 60), (90, 31), (17, 90), (5, 4)])
@pytest.mark.parametrize("fit", [square, letterbox])
def test_boxes_lie_where_the_object_is_in_the_picture(fit, size):
    """An object is drawn into a picture; its place in the prepared image, as fractions, gives its place again."""
    height, width = size
    drawn = np.zeros((height, width, 3), np.uint8)
    box = np.array([width // 4, height // 5, width - 1, height - 2])
    drawn[box[1] : box[3], box[0] : box[2]] = 255
    preprocess = fit(Preprocess((3, 96, 128), **PLAIN))
    image = preprocess.normalize(preprocess.resize_crop(Image.fromarray(drawn)))[0]
    rows, columns = (np.flatnonzero((image > 0.5).any(dim).numpy()) for dim in (1, 0))
    low, high = np.array([columns[0], rows[0]]), np.array([columns[-1], rows[-1]]) + 1
    boxes = torch.tensor([[[*((low + high) / 2 / [128, 96]), *((high - low) / [128, 96])]]])
    resize = "letterbox" if fit is letterbox else "square"
    head = DetectionHead("sigmoid", ("object",), resize, (96, 128))
    found = postprocess(torch.zeros(1, 1, 1), boxes, [size], head)
    pixel = max(height / 96, width / 128) if fit is letterbox else np.tile([width / 128, height / 96], 2)
    assert (np.abs(found.boxes[0] - box) <= 1.5 * pixel + 0.5).all()


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(QuantlensError, match=r"\[3, 6, 4\].*\[3, 5, 4\] and 3 sizes"):
        postprocess(LOGITS, BOXES[:, :5], SIZES, DetectionHead("sigmoid", ()))
    with pytest.raises(QuantlensError, match="scoring 'sotfmax'"):
        DetectionHead("sotfmax", ())


@pytest.mark.parametrize("answer", ["dict", "tuple", "named", "original"])
def test_a_module_that_gives_scores_and_boxes_is_a_detector(answer):
    module = boxer(answer=answer)
    model = ql.load_model(
        module, preprocess=square(Preprocess((3, 32, 32), **PLAIN)), class_names=["cat", "dog", "owl"]
    )
    assert model.task == "detect"
    assert model.detection_head == DetectionHead("softmax", ("cat", "dog", "owl"), "square", (32, 32))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    qmodel = ql.quantize(model, images, method="minmax", bits="W8A8")
    given = module(images)
    names = ("pred_logits" if answer == "original" else "logits", "pred_boxes")
    logits, boxes = (given[name] for name in names) if isinstance(given, dict) else given
    found = qmodel.outputs(images)
    assert found.features is None
    torch.testing.assert_close(found.logits, logits, atol=0.1, rtol=0.1)
    torch.testing.assert_close(found.boxes, boxes, atol=0.05, rtol=0.1)
    assert (qmodel.task, qmodel.detection_head, qmodel.num_classes) == ("detect", model.detection_head, 3)


def test_as_many_logits_as_names_are_sigmoids_and_unnamed_classes_have_numbers():
    prepared = letterbox(Preprocess((3, 32, 32), **PLAIN))
    named = ql.load_model(boxer(), preprocess=prepared, class_names=list("abcd")).detection_head
    with pytest.warns(QuantlensWarning, match="have no names: its 4 logits are taken for sigmoids of 4 classes"):
        unnamed = ql.load_model(boxer(), preprocess=prepared).detection_head
    assert named == DetectionHead("sigmoid", tuple("abcd"), "letterbox", (32, 32))
    assert unnamed.labels == tuple("0123")


def test_a_letterbox_takes_the_place_of_a_stretched_picture():
    prepared = square(Preprocess((3, 32, 32), **PLAIN))
    model = ql.load_model(boxer(), preprocess=prepared, letterbox=True)
    assert model.preprocess == letterbox(prepared)
    assert model.detection_head.resize == "letterbox"
    with pytest.raises(UnsupportedError, match="a letterbox is for detectors, and digits-vit has the task 'classify'"):
        ql.load_model("digits-vit", letterbox=True)


def test_what_is_no_detector_is_refused():
    with pytest.raises(UnsupportedError, match="class logits"):
        ql.load_model(boxer(answer="boxes only"), preprocess=square(Preprocess((3, 32, 32))), task="detect")
    with pytest.raises(UnsupportedError, match="crops pictures"):
        ql.load_model(boxer(), preprocess=Preprocess((3, 32, 32)))


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


SMALL = torch.tensor([[0.2, 0.3, 0.1, 0.2], [0.8, 0.3, 0.2, 0.1], [0.7, 0.9, 0.2, 0.1], [0.1, 0.9, 0.1, 0.1]] * 2)[:5]


@pytest.mark.parametrize(
    ("form", "example"),
    [
        (lambda boxes: boxes * 32, "pixels"),
        (lambda boxes: corners(boxes) * 32, "corners in pixels"),
        (lambda boxes: boxes.logit() - 2, "before the sigmoid"),
    ],
)
def test_boxes_that_are_no_fractions_of_the_input_are_refused(form, example):
    with pytest.raises(
        UnsupportedError, match=r"gives boxes such as .*\(centre x, centre y, width, height as fractions"
    ):
        ql.load_model(boxer(form=form), preprocess=square(Preprocess((3, 32, 32))), class_names=["a", "b", "c"])


@pytest.mark.parametrize("form", [corners, lambda boxes: boxes])
def test_corners_are_told_of_and_centres_are_not(form):
    module = boxer(form=lambda boxes: form(SMALL.expand_as(boxes)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ql.load_model(module, preprocess=square(Preprocess((3, 32, 32))), class_names=["a", "b", "c"])
    assert ["look like corners" in str(one.message) for one in told] == ([True] if form is corners else [])


@pytest.mark.parametrize("names", [["a"], list("abcde")])
def test_names_of_other_classes_than_a_detector_has_are_refused(names):
    with pytest.raises(UnsupportedError, match="give 4 names, or 3 where the last logit is 'no object'"):
        ql.load_model(boxer(), preprocess=square(Preprocess((3, 32, 32))), class_names=names)


def test_an_assumed_preprocessing_does_not_crop():
    with pytest.warns(QuantlensWarning, match="does not say how"):
        model = ql.load_model(boxer(), input_size=32)
    assert model.preprocess.resize == (32, 32)


def test_the_head_is_kept_in_a_checkpoint(tmp_path):
    model = ql.load_model(boxer(), preprocess=square(Preprocess((3, 32, 32), **PLAIN)), class_names=["a", "b", "c"])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    qmodel = ql.quantize(model, images, method="minmax", bits="W4A8")
    again = ql.load(qmodel.save(tmp_path / "q.safetensors"))
    assert again.detection_head == qmodel.detection_head == model.detection_head
    found, expected = again.outputs(images), qmodel.outputs(images)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.boxes, expected.boxes)


@pytest.mark.parametrize(("size", "side"), [({"shortest_edge": 40, "longest_edge": 66}, 40), (None, 32)])
def test_a_folder_is_a_detector_whose_processor_makes_squares(tmp_path, size, side):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (quantlens[hf])")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    small |= {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 3}
    names = {0: "N/A", 1: "cat", 2: "dog"}
    module = transformers.YolosForObjectDetection(transformers.YolosConfig(**small, id2label=names)).eval()
    module.save_pretrained(tmp_path)
    if size is not None:
        processor = transformers.YolosImageProcessor(size=size, image_mean=[0.4] * 3)
        processor.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if size else "ignore", QuantlensWarning)
        model = ql.load_model(f"hf:{tmp_path}")
    assert (model.task, model.class_names) == ("detect", list(names.values()))
    assert model.detection_head == DetectionHead("softmax", tuple(names.values()), "square", (side, side))
    assert model.preprocess.resize == (side, side)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    if size is not None:
        theirs = processor(images=picture, size={"height": 40, "width": 40}, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(model.preprocess(picture), theirs, atol=0.02, rtol=0)
    assert ql.load_model(f"hf:{tmp_path}", input_size=48).detection_head.input_size == (48, 48)


def test_without_a_processor_dab_detr_has_the_pictures_of_conditional_detr():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (quantlens[hf])")
    found = []
    for name in ("DabDetr", "ConditionalDetr"):
        module = type(f"{name}ForObjectDetection", (nn.Module,), {})()
        module.config = getattr(transformers, f"{name}Config")()
        found.append(default_preprocess(module))
    assert found[0] == found[1]
    assert found[0].resize == (800, 800)


def test_a_backbone_of_timm_is_not_asked_for(tmp_path):
    """DETR as it was first published names it; its weights lie in the folder, and the hub is left alone."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (quantlens[hf])")
    backbone = {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4], "use_pretrained_backbone": False}
    small = {"encoder_layers": 1, "encoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    small |= {"decoder_layers": 1, "decoder_ffn_dim": 8, "d_model": 8, "num_queries": 3, "num_labels": 2}
    torch.manual_seed(0)
    config = transformers.DetrConfig(backbone_config={"model_type": "timm_backbone", **backbone}, **small)
    module = transformers.DetrForObjectDetection(config).eval()
    module.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text()) | {"backbone_config": None, "backbone": "test_resnet"}
    told |= {"use_timm_backbone": True, "use_pretrained_backbone": True}
    told |= {"backbone_kwargs": {"in_chans": 3, "out_indices": [1, 2, 3, 4]}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantlensWarning)
        model = ql.load_model(f"hf:{tmp_path}", input_size=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert model.detection_head.scoring == "softmax"
    torch.testing.assert_close(model(images).pred_boxes, module(images).pred_boxes)
