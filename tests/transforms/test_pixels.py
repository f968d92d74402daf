from __future__ import annotations

import functools

import torch

import quantlens as ql
from quantlens.calibration import Calibration
from quantlens.calibration.measured_transforms import read_as_pixels
from quantlens.formats.uniform import pixel_codes
from quantlens.graph import graph_of


@functools.cache
def _model_and_pictures():
    model = ql.load_model("digits-vit")
    preprocess = model.preprocess
    raw = torch.randint(
        0, 256, (6, *preprocess.input_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return model, preprocess.normalize(raw)


def test_the_codes_of_an_image_are_its_pixels_and_nothing_is_lost():
    model, images = _model_and_pictures()
    graph = graph_of(model).clone()
    expected = graph(images)
    keys = read_as_pixels(graph, model.preprocess, Calibration.of(images, model.preprocess))
    assert len(keys) == 1
    edge = graph.sites.edges[keys[0]]
    assert graph.is_image(edge.value)
    assert edge.value is not graph.input
    torch.testing.assert_close(graph(images), expected, rtol=1e-4, atol=1e-4)
    quantized = ql.qmodel.QuantizedModel(
        graph, ql.qmodel.Plan({keys[0]: pixel_codes()}, []), preprocess=model.preprocess
    )
    torch.testing.assert_close(quantized(images), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_picture_is_left_alone():
    model, images = _model_and_pictures()
    graph = graph_of(model).clone()
    for other in (images + 0.3 * torch.rand_like(images), 3 * torch.randn_like(images)):
        assert read_as_pixels(graph, model.preprocess, Calibration.of(other, model.preprocess)) == []
    assert graph.sites.of_kind("conv")[0].edges["input"].value is graph.input


def test_a_target_reads_pixels_by_default_and_a_method_alone_does_not(tmp_path):
    model, images = _model_and_pictures()
    for settings, pixels in (({}, False), ({"target": "openvino-cpu"}, True), ({"image": "pixels"}, True)):
        made = ql.quantize(model, images, method="minmax", bits="W8A8", **settings)
        edge = made.graph.sites.of_kind("conv")[0].edges["input"]
        assert made.plan.quantizers[edge.key].bits == 8
        assert (edge.value is not made.graph.input) is pixels
        assert made.plan.info["options"]["image"] == ("pixels" if pixels else "range")
        if pixels:
            assert float(made.plan.quantizers[edge.key].scale) == torch.tensor(1 / 255).item()
    made.save(tmp_path / "q.safetensors")
    assert torch.equal(ql.load(tmp_path / "q.safetensors")(images), made(images))
    narrow = ql.quantize(model, images, method="minmax", bits="W8A4", image="pixels", patch_bits=4)
    assert narrow.graph.sites.of_kind("conv")[0].edges["input"].value is narrow.graph.input
