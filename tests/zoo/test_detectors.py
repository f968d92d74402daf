"""The zoo's detectors: they can be captured, learn from what they should, and training goes on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from quantlens import zoo
from quantlens.data.scenes import CLASSES
from quantlens.graph import capture
from quantlens.zoo.detector_losses import assign, average_precision, detection_loss, detections, overlaps
from quantlens.zoo.detector_training import (
    DETECTOR_RECIPES,
    DetectorRecipe,
    Run,
    fixed,
    follow,
    measure_detector,
    precision,
)
from quantlens.zoo.train import RECIPES, main

SMALL = {"dim": 16, "heads": 2, "queries": 9}
NARROW = {**SMALL, "widths": (8, 8, 16), "hidden": 16, "encoder": 1, "decoder": 2}
SETTINGS = {
    "scenes-yolos": {**SMALL, "patch": 12, "depth": 2},
    "scenes-detr": NARROW,
    "scenes-rtdetr": {**NARROW, "points": 2},
}


@pytest.fixture(scope="module")
def eight() -> tuple[torch.Tensor, ...]:
    return fixed(DETECTOR_RECIPES["scenes-detr"], "train", 8, 0)


@pytest.fixture
def _few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlens.zoo.detector_training.HELD_OUT", 32)


def small(name: str, **changes) -> DetectorRecipe:
    return replace(DETECTOR_RECIPES[name], settings=SETTINGS[name], batch_size=2, warmup=1, **changes)


@pytest.mark.parametrize("name", DETECTOR_RECIPES)
def test_detectors_fit_in_four_megabytes_and_answer_as_agreed(name: str) -> None:
    recipe = DETECTOR_RECIPES[name]
    model = recipe.build().eval()
    assert sum(value.numel() * value.element_size() for value in model.state_dict().values()) <= 4_000_000
    with torch.no_grad():
        found = model(torch.randn(2, 3, 96, 96))
    queries = recipe.settings["queries"]
    assert found["logits"].shape == (2, queries, 9 if recipe.scoring == "softmax" else 8)
    assert found["pred_boxes"].shape == (2, queries, 4)
    assert 0 < float(found["pred_boxes"].min()) < float(found["pred_boxes"].max()) < 1


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "scenes-rtdetr" else pytest.mark.slow) for name in DETECTOR_RECIPES],
)
def test_a_captured_detector_says_what_the_module_says(name: str) -> None:
    torch.manual_seed(0)
    model = small(name).build()
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.3)
    model(torch.randn(8, 3, 96, 96))  # statistics of BatchNorm that fold into something
    x = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        said, found = model.eval()(x), capture(model, x[:2])(x)
    for key, value in said.items():
        assert torch.allclose(value, found[key], atol=1e-4), key
        assert float(value.std()) > 1e-3


def test_assignment_is_the_cheapest_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(20, 4, 6, generator=generator)
    cost[:10] = cost[:10].mean(1, keepdim=True) + 0.01 * cost[:10]  # all boxes want the same query
    there = torch.rand(20, 4, generator=generator) > 0.2
    query = assign(cost, there)
    for c, t, q in zip(cost, there, query, strict=True):
        real = t.nonzero()[:, 0].tolist()
        chosen = [int(q[i]) for i in real]
        assert len(set(chosen)) == len(chosen)
        best = min(
            sum(float(c[i, p]) for i, p in zip(real, ps, strict=True))
            for ps in itertools.permutations(range(6), len(real))
        )
        assert sum(float(c[i, p]) for i, p in zip(real, chosen, strict=True)) == pytest.approx(best, abs=1e-5)


def test_overlaps_of_boxes() -> None:
    a = torch.tensor([0.0, 0, 2, 2])
    b = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [3, 0, 4, 2]])
    iou, giou = overlaps(a, b)
    assert iou.tolist() == pytest.approx([1, 1 / 3, 0])
    assert giou.tolist() == pytest.approx([1, 1 / 3, -1 / 4])


@pytest.mark.parametrize("softmax", [True, False])
def test_loss_is_least_for_the_right_answer(softmax: bool) -> None:
    boxes = torch.tensor([[[0.1, 0.1, 0.3, 0.5], [0.5, 0.5, 0.9, 0.8], [0.0, 0, 0, 0]]])
    labels = torch.tensor([[2, 0, -1]])
    logits = torch.full((1, 5, 4 if softmax else 3), -8.0)
    if softmax:
        logits[..., 3] = 8.0
    logits[0, 4, 2] = logits[0, 1, 0] = 16.0
    guessed = torch.full((1, 5, 4), 0.5)
    guessed[0, 4], guessed[0, 1] = torch.tensor([0.2, 0.3, 0.2, 0.4]), torch.tensor([0.7, 0.65, 0.4, 0.3])

    def loss(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(detection_loss(([(a, b)], a), boxes, labels, softmax))

    assert loss(logits, guessed) == pytest.approx(0, abs=0.01)
    moved, other, twice = guessed.clone(), logits.clone(), logits.clone()
    moved[0, 4, 0] += 0.05
    other[0, 4, 1], other[0, 4, 2] = 16.0, -8.0
    twice[0, 0, 2] = 16.0
    assert loss(logits, moved) > 0.1
    assert loss(other, guessed) > 0.5
    assert loss(twice, guessed) > 0.05


def test_average_precision_of_a_small_case() -> None:
    """One class, two objects; the best detection is off (IoU 0.6), the second is wrong, the third exact."""
    true = torch.tensor([[[0.0, 0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7]]])
    boxes = torch.tensor([[[0.0, 0, 0.2, 0.12], [0.8, 0.8, 1.0, 1.0], [0.5, 0.5, 0.7, 0.7]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3, dtype=torch.int64)
    found = average_precision(scores, labels, boxes, true, torch.zeros(1, 2, dtype=torch.int64), 2)
    assert found[0, 0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found[0, -1] == pytest.approx(51 / 3 / 101)
    assert np.isnan(found[1]).all()


def test_average_precision_is_that_of_coco(eight) -> None:
    """Detections are the true boxes, moved, some with another class, and boxes of nothing."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    _, true, classes = eight
    generator = torch.Generator().manual_seed(0)
    boxes = true.repeat(1, 4, 1) + 0.02 * torch.randn(8, 20, 4, generator=generator)
    boxes = torch.cat((boxes[..., :2], torch.maximum(boxes[..., 2:], boxes[..., :2] + 0.02)), -1)
    labels = torch.where(torch.rand(8, 20, generator=generator) > 0.2, classes.repeat(1, 4).clamp(min=0), 3)
    scores = torch.rand(8, 20, generator=generator).sort(descending=True).values

    def rows(boxes: torch.Tensor, labels: torch.Tensor) -> list[dict]:
        images, slots = (labels >= 0).nonzero(as_tuple=True)
        box = 96 * boxes[images, slots].double()
        sides = torch.cat((box[:, :2], box[:, 2:] - box[:, :2]), -1).tolist()
        given = zip(images.tolist(), labels[images, slots].tolist(), sides, strict=True)
        keys = ("image_id", "category_id", "bbox")
        return [
            dict(zip(keys, row, strict=True), id=k, iscrowd=0, area=row[2][2] * row[2][3])
            for k, row in enumerate(given, 1)
        ]

    index = coco.COCO()
    index.dataset = {"images": [{"id": k} for k in range(8)], "categories": [{"id": k} for k in range(8)]}
    index.dataset["annotations"] = rows(true, classes)
    index.createIndex()
    found = [{**row, "score": float(score)} for row, score in zip(rows(boxes, labels), scores.flatten(), strict=True)]
    judge = cocoeval.COCOeval(index, index.loadRes(found), "bbox")
    judge.evaluate()
    judge.accumulate()
    theirs = judge.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
    ours = average_precision(scores, labels, boxes, true, classes, 8)
    assert np.nanmean(ours) == pytest.approx(theirs[theirs > -1].mean(), abs=1e-6)
    assert 0.02 < np.nanmean(ours) < 0.9


