"""Files of models that are no classifiers of colour pictures: several inputs and outputs, features, one logit, other
numbers of channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.data import Preprocess
from quantlens.errors import UnsupportedError
from quantlens.export.export import export
from quantlens.export.exported import Artefact
from quantlens.graph import capture
from quantlens.qmodel.plan import Plan, Provenance

pytest.importorskip("onnx", reason="the deploy extra is not installed")
pytest.importorskip("onnxruntime", reason="the deploy extra is not installed")
ENDINGS = (".onnx", ".xml")
GENERATOR = torch.Generator().manual_seed(0)


class Tower(nn.Module):
    """Tokens, of which a mask leaves some out, and what is read off them."""

    def __init__(self, channels=3, gives=("logits", "tokens", "pooler_output"), classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head, self.gives = nn.Conv2d(channels, 8, 4, 4), nn.Linear(8, classes), gives

    def forward(self, pixel_values, mask=None):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = tokens if mask is None else tokens.masked_fill(mask[..., None], 0.0)
        pooled = torch.tanh(tokens.mean(1))
        all_of_them = {
            "logits": self.head(pooled),
            "tokens": tokens,
            "pooler_output": pooled,
            "map": tokens.mT[..., None],
        }
        found = {name: all_of_them[name] for name in self.gives}
        return found if len(found) > 1 else next(iter(found.values()))


def quantized(module, inputs, channels=3, task="classify"):
    """A module as a model with an empty plan."""
    plan = Plan(provenance=Provenance(model="tower", task=task))
    preprocess = Preprocess((channels, 16, 16), (0.5,) * channels, (0.5,) * channels)
    return ql.QuantizedModel(capture(module, inputs), plan, preprocess=preprocess)


def _opened(qmodel, ending, folder, **settings):
    if ending == ".xml":
        pytest.importorskip("openvino", reason="the deploy extra is not installed")
    return Artefact(export(qmodel, folder / f"m{ending}", **settings), threads=1)


def _pictures(count, channels=3):
    return torch.randn(count, channels, 16, 16, generator=GENERATOR)


@pytest.mark.parametrize("ending", ENDINGS)
def test_several_inputs_and_outputs(ending, tmp_path):
    module = Tower().eval()
    example = {"pixel_values": _pictures(2), "mask": torch.rand(2, 16, generator=GENERATOR) > 0.5}
    artefact = _opened(quantized(module, example), ending, tmp_path)
    for count in (1, 3):
        images, mask = _pictures(count), torch.rand(count, 16, generator=GENERATOR) > 0.5
        expected, found = module(images, mask), artefact.values(images.numpy(), mask=mask.numpy())
        assert found.keys() == {"logits", "score", "tokens", "pooler_output"}
        for name, value in expected.items():
            assert np.allclose(found[name], value.detach(), atol=1e-5), name
        logits, scores = artefact.run(images.numpy(), mask=mask.numpy())
        assert np.allclose(scores, expected["logits"].logsumexp(1).detach(), atol=1e-5)
        assert logits.shape == (count, 5)


def test_pytorch_takes_and_gives_them_in_order(tmp_path):
    module = Tower().eval()
    example = {"pixel_values": _pictures(2), "mask": torch.rand(2, 16, generator=GENERATOR) > 0.5}
    program = torch.export.load(export(quantized(module, example), tmp_path / "m.pt2")).module()
    images, mask = _pictures(3), torch.rand(3, 16, generator=GENERATOR) > 0.5
    for value, expected in zip(program(images, mask), module(images, mask).values(), strict=True):
        assert torch.allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("gives", ["pooler_output", "tokens", "map"])
def test_features_have_no_score(gives, ending, tmp_path):
    """Of tokens the first counts, of a map the mean, as in what is measured; they are in the file as they are, too."""
    module = Tower(gives=(gives,)).eval()
    qmodel = quantized(module, _pictures(2), task="features")
    artefact, images = _opened(qmodel, ending, tmp_path), _pictures(3)
    found, (features, scores) = artefact.values(images.numpy()), artefact.run(images.numpy())
    assert found.keys() == {"features"} | ({"output"} if gives != "pooler_output" else set())
    assert np.allclose(features, qmodel.outputs(images).logits, atol=1e-5)
    assert np.isnan(scores).all()
    assert np.allclose(found.get("output", features), module(images).detach(), atol=1e-5)
    assert artefact.task == "features"
    assert artefact.num_classes == 8
    with pytest.raises(UnsupportedError, match="features"):
        artefact.predict([])
    with pytest.raises(UnsupportedError, match="guard images"):
        export(qmodel, tmp_path / f"n{ending}", guard_images=images)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("channels", [1, 4])
def test_one_logit_of_other_channels(channels, ending, tmp_path):
    module = Tower(channels, ("logits",), 1).eval()
    artefact = _opened(quantized(module, _pictures(2, channels), channels, "binary"), ending, tmp_path)
    images = _pictures(3, channels)
    assert artefact.values(images.numpy()).keys() == {"logits"}
    assert np.allclose(artefact.run(images.numpy())[0], module(images).detach(), atol=1e-5)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_threshold_keeps_its_share_in_the_runtime(ending, digits, tmp_path):
    """However the images come, and though codes fall to other sides than in the simulation."""
    images = digits["images"][:150]
    qmodel = ql.quantize(digits["model"], digits["calibration"], method="minmax", bits="W8A8", target="openvino-cpu")
    artefact = _opened(qmodel, ending, tmp_path, guard_images=images, guard="energy")
    value, found = artefact.guard["threshold"]["value"], images.numpy()
    for size in (1, 7, 150):
        scores = np.concatenate([artefact.run(found[n : n + size])[1] for n in range(0, 150, size)])
        assert 143 <= (scores >= value).sum() <= 145
