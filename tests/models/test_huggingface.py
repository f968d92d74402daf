"""Models of Hugging Face, from folders that `save_pretrained` wrote."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import quantlens as ql
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, UnsupportedError
from quantlens.models.processors import preprocess_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed (quantlens[hf])")

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT |= {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def made(name: str, **settings):
    """(module, image processor or None) of a small model."""
    t = transformers
    torch.manual_seed(0)
    if name == "clip":
        config = t.CLIPConfig(vision_config=SIZES, text_config={**TEXT, "projection_dim": 24}, projection_dim=24)
        return t.CLIPModel(config).eval()
    if name == "siglip":
        return t.SiglipModel(t.SiglipConfig(vision_config=SIZES, text_config=TEXT)).eval()
    if name == "mae":
        small = {f"decoder_{k}": v for k, v in SIZES.items() if k not in ("image_size", "patch_size")}
        return t.ViTMAEForPreTraining(t.ViTMAEConfig(**SIZES, **small)).eval()
    config = getattr(t, f"{name}Config")(**SIZES, **settings)
    return getattr(t, f"{name}ForImageClassification")(config).eval()


def folder(tmp_path, module, processor=None):
    module.save_pretrained(tmp_path)
    if processor is not None:
        processor.save_pretrained(tmp_path)
    return f"hf:{tmp_path}"


def processor_of(size: int = 32):
    return transformers.ViTImageProcessor(size={"height": size, "width": size})


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Data2VecVision"])
def test_a_folder_is_a_model(tmp_path, name):
    module = made(name, id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2})
    given = folder(tmp_path, module, processor_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantlensWarning)
        model = ql.load_model(given)
    assert (model.name, model.task, model.class_names) == (given, "classify", ["cat", "dog", "owl"])
    assert model.preprocess.input_size == (3, 32, 32)
    assert model.checkpoint == "model.safetensors"
    torch.testing.assert_close(model(PICTURES).logits, module(PICTURES).logits)
    torch.testing.assert_close(model(pixel_values=PICTURES, return_dict=False)[0], module(PICTURES).logits)


def test_random_weights_follow_the_seed(tmp_path):
    given = folder(tmp_path, made("ViT"), processor_of())
    own, *drawn = (ql.load_model(given, w, seed=s) for w, s in ((None, 0), ("random", 1), ("random", 1), ("random", 2)))
    first, again, other = (model.checkpoint_sha256 for model in drawn)
    assert first == again != other
    assert drawn[0].checkpoint == "random"
    assert own.checkpoint_sha256 == ql.load_model(given, "pretrained").checkpoint_sha256 != first


def test_a_file_of_other_weights(tmp_path):
    given = folder(tmp_path / "a", made("ViT"), processor_of())
    other = made("ViT")
    other.classifier.bias.data += 1
    torch.save(other.state_dict(), tmp_path / "w.pth")
    model = ql.load_model(given, tmp_path / "w.pth")
    torch.testing.assert_close(model(PICTURES).logits, other(PICTURES).logits)
    assert model.checkpoint == "w.pth"


@pytest.mark.parametrize(
    ("settings", "task"),
    [
        ({"num_labels": 3}, "classify"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multilabel"),
        ({"num_labels": 1}, "binary"),
    ],
)
def test_the_task_comes_from_the_configuration(tmp_path, settings, task):
    given = folder(tmp_path, made("ViT", **settings), processor_of())
    assert ql.load_model(given).task == task
    assert ql.load_model(given, task="classify").task == "classify"


def test_a_classifier_without_its_head_gives_features(tmp_path):
    module = made("ViT")
    given = folder(tmp_path, module, processor_of())
    for asked in ({"task": "features"}, {"num_classes": 0}):
        model = ql.load_model(given, **asked)
        assert model.task == "features"
        expected = module.vit(PICTURES).last_hidden_state
        torch.testing.assert_close(model(PICTURES).last_hidden_state, expected)
        assert "pooler_output" not in model(PICTURES), "a pooler that was never trained"


def test_masked_autoencoders_hide_nothing(tmp_path):
    module = made("mae")
    model = ql.load_model(folder(tmp_path, module, processor_of()))
    features = model(PICTURES).last_hidden_state
    assert (model.task, features.shape) == ("features", (2, 17, 32))
    module.vit.config.mask_ratio = 0.0
    torch.testing.assert_close(features[:, 0], module.vit(PICTURES).last_hidden_state[:, 0])
    torch.testing.assert_close(features, model(PICTURES).last_hidden_state)


@pytest.mark.parametrize(("name", "output"), [("clip", "image_embeds"), ("siglip", "pooler_output")])
def test_of_images_and_text_the_vision_tower(tmp_path, name, output):
    module = made(name)
    model = ql.load_model(folder(tmp_path, module, processor_of()))
    assert model.task == "zero-shot"
    expected = module.get_image_features(PICTURES)
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    torch.testing.assert_close(model(PICTURES)[output], expected)
    assert not any("text" in key for key in model.module.state_dict())


@pytest.mark.parametrize("name", ["CLIPVisionModelWithProjection", "AltCLIPModel", "Aimv2Model", "ConvNextBackbone"])
def test_towers_and_backbones_by_their_class(tmp_path, name):
    t, vision = transformers, SIZES
    if name == "CLIPVisionModelWithProjection":
        module = t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**SIZES, projection_dim=24))
        task, own = "zero-shot", lambda m: m(PICTURES).image_embeds
    elif name == "ConvNextBackbone":
        module = t.ConvNextBackbone(t.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, image_size=32))
        task, own = "features", lambda m: m(PICTURES).feature_maps[-1]
    else:
        config = getattr(t, name.replace("Model", "Config"))(vision_config=vision, text_config=TEXT)
        module, task, own = getattr(t, name)(config), "zero-shot", lambda m: m(PICTURES).pooler_output
    module = module.eval()
    model = ql.load_model(folder(tmp_path, module), input_size=32)
    assert model.task == task
    part = module.vision_model if name in ("AltCLIPModel", "Aimv2Model") else module
    assert torch.equal(own(model.module), own(part))


def test_without_a_processor_it_says_what_it_assumed(tmp_path):
    given = folder(tmp_path, made("ViT"))
    with pytest.warns(QuantlensWarning, match=r"assumed: 32×32 pixels, mean \(0\.5, 0\.5, 0\.5\)"):
        model = ql.load_model(given)
    assert model.preprocess.input_size == (3, 32, 32)


def test_without_a_processor_dinov2_gets_the_images_of_its_published_models(tmp_path):
    with pytest.warns(QuantlensWarning, match=r"assumed: 32×32 pixels, mean \(0\.485, .* bicubic"):
        found = ql.load_model(folder(tmp_path, made("Dinov2"))).preprocess
    assert found.std == (0.229, 0.224, 0.225)
    assert found.resize == (37,), "256 pixels for 224"


def test_another_image_size(tmp_path):
    given = folder(tmp_path, made("ViT"), processor_of())
    with pytest.warns(QuantlensWarning, match=r"resampled 1 position embeddings .*image size"):
        model = ql.load_model(given, input_size=64)
    assert model.preprocess.input_size == (3, 64, 64)
    assert model.preprocess.resize == (64, 64)
    assert model(torch.cat([PICTURES, PICTURES], 2).repeat(1, 1, 1, 2)).logits.shape == (2, 2)


def test_a_processor_of_another_size_than_the_model(tmp_path):
    given = folder(tmp_path, made("ViT"), processor_of(48))
    with pytest.warns(QuantlensWarning, match=r"its image processor makes \(3, 48, 48\): \(3, 32, 32\) is taken"):
        assert ql.load_model(given).preprocess.input_size == (3, 32, 32)
    given = folder(tmp_path / "dinov2", made("Dinov2"), processor_of(48))
    assert ql.load_model(given).preprocess.input_size == (3, 48, 48), "which resamples by itself"


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_its_file_fits_a_model_of_timm(tmp_path, name):
    from timm.models import deit, vision_transformer

    is_vit = name.startswith("ViT")
    config = (transformers.ViTConfig if is_vit else transformers.DeiTConfig)(**SIZES, num_labels=3, layer_norm_eps=1e-6)
    module = getattr(transformers, name)(config).eval()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    kind = vision_transformer.VisionTransformer if is_vit else deit.VisionTransformerDistilled
    twin = kind(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, mlp_ratio=1.5, num_classes=3)
    with pytest.warns(QuantlensWarning, match="names of Hugging Face translated"):
        model = ql.load_model(twin, tmp_path / "pytorch_model.bin", input_size=(3, 32, 32))
    torch.testing.assert_close(model(PICTURES), module(PICTURES).logits, rtol=1e-4, atol=1e-5)


def test_a_module_of_transformers(tmp_path):
    """Its processor lies where it was loaded from; made from a configuration, it has none."""
    module = made("ViT", id2label={0: "cat", 1: "dog"})
    with pytest.warns(QuantlensWarning, match=r"assumed: 32×32 pixels, mean \(0\.5"):
        model = ql.load_model(module)
    assert (model.task, model.class_names, model.preprocess.input_size) == ("classify", ["cat", "dog"], (3, 32, 32))
    source = folder(
        tmp_path, module, transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_std=[0.25] * 3)
    )
    loaded = type(module).from_pretrained(source.removeprefix("hf:"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantlensWarning)
        assert ql.load_model(loaded).preprocess.std == (0.25,) * 3
    with pytest.raises(QuantlensError, match="CLIPModel takes input_ids, not images"):
        ql.load_model(made("clip"))
    with pytest.warns(QuantlensWarning, match=r"32×32 pixels, mean \(0\.481"):
        assert ql.load_model(made("clip").vision_model).task == "features"


@pytest.mark.slow
def test_a_checkpoint_of_another_size_finds_its_float_model(tmp_path):
    from quantlens.cli import main
    from quantlens.evaluation.open_models import open_models

    given = folder(tmp_path / "vit", made("ViT", num_labels=8), processor_of())
    (tmp_path / "out").mkdir()
    out = str(tmp_path / "out" / "q.safetensors")
    source = "embedded:digits-calibration?n=2&seed=0"
    asked = ["--input-size", "48", "--calibration", source, "--method", "minmax", "--out", out]
    assert main.run(["quantize", given, *asked]) == 0
    quantized, reference = open_models(out, "pretrained")
    assert quantized.preprocess == reference.preprocess
    assert quantized.preprocess.input_size == (3, 48, 48)
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.warns(QuantlensWarning, match="assumed: 48×48") as told:  # it is opened at its own size before
        open_models(out, "pretrained")
    assert sum("assumed" in str(one.message) for one in told) == 1


def test_refusals(tmp_path):
    with pytest.raises(BadWeightsError, match="no folder"):
        ql.load_model("hf:./nothing/here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadWeightsError, match=r"no config\.json"):
        ql.load_model(f"hf:{tmp_path / 'empty'}")
    text = transformers.BertConfig(**{k: v for k, v in TEXT.items() if "token" not in k})
    with pytest.raises(QuantlensError, match="a bert model, takes input_ids, not images"):
        ql.load_model(folder(tmp_path / "bert", transformers.BertModel(text)))
    given = folder(tmp_path / "vit", made("ViT"), processor_of())
    with pytest.raises(BadWeightsError, match="classes, not 9"):
        ql.load_model(given, num_classes=9)
    assert ql.load_model(given, "random", num_classes=9)(PICTURES).logits.shape == (2, 9)
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(BadWeightsError, match="cannot be loaded"):
        ql.load_model(given)
    (tmp_path / "vit" / "model.safetensors").unlink()
    with pytest.raises(BadWeightsError, match="cannot be loaded"):
        ql.load_model(given)
    (tmp_path / "vit" / "config.json").write_text("{")
    with pytest.raises(BadWeightsError, match="cannot be read"):
        ql.load_model(given)


def written(tmp_path, **more):
    """A folder with more in its configuration."""
    given = folder(tmp_path, made("ViT"), processor_of())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    return given


def test_code_of_a_folder_is_never_run_nor_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person was asked"))
    names = {"AutoConfig": "theirs.C", "AutoModelForImageClassification": "theirs.M"}
    given = written(tmp_path, model_type="theirs", auto_map=names)
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(BadWeightsError, match="code of its own, which quantlens never runs"):
        ql.load_model(given)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", [{"quant_method": "bitsandbytes"}, {"quant_method": "torchao", "quant_type": "int8"}])
def test_quantized_weights_are_for_evaluate(tmp_path, how):
    with pytest.raises(UnsupportedError, match=f"{how['quant_method']} quantized.*give its module to `evaluate`"):
        ql.load_model(written(tmp_path, quantization_config=how))


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"model.safetensors": "version https://git-lfs"}, r"model\.safetensors is a pointer of Git LFS"),
        ({"model-q4.gguf": "GGUF"}, "it holds none of .*GGUF"),
        ({"onnx/model.onnx": "x"}, "it holds none of .*ONNX"),
        ({"adapter_config.json": '{"base_model_name_or_path": "a/b"}'}, r"an adapter \(LoRA\) of a/b"),
        ({"config.json": "version https://git-lfs"}, r"config\.json cannot be read: it is a pointer of Git LFS"),
        ({"config.json": None, "checkpoint-9/config.json": "{}"}, r"hf:.*checkpoint-9\?"),
    ],
)
def test_folders_say_what_they_hold_instead(tmp_path, there, said):
    given = folder(tmp_path, made("ViT"), processor_of())
    (tmp_path / "model.safetensors").unlink()
    for name, content in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(BadWeightsError, match=said):
        ql.load_model(given)


def test_what_takes_no_images_is_told_before_it_is_run(tmp_path):
    t = transformers
    sizes = {k: v for k, v in SIZES.items() if k != "image_size"} | {"num_patches": 16}
    tower = t.Siglip2VisionModel(t.Siglip2VisionConfig(**sizes))
    with pytest.raises(UnsupportedError, match="NaFlex"):
        ql.quantize(tower, PICTURES)
    with pytest.raises(UnsupportedError, match="NaFlex"):
        ql.load_model(folder(tmp_path, t.Siglip2Model(t.Siglip2Config(vision_config=sizes, text_config=TEXT))))


@pytest.mark.parametrize("labels", [1, 3])
def test_a_regression_has_no_classes(tmp_path, labels):
    module = made("ViT", num_labels=labels, problem_type="regression")
    with pytest.raises(UnsupportedError, match=f"a regression of {labels} number"):
        ql.load_model(folder(tmp_path, module, processor_of()))


def test_a_processor_that_cannot_be_read_is_told(tmp_path):
    given = folder(tmp_path, made("ViT"), processor_of())
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.warns(QuantlensWarning, match=r"preprocessor_config\.json cannot be used"):
        ql.load_model(given)


def test_a_body_is_no_classifier(tmp_path):
    body = made("ViT").vit
    given = folder(tmp_path, body, processor_of())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ViTForImageClassification"]}))
    with pytest.raises(BadWeightsError, match=r"classifier.*say task='features'"):
        ql.load_model(given)
    assert ql.load_model(given, task="features").task == "features"


def test_a_folder_of_timm(tmp_path):
    timm = pytest.importorskip("timm", minversion="1.0.13", reason="this timm reads no local-dir:")

    module = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, depth=1).eval()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    arguments = {"img_size": 32, "depth": 1}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "model_args": arguments}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ql.load_model(f"hf:{tmp_path}")
    torch.testing.assert_close(model(PICTURES), module(PICTURES))
    assert (model.preprocess.std, model.preprocess.input_size) == ((0.25,) * 3, (3, 32, 32))
    shutil.rmtree(tmp_path)


# ---- image processors ----------------------------------------------------------------------------------------------

PROCESSORS = {
    "ViT": {},
    "DeiT": {},
    "Beit": {},
    "Bit": {"size": {"shortest_edge": 256}},
    "Siglip": {},
    "CLIP": {},
    "MobileViT": {},
    "Levit": {},
    "Pvt": {},
    "ConvNext": {"size": {"shortest_edge": 224}},
    "PoolFormer": {},
}


def every_kind(name: str):
    """An image processor's classes: PIL's and torchvision's, as this version of transformers names them."""
    names = (f"{name}ImageProcessor{suffix}" for suffix in ("", "Pil", "Fast"))
    return [getattr(transformers, n) for n in names if hasattr(transformers, n)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_are_followed_to_the_pixel(name, photographs):
    for kind in every_kind(name):
        processor = kind(**PROCESSORS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("error", QuantlensWarning)
            found = preprocess_of(processor)
        for picture in photographs:
            expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(found(picture), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def photographs():
    """A tall, a wide and a small picture with detail at every size."""
    draw = np.random.default_rng(3)

    def one(width, height):
        layers = [
            Image.fromarray(draw.integers(0, 256, (s, s, 3), np.uint8)).resize((width, height)) for s in (3, 40, 200)
        ]
        return Image.fromarray(np.mean([np.asarray(layer, np.float32) for layer in layers], 0).round().astype(np.uint8))

    return [one(343, 256), one(281, 500), one(90, 61)]


@pytest.mark.parametrize(
    "flags", [{"do_normalize": False}, {"do_rescale": False, "do_normalize": False}, {"rescale_factor": 1 / 127.5}]
)
def test_flags_of_processors(flags, photographs):
    for kind in every_kind("ViT"):
        processor = kind(**flags)
        found = preprocess_of(processor)
        expected = processor(images=photographs[0], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found(photographs[0]), expected.float(), rtol=1e-5, atol=1e-3)


def test_a_processor_of_its_own_is_told(photographs):
    class Inverted(every_kind("ViT")[0]):
        def preprocess(self, images, *args, **kwargs):
            made = super().preprocess(images, *args, **kwargs)
            return {"pixel_values": -made["pixel_values"]}

        def __call__(self, images, *args, **kwargs):
            return self.preprocess(images, *args, **kwargs)

    with pytest.warns(QuantlensWarning, match="does more than quantlens understood"):
        preprocess_of(Inverted())


def test_a_size_that_is_left_open():
    kind = every_kind("Detr")[0]
    with pytest.warns(QuantlensWarning, match="leaves the size of an image open"):
        assert preprocess_of(kind()) is None
