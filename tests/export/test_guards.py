"""The OOD score in an exported file: which, what it gives, how it is chosen, and what its threshold keeps."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.calibration.images import OOD_VIEWS
from quantlens.data import Preprocess
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.export.export import export
from quantlens.export.exported import Artefact
from quantlens.export.guards import GUARDS, guard_sentences, separation_means
from quantlens.graph import capture
from quantlens.metrics import FitData, make_scorer, ood_metrics
from quantlens.qmodel.plan import Plan, Provenance

pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")
ENDINGS = (".onnx", ".xml", pytest.param(".pt2", marks=pytest.mark.slow))
CLASSES = 7


class Small(nn.Module):
    """A classifier of pictures 8 × 8. sharp: factor of its logits; linear: whether it ends in a linear layer."""

    def __init__(self, sharp=1.0, *, linear=True, classes=CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, classes)
        self.sharp, self.linear = sharp, linear
        self.head.weight.data *= sharp

    def forward(self, x):
        logits = self.head(torch.tanh(2 * self.patches(x)).mean((2, 3)))
        return logits if self.linear else torch.tanh(logits)


@functools.cache
def small(*args, **settings):
    module = Small(*args, **settings)
    plan = Plan(provenance=Provenance(model="small", task="classify"))
    preprocess = Preprocess((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    return ql.QuantizedModel(capture(module.eval(), torch.zeros(2, 3, 8, 8)), plan, preprocess=preprocess)


def pictures(count, seed=0):
    """Pictures of some shades, with noise."""
    generator = torch.Generator().manual_seed(seed)
    shades = torch.randint(CLASSES, (count,), generator=generator) / CLASSES - 0.5
    return 0.3 * torch.randn(count, 3, 8, 8, generator=generator) + shades[:, None, None, None]


def opened(model, folder, ending, **settings):
    if ending == ".xml":
        pytest.importorskip("openvino", reason="the deploy extra is not installed")
    return Artefact(export(model, folder / f"m{ending}", **settings), threads=1)


def expected(model, name, images, fit, labels=None):
    """A score by the functions of the metrics room, of the simulation. fit: images of the statistics."""
    given = [None if x is None else x.detach().numpy() for x in model.outputs(images)]
    logits, features = (x.detach().numpy() for x in model.outputs(fit))
    return make_scorer(name, FitData(logits, features, labels))(*given)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "name", ["gen", "mahalanobis", *(pytest.param(n, marks=pytest.mark.slow) for n in ("msp", "energy", "maxlogit"))]
)
def test_the_score_in_the_file_is_that_of_the_metrics(name, ending, tmp_path):
    model, known = small(), pictures(40)
    artefact = opened(model, tmp_path, ending, guard=name, guard_images=known)
    seen = pictures(9, seed=1) * 2
    assert np.allclose(artefact.run(seen.numpy())[1], expected(model, name, seen, known[::2]), rtol=1e-4, atol=1e-4)
    assert artefact.guard["score"] == name


@pytest.mark.parametrize("classes", [pytest.param(2, marks=pytest.mark.slow), 120])
@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_generalised_entropy_of_sure_predictions(ending, classes, tmp_path):
    """1 - p is below the rounding of float32, and its tenth power far above 0."""
    model, seen = small(400.0, classes=classes), pictures(30)
    artefact = opened(model, tmp_path, ending, guard="gen")
    logits, scores = artefact.run(seen.numpy())
    assert (1 - torch.from_numpy(logits).double().softmax(1).amax(1) < 1e-7).any(), "some are that sure"
    assert np.allclose(scores, GUARDS["gen"](logits), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ending", [".onnx", *(pytest.param(e, marks=pytest.mark.slow) for e in (".xml", ".pt2"))])
def test_statistics_of_labelled_images_are_of_their_classes(ending, tmp_path):
    model, known = small(), pictures(60)
    labels = np.arange(60) % 3
    artefact = opened(model, tmp_path, ending, guard="mahalanobis", guard_images=(known, torch.from_numpy(labels)))
    assert artefact.guard["fitted"] == {"n": 30, "classes": 3, "labels": "given"}
    found = artefact.run(known.numpy())[1]
    assert np.allclose(found, expected(model, "mahalanobis", known, known[::2], labels[::2]), rtol=1e-3, atol=1e-3)
    without = opened(model, tmp_path, ending, guard="mahalanobis", guard_images=known)
    assert without.guard["fitted"]["labels"] == "predicted"
    assert not np.allclose(without.run(known.numpy())[1], found, rtol=1e-3)


@pytest.mark.slow
def test_a_program_of_torch_gives_the_score_beside_the_logits(tmp_path):
    model, known = small(), pictures(40)
    path = export(model, tmp_path / "m.pt2", guard="mahalanobis", guard_images=known)
    logits, scores = torch.export.load(path).module()(known)
    assert torch.equal(logits, model(known))
    assert np.allclose(scores.detach(), expected(model, "mahalanobis", known, known[::2]), rtol=1e-4, atol=1e-4)
    bare = torch.export.load(export(model, tmp_path / "n.pt2", guard_images=known)).module()(known)
    assert torch.equal(bare, logits), "chosen among the scores of the logits, the file gives what the module gives"


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_features_of_a_folded_model_are_on_the_axes_of_the_float_model(ending, loaded, pictures, tmp_path):
    images = pictures.repeat(4, 1, 1, 1) * torch.linspace(0.5, 1.5, 32)[:, None, None, None]
    model = ql.quantize(loaded["vit"], pictures, method="quantlens-fast", bits="W8A8", target="openvino-cpu")
    artefact = opened(model, tmp_path, ending, guard="mahalanobis", guard_images=images)
    wanted = expected(model, "mahalanobis", images, images[::2])
    assert np.corrcoef(artefact.run(images.numpy())[1], wanted)[0, 1] > 0.98


# ---- the threshold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
@pytest.mark.parametrize(
    ("name", "count"), [("gen", 150), ("mahalanobis", 75), pytest.param(None, None, marks=pytest.mark.slow)]
)
def test_the_threshold_keeps_what_it_promises_in_the_runtime(name, count, ending, tmp_path):
    """Of images that no statistics were fitted on, whatever the batch."""
    known = pictures(150)
    artefact = opened(small(4.0), tmp_path, ending, guard=name, guard_images=known)
    threshold = artefact.guard["threshold"]
    held = known[1::2] if artefact.guard["score"] == "mahalanobis" else known
    assert threshold["n"] == len(held) == (count or len(held))
    assert threshold["images"] == "images given"
    for size in (1, 7, 150):
        scores = np.concatenate([artefact.run(part.numpy())[1] for part in held.split(size)])
        kept = (scores >= threshold["value"]).mean()
        assert 0.95 <= kept <= 0.95 + 2 / len(held)
        assert threshold["kept"] == pytest.approx(kept, abs=1.01 / len(held))


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "held", "names"), [(64, slice(1, None, 2), 5), (20, slice(None), 4)])
def test_the_score_that_separates_best_is_chosen(count, held, names, tmp_path):
    """Among those of logits alone where the images are too few for statistics of features."""
    model, known = small(3.0), pictures(count)
    artefact = opened(model, tmp_path, ".onnx", guard_images=known)
    said, generator = artefact.guard, torch.Generator().manual_seed(0)
    assert len(said["separation"]) == names
    views = {view.__name__: [] for view in OOD_VIEWS}
    drawn = known[held][torch.randperm(len(known[held]), generator=generator)]
    for batch in drawn.split(32):
        for view in OOD_VIEWS:
            views[view.__name__].append(view(batch, generator))
    for name, found in said["separation"].items():
        ids = expected(model, name, known[held], known[::2])
        for view, parts in views.items():
            auroc = ood_metrics(ids, expected(model, name, torch.cat(parts), known[::2]))["auroc"]
            assert found[view] == pytest.approx(auroc, abs=0.01)
    means = {name: np.mean(list(found.values())) for name, found in said["separation"].items()}
    assert said["score"] == max(means, key=means.get)
    assert separation_means(said) == pytest.approx(means)
    assert "chosen by AUROC" in guard_sentences(said)[-1]
    assert json.loads(json.dumps(said)) == said


def test_without_enough_images_it_is_energy(tmp_path):
    model = small()
    for settings in ({"guard_images": pictures(5)}, {}):
        artefact = opened(model, tmp_path, ".onnx", **settings)
        assert artefact.guard["score"] == "energy"
        assert "separation" not in artefact.guard
        assert (artefact.guard["threshold"] is not None) == bool(settings)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_without_a_guard(ending, tmp_path):
    artefact = opened(small(), tmp_path, ending, guard="none")
    assert artefact.values(pictures(2).numpy()).keys() == {"logits"}
    found = artefact.predict([np.zeros((3, 8, 8), np.uint8)])[0]
    assert (found.score, found.unknown) == (None, None)
    assert guard_sentences(artefact.guard) == ["no OOD score"]


def test_guards_that_cannot_be(tmp_path):
    model, known = small(), pictures(40)
    with pytest.raises(UnknownNameError, match="gen"):
        export(model, tmp_path / "m.onnx", guard="genn")
    with pytest.raises(QuantlensError, match="give guard images"):
        export(model, tmp_path / "m.onnx", guard="mahalanobis")
    with pytest.raises(QuantlensError, match="leave them out"):
        export(model, tmp_path / "m.onnx", guard="none", guard_images=known)
    with pytest.raises(UnsupportedError, match="at least 32"):
        export(model, tmp_path / "m.onnx", guard="mahalanobis", guard_images=known[:31])
    with pytest.raises(UnsupportedError, match="differ"):
        export(model, tmp_path / "m.onnx", guard="mahalanobis", guard_images=torch.zeros(40, 3, 8, 8))
    other = small(linear=False)
    with pytest.raises(UnsupportedError, match="linear"):
        export(other, tmp_path / "m.onnx", guard="mahalanobis", guard_images=known)
    assert set(opened(other, tmp_path, ".onnx", guard_images=known).guard["separation"]) == set(GUARDS)


def test_a_file_of_an_earlier_release_is_read_as_before(tmp_path):
    """Without the score's separation and its images, and without digests."""
    onnx = pytest.importorskip("onnx")
    path = export(small(), tmp_path / "m.onnx", guard_images=pictures(40), guard="energy")
    proto = onnx.load(path)
    old = {"score": "energy", "keep": 0.95, "threshold": {"value": 1.5, "n": 200}}
    record = {one.key: one.value for one in proto.metadata_props if "sha256" not in one.key}
    onnx.helper.set_model_props(proto, {**record, "guard": json.dumps(old)})
    onnx.save(proto, path)
    artefact = Artefact(path)
    assert artefact.guard == old
    scores = artefact.run(pictures(6).numpy())[1]
    assert np.allclose(scores, GUARDS["energy"](artefact.run(pictures(6).numpy())[0]), atol=1e-5)
    assert guard_sentences(old) == ["Energy score, unknown below 1.500"]


def test_an_evaluation_takes_the_score_of_the_file(tmp_path):
    """Which is not to be had from the logits."""
    model, known = small(), pictures(80)
    artefact = opened(model, tmp_path, ".onnx", guard="mahalanobis", guard_images=known)
    ids, other = pictures(40, seed=2), -2 * pictures(30, seed=3)
    labels = torch.zeros(40, dtype=torch.long)
    found = ql.evaluate(artefact, id=(ids, labels), ood={"other": other}, cache_dir=False).guard
    value = artefact.guard["threshold"]["value"]
    assert found["id"]["kept"] == pytest.approx(float((artefact.run(ids.numpy())[1] >= value).mean()))
    assert found["ood"]["other"]["flagged"] == pytest.approx(float((artefact.run(other.numpy())[1] < value).mean()))
    assert found["fitted"]["n"] == 40