@pytest.mark.usefixtures("_few_held_out")
@pytest.mark.parametrize("name", DETECTOR_RECIPES)
def test_a_run_that_was_stopped_goes_on(name: str, tmp_path, eight) -> None:
    recipe = small(name, steps=4)
    batches = [tuple(tensor[2 * step : 2 * step + 2] for tensor in eight) for step in range(4)]
    quiet = {"source": batches.__getitem__, "report": lambda text: None}
    whole, log = follow(recipe, tmp_path / "a.safetensors", **quiet)
    state = tmp_path / "b.pt"
    first = Run(recipe, torch.device("cpu"))
    for step in range(2):
        first.advance(batches[step], step / 4)
    torch.save(first.state([]), state)
    rest, _ = follow(recipe, tmp_path / "b.safetensors", state=state, **quiet)
    assert log[-1]["step"] == 4
    for key, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[key]), key
    assert torch.equal(load_file(tmp_path / "a.safetensors")[key], value.contiguous())


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTOR_RECIPES)
def test_a_few_scenes_are_learnt_by_heart(name: str, eight) -> None:
    recipe = replace(DETECTOR_RECIPES[name], warmup=30, average=0.9)
    run, batch = Run(recipe, torch.device("cpu")), eight
    for step in range(150):
        run.advance(batch, step / 150)
    scores, labels, boxes = detections(*run.averaged(batch[0]).values(), recipe.scoring == "softmax")
    assert np.nanmean(average_precision(scores, labels, boxes, *batch[1:], 8)) > 0.7, "0.81 to 0.97; at first 0"


