"""What a model takes and returns besides one tensor; and modules that something is wrapped around."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import quantlens as ql
from quantlens.errors import CaptureError, QuantlensError, QuantlensWarning
from quantlens.graph import capture
from quantlens.graph.structure import build

Both = namedtuple("Both", ["map", "rest"])


class Part(nn.Module):
    """Two tensors and a switch in; a mapping of tensors, tuples, numbers and None out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, images, weight, *, levels=1, named=False, extra=None):
        map = self.conv(images)
        pooled = (map * weight[:, None, None, None]).mean((2, 3))
        found = Both(map, [pooled, None, 3]) if named else {"maps": (map,) * levels, "pooled": pooled, 0: None}
        return found if extra is None else (found, self.fc(pooled) + extra)


@pytest.fixture(scope="module")
def part():
    return ql.quantize(Part().eval(), [((torch.randn(2, 3, 16, 16), torch.ones(2)), {})], method="minmax")


def test_several_tensors_and_constants_in_and_out(tmp_path):
    model, images, weight = Part().eval(), torch.randn(4, 3, 16, 16), torch.rand(4) + 0.5
    calls = [((images[i : i + 2], weight[i : i + 2]), {"levels": 2, "extra": torch.ones(5)}) for i in (0, 2)]
    quantized = ql.quantize(model, calls, method="minmax", bits="W8A8")
    reloaded = ql.load(quantized.save(tmp_path / "q.safetensors"))
    expected = model(images[:3], weight[:3], levels=2, extra=torch.ones(5))
    for q in (quantized, reloaded):
        found = q(images[:3], weight=weight[:3], levels=2, extra=torch.ones(5))
        (parts, logits), (wanted, aim) = found, expected
        assert list(parts) == ["maps", "pooled", 0]
        assert parts[0] is None
        assert len(parts["maps"]) == 2
        for a, b in ((parts["maps"][1], wanted["maps"][1]), (parts["pooled"], wanted["pooled"]), (logits, aim)):
            assert (a - b).abs().max() < 0.05 * b.abs().max()
        torch.testing.assert_close(q.outputs(images[:3], weight[:3], extra=torch.ones(5)).logits, parts["pooled"])
    assert torch.equal(
        reloaded(images, weight, extra=torch.ones(5))[1], quantized(images, weight, extra=torch.ones(5))[1]
    )


def test_the_other_inputs_of_every_image_are_calibrated_with():
    """The largest weight, of the last image, gives the largest value that the layer reads."""
    model, images = Part().eval(), torch.ones(4, 3, 16, 16)
    weight = torch.tensor([1.0, 1.0, 1.0, 8.0])
    call = {"images": images, "weight": weight, "extra": torch.zeros(5)}
    quantized = ql.quantize(model, [call], method="minmax", bits="W8A8")
    expected = model(**call)[1]
    assert (quantized(**call)[1] - expected).abs().max() < 0.05 * expected.abs().max()


def test_named_tuples_come_back_and_are_read_by_name_after_loading(tmp_path):
    model, images = Part().eval(), torch.randn(2, 3, 16, 16)
    quantized = ql.quantize(model, [((images, torch.ones(2)), {"named": True})], method="minmax", bits="W8A8")
    assert isinstance(quantized(images, torch.ones(2), named=True), Both)
    found = ql.load(quantized.save(tmp_path / "q.safetensors"))(images, torch.ones(2))
    assert torch.equal(found.map, quantized(images, torch.ones(2)).map)
    assert torch.equal(found[0], found["map"])
    assert found.rest[1:] == [None, 3]
    first, second = found  # as the module's is taken apart
    assert first is found.map
    assert second is found.rest


@dataclass(frozen=True)
class Answer:
    logits: torch.Tensor
    parts: tuple[object, ...]
    scale: float = 2.0


def test_a_dataclass_comes_back():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 5)

        def forward(self, x):
            return Answer(self.fc(x.flatten(1)), ({"inner": Answer(x, ())}, None))

    model, images = Net().eval(), torch.randn(2, 3, 2, 2)
    found, expected = ql.quantize(model, images, bits="FP32")(images), model(images)
    assert type(found) is Answer
    assert torch.allclose(found.logits, expected.logits)
    assert torch.equal(found.parts[0]["inner"].logits, images)
    assert (found.parts[1], found.scale) == (None, 2.0)


class _Held:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (_Held, "a _Held among what"),
        (lambda x: {"y": x, "count": x.shape[0]}, "a number made of the batch size among what"),
        (lambda x: None, "returns no tensor"),
        (lambda x: x.mean(), "one number for all images together"),
    ],
)
def test_what_cannot_be_returned_is_named(returned, said):
    class Net(nn.Conv2d):
        def forward(self, x):
            return returned(super().forward(x))

    with pytest.raises(CaptureError, match=said):
        ql.quantize(Net(3, 2, 2).eval(), torch.randn(2, 3, 4, 4))


