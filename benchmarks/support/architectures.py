"""The architectures of the support table, as data: name -> how it is built, small.

timm: names that share keyword arguments (depth, width, image size). Hugging Face: (model class, configuration class,
arguments of the configuration). The image's side is ``img_size`` or ``image_size``, else :data:`SIDE`; ``_side`` is for
models that are not told it.
"""

from typing import Any

from benchmarks.support.detectors import CONFIGURATIONS, side_of

SIDE = 64

VIT = {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 64}
VIT14 = {**VIT, "img_size": 56}
ROPE = {**VIT, "embed_dim": 96, "num_heads": 2}
EVA14 = {**VIT14, "num_heads": 2}
FOUR = {"depths": (1, 1, 2, 1), "embed_dims": (32, 48, 64, 96)}
MAXX = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16, "img_size": 64}
SWIN = {"embed_dim": 32, "depths": (1, 2, 1, 1), "num_heads": (2, 2, 4, 4), "img_size": 64}
META = {"_keep": "MetaFormerBlock"}
ROPE_ENCODER = {"depth": 2, "embed_dim": 96, "num_heads": 2}

TIMM: list[tuple[dict[str, Any], str]] = [
    # ---- plain transformers: class token, distilled, pooled, registers, pre-norm, parallel, post-norm, LayerScale
    (VIT, "vit_tiny_patch16_224 vit_base_patch16_gap_224 vit_base_patch16_reg4_gap_256 vit_base_patch16_clip_224"),
    (VIT, "vit_base_patch16_clip_quickgelu_224 vit_base_patch16_rpn_224 vit_base_patch16_xp_224"),
    (VIT, "vit_base_patch16_siglip_224 vit_base_patch16_siglip_gap_224 vit_base_patch16_18x2_224"),
    (VIT, "vit_so150m_patch16_reg4_map_256 vit_wee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256"),
    (VIT, "vit_dlittle_patch16_reg1_gap_256 vit_mediumd_patch16_reg4_gap_256 vit_base_patch16_radio_v3"),
    (VIT, "vit_small_patch8_224 vit_so150m2_patch16_reg1_gap_256"),
    ({**VIT, "img_size": 128}, "vit_base_patch32_plus_256"),
    (VIT14, "vit_base_patch14_dinov2 vit_base_patch14_reg4_dinov2 vit_giant_patch14_dinov2 aimv2_large_patch14_224"),
    (VIT14, "vit_intern300m_patch14_448 vit_base_patch14_reg1_tipsv2"),
    (VIT, "flexivit_small beit3_base_patch16_224 test_vit test_vit2 test_vit3 test_vit4"),
    (VIT, "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224"),
    (VIT, "vit_relpos_small_patch16_224 vit_relpos_base_patch16_cls_224 vit_relpos_base_patch16_clsgap_224"),
    (VIT, "vit_relpos_base_patch16_rpn_224 vit_srelpos_small_patch16_224"),
    (VIT, "samvit_base_patch16_224 beit_base_patch16_224 beitv2_base_patch16_224"),
    ({"depth": 2, "img_size": 64}, "cait_xxs24_224"),
    ({"depth": 2, "img_size": 64, "local_up_to_layer": 1}, "convit_tiny"),
    ({"depth": 2, "img_size": 64, "cls_attn_layers": 1}, "xcit_nano_12_p16_224 xcit_tiny_12_p8_224"),
    (
        {"depth": 2, "img_size": 64, "embed_dim": 96, "num_heads_outer": 3, "inner_dim": 24, "num_heads_inner": 2},
        "tnt_s_patch16_224 tnt_s_legacy_patch16_224",
    ),
    ({"img_size": 64, "_keep": "Outlooker Transformer"}, "volo_d1_224"),
    # ---- rotary position embedding
    (ROPE, "vit_small_patch16_rope_224 vit_small_patch16_rope_ape_224 vit_small_patch16_rope_mixed_224"),
    (ROPE, "vit_base_patch16_rope_reg1_gap_256 vit_small_patch16_dinov3 vit_small_plus_patch16_dinov3"),
    (ROPE, "vit_tiny_patch16_dinov3_qkvb vit_base_patch16_lingbot"),
    ({**ROPE, "num_kv_heads": 1}, "vit_base_patch16_sapiens2"),
    (ROPE, "vit_pe_core_tiny_patch16_384 vit_pe_spatial_tiny_patch16_512 eva02_base_patch16_clip_224"),
    ({**EVA14, "embed_dim": 128}, "eva02_tiny_patch14_224 eva02_base_patch14_224"),
    ({**VIT14, "num_heads": 3}, "eva_giant_patch14_224"),
    ({**ROPE_ENCODER, "img_size": 64, "head_dim": 48, "intermediate_size": 192}, "gemma4_vit_167m"),
    ({**ROPE_ENCODER, "img_size": 64}, "qwen3_vit_88m"),
    ({**ROPE_ENCODER, "img_size": 84}, "deepseek_vit_412m"),
    (VIT, "naflexvit_base_patch16_gap naflexvit_base_patch16_siglip naflexvit_base_patch16_map"),
    (VIT, "naflexvit_base_patch16_parfac_gap naflexvit_base_patch16_radio_v3"),
    # ---- windows and pyramids
    ({**SWIN, "window_size": 4}, "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256"),
    (SWIN, "swin_s3_tiny_224 swinv2_cr_tiny_224 swinv2_cr_tiny_ns_224"),
    ({"img_size": 64, "_keep": "TransformerLayer"}, "nest_tiny nest_tiny_jx"),
    ({**FOUR, "num_heads": (1, 2, 2, 2), "img_size": 64}, "twins_pcpvt_small twins_svt_small"),
    ({**FOUR, "num_heads": (1, 2, 2, 2)}, "pvt_v2_b0 pvt_v2_b2_li"),
    ({"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 96), "num_heads": (1, 2, 4, 4)}, "davit_tiny davit_base_fl"),
    ({"img_size": 128, "_keep": "GlobalContextVitBlock"}, "gcvit_xxtiny"),
    ({"img_size": 64, "_keep": "MultiScaleBlock"}, "mvitv2_tiny mvitv2_small_cls"),
    ({"stages": (1, 1, 1, 1), "embed_dim": 32, "img_size": 64}, "hiera_tiny_224 hiera_base_plus_224"),
    ({"stages": (1, 1, 1, 1), "embed_dim": 32, "img_size": 128}, "hiera_small_abswin_256"),
    (
        {"stages": (1, 1, 2, 1), "embed_dim": 32, "global_att_blocks": (3,), "window_spec": (8, 4, 8, 4), "_side": 128},
        "sam2_hiera_tiny hieradet_small",
    ),
    (
        {"depth": (1, 1, 1), "base_dims": (24, 24, 24), "heads": (2, 2, 2), "img_size": 64},
        "pit_ti_224 pit_ti_distilled_224",
    ),
    ({"serial_depths": (1, 1, 1, 1), "embed_dims": (32, 48, 64, 64), "num_heads": 8, "img_size": 64}, "coat_lite_tiny"),
    (
        {
            "serial_depths": (1, 1, 1, 1),
            "embed_dims": (32, 32, 32, 32),
            "num_heads": 8,
            "img_size": 64,
            "parallel_depth": 1,
        },
        "coat_tiny",
    ),
    (
        {"depth": ((1, 1, 0), (1, 1, 0)), "embed_dim": (32, 64), "num_heads": (2, 2), "img_size": 240},
        "crossvit_9_240 crossvit_9_dagger_240",
    ),
    ({"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 96), "num_heads": (1, 2, 2, 3)}, "tiny_vit_5m_224"),
    ({"_keep": "FocalNetBlock"}, "focalnet_tiny_srf focalnet_tiny_lrf"),
    # ---- convolution and attention
    (MAXX, "coatnet_0_224 coatnet_pico_rw_224 coatnet_bn_0_rw_224 coatnet_rmlp_nano_rw_224 coatnet_nano_cc_224"),
    (MAXX, "coatnext_nano_rw_224 maxvit_tiny_tf_224 maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 maxvit_tiny_pm_256"),
    (MAXX, "maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 test_coatnet test_maxvit"),
    ({"depth": 1, "img_size": 128, "embed_dim": 96, "num_heads": 3}, "vit_tiny_r_s16_p8_224"),
    (
        {"depth": 1, "img_size": 96, "embed_dim": 96, "num_heads": 3, "_keep": "Bottleneck PreActBottleneck"},
        "vit_small_r26_s32_224 vit_small_resnet26d_224",
    ),
    ({"depth": 1, "img_size": 64}, "vit_base_mci_224"),
    ({"img_size": 128, "_keep": "Block"}, "visformer_tiny"),
    ({"img_size": 128, "_keep": "LevitBlock"}, "levit_128s levit_256d levit_conv_128s"),
    ({"img_size": 128, "_keep": "EfficientFormerV2Block"}, "efficientformerv2_s0"),
    ({"depths": (1, 1, 1, 2), "embed_dims": (24, 32, 48, 64), "num_vit": 1, "_side": 224}, "efficientformer_l1"),
    ({"img_size": 64}, "efficientvit_m0"),
    ({"depths": (1, 1, 1, 1, 2), "widths": (8, 16, 32, 32, 64)}, "efficientvit_b0"),
    ({"depths": (1, 1, 1, 1, 2), "widths": (16, 16, 32, 32, 64)}, "efficientvit_l1"),
    ({"depths": (1, 1, 1, 2), "dims": (32, 48, 64, 96), "heads": (4, 4, 4, 4)}, "edgenext_xx_small"),
    ({"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192)}, "fastvit_t8 fastvit_sa12 fastvit_ma36"),
    ({"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 32, 32, 64, 64)}, "fastvit_mci3"),
    ({"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192)}, "fastvit_mci0"),
    (META, "caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12"),
    ({"_side": 64}, "mobilevit_xxs mobilevitv2_050 efficientvim_m1"),
    ({"_side": 128}, "lowformer_b0 cpubone_nano"),
    ({"_side": 128, "_keep": "UniversalInvertedResidual ConvEncoder"}, "mobilenetv4_hybrid_medium_075 swiftformer_xs"),
    ({"_side": 128, "_keep": "Block BasicBlock RepViTBlock ConvBlock"}, "csatv2 shvit_s1 repvit_m0_9 iformer_t"),
    ({"_side": 128, "_keep": "Block"}, "starnet_s050"),
    ({"channel_multiplier": 0.25}, "mobilenetv5_base"),
    ({"depths": (1, 2, 5, 2)}, "nextvit_small"),
    ({"layers": (1, 1, 1, 1)}, "swiftformer_s"),
    ({"depth": 2, "img_size": 64}, "vitamin_small_224 vitamin_large2_224"),
    ({"_side": 64}, "lambda_resnet26t"),
    ({"img_size": 128}, "botnet26t_256"),
    ({"_side": 256}, "halonet26t bat_resnext26ts"),
    ({"_side": 64, "_keep": "BottleneckBlock"}, "resnet50_clip"),
    # ---- beside attention: mixers of tokens, recurrent, convolution
    (
        {"img_size": 64, "_keep": "MixerBlock SpatialGatingBlock ResBlock"},
        "mixer_s16_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224",
    ),
    (
        {"layers": (1, 1, 1, 1), "embed_dims": (32, 48, 64, 64), "hidden_sizes": (8, 12, 16, 16), "img_size": 56},
        "sequencer2d_s",
    ),
    ({"depths": (1, 1, 1, 1), "dims": (24, 32, 48, 64)}, "convnext_atto convnextv2_atto mambaout_femto"),
    ({"num_blocks_list": (1, 1, 1, 1, 1, 1, 1), "growth_rates": (16, 16, 16, 16, 16, 16, 16)}, "rdnet_tiny"),
    ({"_side": 64}, "resnet18 mobilenetv3_small_050 efficientnet_b0 regnety_002 inception_next_atto fasternet_t0"),
]
"""(keyword arguments, names of timm models)."""

BODY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
HF_VIT = {**BODY, "image_size": 64, "patch_size": 16}
HF_LEVIT = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}
HF_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
HF_PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
HF_SEG = {**HF_PYRAMID, "num_attention_heads": [1, 2, 2, 2], "sr_ratios": [8, 4, 2, 1]}

HF_ROWS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("hf-vit", "ViTForImageClassification", "ViTConfig", HF_VIT),
    ("hf-vit-body", "ViTModel", "ViTConfig", HF_VIT),
    ("hf-deit", "DeiTForImageClassification", "DeiTConfig", HF_VIT),
    ("hf-deit-teacher", "DeiTForImageClassificationWithTeacher", "DeiTConfig", HF_VIT),
    ("hf-beit", "BeitForImageClassification", "BeitConfig", {**HF_VIT, "use_relative_position_bias": True}),
    (
        "hf-beit-shared",
        "BeitForImageClassification",
        "BeitConfig",
        {**HF_VIT, "use_shared_relative_position_bias": True},
    ),
    (
        "hf-data2vec",
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        {**HF_VIT, "use_relative_position_bias": True},
    ),
    ("hf-dinov2", "Dinov2ForImageClassification", "Dinov2Config", {**HF_VIT, "image_size": 56, "patch_size": 14}),
    ("hf-dinov2-swiglu", "Dinov2ForImageClassification", "Dinov2Config", {**HF_VIT, "use_swiglu_ffn": True}),
    ("hf-dinov2-body", "Dinov2Model", "Dinov2Config", {**HF_VIT, "image_size": 56, "patch_size": 14}),
    ("hf-dinov2-registers", "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", HF_VIT),
    ("hf-dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", HF_VIT),
    (
        "hf-dinov3-gated",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**HF_VIT, "use_gated_mlp": True, "num_register_tokens": 4},
    ),
    ("hf-dinov3-convnext", "DINOv3ConvNextModel", "DINOv3ConvNextConfig", {**HF_PYRAMID, "image_size": 64}),
    ("hf-ijepa", "IJepaForImageClassification", "IJepaConfig", HF_VIT),
    ("hf-vit-msn", "ViTMSNForImageClassification", "ViTMSNConfig", HF_VIT),
    ("hf-swin", "SwinForImageClassification", "SwinConfig", HF_SWIN),
    ("hf-swinv2", "Swinv2ForImageClassification", "Swinv2Config", HF_SWIN),
    ("hf-donut-swin", "DonutSwinForImageClassification", "DonutSwinConfig", HF_SWIN),
    ("hf-clip", "CLIPForImageClassification", "CLIPConfig", {"vision_config": HF_VIT}),
    ("hf-clip-vision", "CLIPVisionModel", "CLIPVisionConfig", HF_VIT),
    ("hf-clip-projection", "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**HF_VIT, "projection_dim": 32}),
    ("hf-metaclip2", "MetaClip2ForImageClassification", "MetaClip2Config", {"vision_config": HF_VIT}),
    ("hf-siglip", "SiglipForImageClassification", "SiglipConfig", {"vision_config": HF_VIT}),
    ("hf-siglip-vision", "SiglipVisionModel", "SiglipVisionConfig", HF_VIT),
    ("hf-aimv2", "Aimv2VisionModel", "Aimv2VisionConfig", HF_VIT),
    ("hf-levit", "LevitForImageClassification", "LevitConfig", HF_LEVIT),
    ("hf-levit-teacher", "LevitForImageClassificationWithTeacher", "LevitConfig", HF_LEVIT),
    (
        "hf-mobilevit",
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]},
    ),
    (
        "hf-mobilevitv2",
        "MobileViTV2ForImageClassification",
        "MobileViTV2Config",
        {"image_size": 64, "width_multiplier": 0.25},
    ),
    (
        "hf-pvt",
        "PvtForImageClassification",
        "PvtConfig",
        {**HF_PYRAMID, "image_size": 64, "num_attention_heads": [1, 2, 2, 2]},
    ),
    (
        "hf-pvt-v2",
        "PvtV2ForImageClassification",
        "PvtV2Config",
        {**HF_PYRAMID, "image_size": 64, "num_attention_heads": [1, 2, 2, 2]},
    ),
    ("hf-segformer", "SegformerForImageClassification", "SegformerConfig", HF_SEG),
    (
        "hf-cvt",
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    ),
    ("hf-convnextv2", "ConvNextV2ForImageClassification", "ConvNextV2Config", HF_PYRAMID),
    (
        "hf-focalnet",
        "FocalNetForImageClassification",
        "FocalNetConfig",
        {
            "image_size": 64,
            "embed_dim": 24,
            "depths": [1, 1],
            "hidden_sizes": [24, 48],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
    (
        "hf-hiera",
        "HieraForImageClassification",
        "HieraConfig",
        {
            "image_size": [64, 64],
            "embed_dim": 24,
            "depths": [1, 1, 1],
            "num_heads": [1, 2, 4],
            "num_query_pool": 2,
            "masked_unit_size": [4, 4],
        },
    ),
    (
        "hf-poolformer",
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]},
    ),
    (
        "hf-swiftformer",
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64]},
    ),
    ("hf-pixio", "PixioModel", "PixioConfig", HF_VIT),
]
SHIPPED = ("scenes-yolos", "scenes-detr", "scenes-rtdetr")
"""Detectors that come with quantlens: with their trained weights."""

HF = {name: (model, config, arguments) for name, model, config, arguments in HF_ROWS}
"""Name -> model class of transformers, its configuration class, arguments."""


def architectures() -> dict[str, dict[str, Any]]:
    """Every architecture by name, in the table's order: {"source", "build" (keyword arguments), "side"}."""
    found: dict[str, dict[str, Any]] = {}
    for arguments, names in TIMM:
        side = arguments.get("img_size", arguments.get("_side", SIDE))
        build = {key: value for key, value in arguments.items() if not key.startswith("_")}
        keep = arguments.get("_keep", "").split()
        for name in names.split():
            found[name] = {"source": "timm", "build": build, "side": side, "keep": keep}
    for name, (model, config, arguments) in HF.items():
        size = arguments.get("image_size", arguments.get("vision_config", {}).get("image_size", SIDE))
        side = size if isinstance(size, int) else size[0]
        found[name] = {"source": "transformers", "model": model, "config": config, "build": arguments, "side": side}
    for name in SHIPPED:
        found[name] = {"source": "shipped"}
    for name, (kind, arguments) in CONFIGURATIONS.items():
        made = {"model": f"{kind}ForObjectDetection", "config": f"{kind}Config", "build": arguments}
        found[f"hf-{name}"] = {"source": "detectors", **made, "side": side_of(name)}
    return found