@pytest.mark.usefixtures("_few_held_out")
def test_command_trains_measures_and_writes_a_card(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(DETECTOR_RECIPES, "scenes-detr", small("scenes-detr"))
    main(["scenes-detr", "--steps", "2", "--out", str(tmp_path)])
    assert "map50" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes_detr.json", "scenes_detr.safetensors"]
    card = json.loads((tmp_path / "scenes_detr.json").read_text())
    assert card["recipe"]["steps"] == 2
    assert card["figures"]["n"] == 32
    assert 0 <= card["figures"]["map"] <= card["figures"]["map50"] <= 1
    main(["scenes-detr", "--trained", str(tmp_path), "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "scenes_detr.json").read_text())
    assert again["figures"] == card["figures"]
    assert again["log"] == card["log"]


@pytest.mark.parametrize("name", DETECTOR_RECIPES)
def test_entry_and_recipe_agree(name: str, monkeypatch, tmp_path) -> None:
    (tmp_path / f"{name.replace('-', '_')}.safetensors").touch()
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    (entry,) = zoo.available().values()
    recipe = DETECTOR_RECIPES[name]
    assert entry.name == name
    assert (entry.preprocess, entry.scoring, entry.class_names) == (recipe.preprocess, recipe.scoring, CLASSES)
    assert entry.build().state_dict().keys() == recipe.build().state_dict().keys()
    with_weights = {**RECIPES, **DETECTOR_RECIPES}
    assert zoo.DETECTORS.keys() == DETECTOR_RECIPES.keys() == with_weights.keys() - {"digits-vit"}


SHIPPED = [name for name in DETECTOR_RECIPES if name in zoo.available()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_card_of_a_shipped_detector_tells_the_truth(name: str) -> None:
    entry, recipe = zoo.available()[name], DETECTOR_RECIPES[name]
    card, content = entry.card(), entry.weights.read_bytes()
    assert card["sha256"] == hashlib.sha256(content).hexdigest()
    assert card["bytes"] == len(content) <= 4 * 2**20
    figures = card["figures"]
    assert figures["n"] >= 500
    assert figures["map"] >= 0.55
    assert figures["map50"] >= 0.85
    model = entry.build()
    model.load_state_dict(load(content), strict=True)
    found = precision(model.eval(), recipe, fixed(recipe, "test", 64, 0))
    assert found["map"] == pytest.approx(figures["map"], abs=0.08), "of an eighth of the scenes"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_figures_of_a_shipped_detector_are_measured_again(name: str) -> None:
    entry = zoo.available()[name]
    model = entry.build()
    model.load_state_dict(load_file(entry.weights), strict=True)
    measured = measure_detector(model.eval(), DETECTOR_RECIPES[name])
    for key in ("map", "map50", "map75"):
        assert measured[key] == pytest.approx(entry.card()["figures"][key], abs=0.003)