def test_what_asks_for_the_batch_size_is_told():
    class Net(nn.Conv2d):
        def forward(self, x):
            x = super().forward(x)
            return x if x.shape[0] > 1 else x * 2

    model, images = Net(3, 2, 2).eval(), torch.randn(2, 3, 4, 4)
    with pytest.warns(QuantlensWarning, match="something else for a single image"):
        assert torch.allclose(capture(model, images)(images), model(images))


def test_values_that_are_asked_for_are_named(capsys):
    class Net(nn.Conv2d):
        def forward(self, x):
            return super().forward(x / 2 if x.max() > 3 else x)

    with pytest.raises(CaptureError, match="depends on values"):
        capture(Net(3, 2, 2).eval(), torch.randn(2, 3, 4, 4))
    assert capsys.readouterr().err == ""


def test_double_images_give_double():
    model, images = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten()).double().eval(), torch.randn(2, 3, 4, 4).double()
    found = ql.quantize(model, images, bits="FP32")(images)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-5)


def test_a_model_without_parameters(tmp_path):
    images = torch.randn(2, 3, 4, 4)
    quantized = ql.quantize(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), images)
    assert torch.equal(ql.load(quantized.save(tmp_path / "q.safetensors"))(images), quantized(images))


def test_recurrent_layers_and_masks_of_torchs_transformers():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 4, 2, batch_first=True, dropout=0.1)
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, x):
            x = self.gru(x.flatten(2).transpose(1, 2))[0]
            mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
            return self.encoder(x, mask=mask).mean(1)

    model, images = Net().eval(), torch.randn(3, 4, 3, 3)
    torch.testing.assert_close(capture(model, images)(images), model(images), rtol=1e-5, atol=1e-5)


def test_every_part_keeps_its_mode():
    model = nn.Sequential(nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2)).train()
    model[1].eval()
    capture(model, torch.randn(2, 3, 4, 4))
    assert [part.training for part in model.modules()] == [True, True, False]


def test_a_file_names_no_class_but_those_of_transformers():
    for path in ("os.system", "transformers.utils.generic.run", "transformers.models.vit.modeling_vit.ViTModel"):
        found = build(
            {"object": path, "fields": [["logits", {"tensor": 0}], ["none", {"value": None}]]}, [torch.ones(1)]
        )
        assert type(found).__name__ == "Fields"
        assert found.logits is found[0]
        assert found.to_tuple() == (found.logits,)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda q, x: q(x[:, :1], torch.ones(2)),
            r"images of shape \[2, 1, 16, 16\] were given.*takes \[N, 3, 16, 16\]",
        ),
        (lambda q, x: q(x[..., :8], torch.ones(2)), r"takes \[N, 3, 16, 16\]"),
        (lambda q, x: q.outputs(x[0], torch.ones(2)), r"takes \[N, 3, 16, 16\]"),
        (lambda q, x: q(x), "also takes weight"),
        (lambda q, x: q(x, torch.ones(2), levels=3), "levels=3 was not given when the model was captured"),
        (lambda q, x: q(x, torch.ones(2), 7), "cannot be called like this"),
        (lambda q, x: q(x, None), "weight is None; the model was captured with a tensor there"),
    ],
)
def test_a_call_that_was_not_captured_is_refused_in_one_sentence(call, said, part):
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(QuantlensError, match=said):
        call(part, images)


@pytest.mark.parametrize(
    "wrap", ["DataParallel", "compile", "compiled part", "weight_norm", "parametrized", "autocast"]
)
def test_what_is_wrapped_around_a_module(wrap):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=wrap == "autocast"):
                x = self.conv(x).relu()
            return self.fc(x.float().mean((2, 3)))

    model, images = Net(), torch.randn(3, 3, 8, 8)
    if wrap == "weight_norm":
        nn.utils.weight_norm(model.fc)
        model(images)  # leaves a tensor with a history
    elif wrap == "parametrized":
        nn.utils.parametrizations.weight_norm(model.fc)
    elif wrap == "compiled part":
        model.conv = torch.compile(model.conv)
    wrapped = {"DataParallel": nn.DataParallel, "compile": torch.compile}.get(wrap, lambda m: m)(model).eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        graph, expected = capture(wrapped, images), model(images)
    tolerance = 0.02 if wrap == "autocast" else 1e-5  # the graph computes in float32
    torch.testing.assert_close(graph(images), expected, rtol=tolerance, atol=tolerance)
    assert [site.name for site in graph.sites] == ["conv", "fc"]
    assert all(tensor.dtype == torch.float32 for tensor in graph.tensors().values())


def test_a_module_of_torchscript_is_refused():
    traced = torch.jit.trace(nn.Conv2d(3, 8, 3).eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(CaptureError, match="give the Python module"):
        capture(traced, torch.randn(2, 3, 8, 8))
