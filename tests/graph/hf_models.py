"""Small models of Hugging Face, made from configurations, every parameter and buffer redrawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {**SMALL, "image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
PYRAMID = {
    "image_size": 32,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
}
STEPS = {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
TEXT = {**SMALL, "num_hidden_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "vit-body": ("ViTModel", "ViTConfig", VIT),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VIT),
    "deit-distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT),
    "swin": ("SwinForImageClassification", "SwinConfig", WINDOWS),
    "swin-backbone": ("SwinBackbone", "SwinConfig", {**WINDOWS, "out_features": ["stage1", "stage2"]}),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", WINDOWS),
    "beit": ("BeitForImageClassification", "BeitConfig", {**VIT, "use_relative_position_bias": True}),
    "data2vec": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", VIT),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", VIT),
    "dinov2-registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", VIT),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 2}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VIT),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", VIT),
    "clip-projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VIT, "projection_dim": 16}),
    "clip-classifier": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": VIT, "text_config": TEXT}),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "image_size": 64,
            "patch_size": 2,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 24, 32, 32, 64],
            "num_attention_heads": 2,
        },
    ),
    "levit": ("LevitForImageClassification", "LevitConfig", {**STEPS, "key_dim": [8, 8, 8]}),
    "pvtv2": ("PvtV2ForImageClassification", "PvtV2Config", PYRAMID),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    ),
    "hiera": (
        "HieraForImageClassification",
        "HieraConfig",
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    ),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**VIT, "image_size": [32, 32], "num_detection_tokens": 4},
    ),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", VIT),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", VIT),
}
"""Name -> (class, class of its configuration, configuration)."""


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor away from its initial value, at the scale of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.numel() or not value.is_floating_point() or "inv_freq" in name or "coords" in name:
            continue
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.data = 0.5 + drawn.abs()
        elif value.dim() < 2 or "norm" in name:
            value.data = 0.2 * drawn + (1.0 if name.endswith(("weight", "lambda1", "gamma")) else 0.0)
        else:
            value.data = drawn * max(value[0].numel(), 1) ** -0.5
    return model.eval().requires_grad_(False)


def small(name: str) -> tuple[nn.Module, torch.Tensor]:
    """(a model, three images for it)."""
    import transformers

    kind, configuration, settings = CONFIGURATIONS[name]
    model = getattr(transformers, kind)(getattr(transformers, configuration)(**settings))
    size = 64 if settings.get("image_size") in (64, [64, 64]) or name == "convnext" else 32
    return redrawn(model), torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
