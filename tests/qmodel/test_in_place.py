"""A quantized part is put back into the model that it is a part of."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import quantlens as ql

sys.path.insert(0, str(Path(__file__).parents[1] / "graph"))
from hf_models import TEXT, VIT, redrawn


def decibels(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))


@pytest.mark.slow
def test_the_vision_tower_of_a_clip_model(tmp_path):
    """Called by keyword, with what is False or None, and read by name; also after it was saved and loaded."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(vision_config=VIT, text_config=TEXT, projection_dim=16)
    model = redrawn(transformers.CLIPModel(config))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    call = {"input_ids": torch.randint(3, 99, (5, 6), generator=generator), "pixel_values": images}
    expected, tower = model(**call), model.vision_model
    for bits, least in (("FP32", 80), ("W8A8", 20)):
        model.vision_model = ql.quantize(tower, [{"pixel_values": images}], method="minmax", bits=bits)
        found = model(**call)
        assert type(found.vision_model_output) is type(expected.vision_model_output)
        assert decibels(found.logits_per_image, expected.logits_per_image) > least, bits
        if bits == "FP32":
            torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=1e-4, atol=1e-4)
    model.vision_model = ql.load(model.vision_model.save(tmp_path / "tower.safetensors"))
    again = model(**call)
    assert type(again.vision_model_output) is type(expected.vision_model_output)
    assert torch.equal(again.logits_per_image, found.logits_per_image)
    model.vision_model = ql.quantize(tower, images, method="minmax", bits="FP32")
    half = model.vision_model(images.half())  # of a model in half precision: computed in float32
    assert half.pooler_output.dtype == torch.float16
    assert decibels(half.pooler_output.float(), tower(images).pooler_output) > 40


def test_what_a_larger_model_reads_of_its_part():
    """Its configuration and its names are the float module's; what lies inside it is not handed out as if quantized."""
    transformers = pytest.importorskip("transformers")
    decoder = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, add_cross_attention=True)
    whole = transformers.VisionEncoderDecoderConfig
    config = whole.from_encoder_decoder_configs(transformers.ViTConfig(**VIT), decoder)
    model = redrawn(transformers.VisionEncoderDecoderModel(config))
    call = {"pixel_values": torch.randn(4, 3, 32, 32), "decoder_input_ids": torch.ones(4, 3, dtype=torch.long)}
    expected, encoder = model(**call).logits, model.encoder
    settings = {"max_new_tokens": 2, "decoder_start_token_id": 1, "pad_token_id": 0, "do_sample": False}
    words = model.generate(call["pixel_values"], **settings)
    for bits, least in (("FP32", 80), ("W8A8", 20)):
        model.encoder = ql.quantize(encoder, call["pixel_values"], method="minmax", bits=bits)
        assert decibels(model(**call).logits, expected) > least
        assert model.encoder.config is encoder.config or model.encoder.config.to_dict() == encoder.config.to_dict()
        if bits == "FP32":
            assert torch.equal(model.generate(call["pixel_values"], **settings), words)
        with pytest.raises(AttributeError, match="lies inside ViTModel, which was quantized as a whole"):
            _ = model.encoder.embeddings
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = model.encoder.nothing


class Pyramid(nn.Module):
    """A detector's body, as in Mask R-CNN with a Swin: feature maps by name, and the same at one width for its head."""

    def __init__(self) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer
        from torchvision.ops import FeaturePyramidNetwork

        size = {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (1, 1),
            "num_heads": (2, 4),
        }
        self.body = _Stages(SwinTransformer(**size))
        self.fpn, self.head = FeaturePyramidNetwork([16, 32], 8), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        return [self.head(level) for level in self.fpn(self.body(images)).values()]


class _Stages(nn.Module):
    def __init__(self, swin: nn.Module):
        super().__init__()
        self.patch_embed, self.stages = swin.patch_embed, swin.layers

    def forward(self, x):
        x, found = self.patch_embed(x), OrderedDict()
        for number, stage in enumerate(self.stages):
            x = stage(x)
            found[str(number)] = x.permute(0, 3, 1, 2)
        return found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["body", "fpn and body"])
def test_the_body_of_a_detector(part, tmp_path):
    """Feature maps come as the mapping that the next part reads."""
    torch.manual_seed(0)
    model, images = redrawn(Pyramid()), torch.randn(4, 3, 32, 32)
    expected = model(images)
    if part == "fpn and body":
        model.body, model.fpn = nn.Sequential(model.body, model.fpn), nn.Identity()
    for bits, least in (("FP32", 100), ("W8A8", 25)):
        body = model.body
        model.body = ql.quantize(body, images, method="minmax", bits=bits)
        assert list(model.body(images)) == ["0", "1"]
        for a, b in zip(model(images), expected, strict=True):
            assert decibels(a, b) > least, bits
        quantized, model.body = model.body, body
    found = ql.load(quantized.save(tmp_path / "body.safetensors"))(images)
    assert all(torch.equal(found[name], value) for name, value in quantized(images).items())
    assert quantized.outputs(images).logits.dim() == 2


class _Weighted(nn.Module):
    """Images and, for each of them, a weight of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, images, weights):
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.head((tokens * weights[..., None]).sum(1))


@pytest.mark.parametrize("differ", [False, True])
def test_inputs_that_differ_from_image_to_image_are_told(differ):
    torch.manual_seed(0)
    module, images = _Weighted().eval(), torch.randn(4, 3, 8, 8)
    weights = torch.rand(4, 4) if differ else torch.rand(1, 4).expand(4, 4).contiguous()
    calls = [{"images": images, "weights": weights}]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quantized = ql.quantize(module, calls, method="minmax", bits="W8A8")
    assert any("weights differ from image to image" in str(one.message) for one in told) is differ
    assert torch.allclose(quantized(images, weights), module(images, weights), atol=0.1)
